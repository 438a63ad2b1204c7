"""Rules for meshes: shard_map, and the collectives and casts that a weight meets inside.

A shard of `W + s · A B` is the shard of W and the shards of A and B along the axes that each has: a
factor is split where the base is, and its rank never is.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora import _compat
from jlora.transform._registry import rule
from jlora.transform._walk import Walk
from jlora.transform._weight import W, Weight


def _spread(view: W, spec: Any) -> W:
    """Return the partition specs of a view's parts, given the base's."""
    spec = P(*spec, *(None,) * (len(view.roles) - len(spec)))
    components = [view.along(k, spec) for k in range(len(view.components))]
    return view.remade(spec, components, view.roles)


@rule("shard_map", kind="call")
def _shard_map(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    p = eqn.params
    operands = tuple(x.with_built_base() if isinstance(x, Weight) else x for x in operands)
    specs = [
        _spread(x, spec) if isinstance(x, Weight) else spec
        for x, spec in zip(operands, p["in_specs"], strict=True)
    ]

    def walked(key: Any, operands: Sequence[Any]) -> list[Any]:
        return walk.arrays(eqn, walk.inside(eqn, key).evaluate(p["jaxpr"], operands))

    return jax.shard_map(
        walked,
        mesh=p["mesh"],
        in_specs=(P(), specs),
        out_specs=list(p["out_specs"]),
        axis_names=_compat.manual_axes(p),
        check_vma=p["check_vma"],
    )(walk.next_key(), list(operands))


@rule("pvary", kind="rearrange")
def _pvary(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    def move(f: Any, axes: list[int]) -> Any:
        return _compat.bind(eqn, f)[0]

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("ppermute", kind="rearrange")
def _ppermute(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    along, told = eqn.params["axis_name"], _compat.varying_axes(view.base)
    along = {along} if isinstance(along, str) else {*along}

    def move(f: Any, axes: list[int]) -> Any:
        # A factor that all devices have is what each of them would be sent.
        alike = told and along.isdisjoint(_compat.varying_axes(f))
        return f if alike else _compat.bind(eqn, f)[0]

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("all_gather", kind="rearrange")
def _all_gather(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    p = eqn.params
    axis, groups = p["all_gather_dimension"], p["axis_index_groups"]

    def gather(f: Any, k: int) -> Any:
        return lax.all_gather(f, p["axis_name"], axis=k, tiled=p["tiled"], axis_index_groups=groups)

    base = walk.bind(eqn, view)[0]
    if p["tiled"]:

        def move(f: Any, axes: list[int]) -> Any:
            return gather(f, axes.index(axis)) if axis in axes else f

        return [view.moved(base, view.roles, move)]
    roles = [*view.roles[:axis], view.new_role, *view.roles[axis:]]
    return [view.moved(base, roles, lambda f, axes: gather(f, sum(n < axis for n in axes)))]


@rule("reshard", kind="rearrange")
def _reshard(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    target = eqn.params["dst_sharding"]
    parts: Any = _spread(view, target.spec)
    laid = [
        jax.reshard(f, NamedSharding(target.mesh, spec))
        for f, spec in zip(view.components, parts.components, strict=True)
    ]
    return [view.remade(walk.bind(eqn, view)[0], laid, view.roles)]
