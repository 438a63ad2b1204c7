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
from jlora.transform._view import View
from jlora.transform._walk import Walk


def _spread(view: View, spec: Any) -> View:
    """Return the partition specs of a view's parts, given the base's."""
    spec = P(*spec, *(None,) * (len(view.roles) - len(spec)))
    laid = [view.along(k, spec) for k in range(len(view.laid))]
    return view.remade(spec, laid, view.roles)


@rule("shard_map", gain=True)
def _shard_map(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    p = eqn.params
    specs = [
        _spread(x, spec) if isinstance(x, View) else spec
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


@rule("pvary", gain=True)
def _pvary(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    def move(f: Any, axes: list[int]) -> Any:
        return _compat.bind(eqn, f)[0]

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("ppermute", gain=True)
def _ppermute(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    along, told = eqn.params["axis_name"], _compat.varying_axes(view.base)
    along = {along} if isinstance(along, str) else {*along}

    def move(f: Any, axes: list[int]) -> Any:
        # A factor that all devices have is what each of them would be sent.
        alike = told and along.isdisjoint(_compat.varying_axes(f))
        return f if alike else _compat.bind(eqn, f)[0]

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("all_gather", gain=True)
def _all_gather(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
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


@rule("reshard", gain=True)
def _reshard(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    target = eqn.params["dst_sharding"]
    parts = _spread(view, target.spec)
    laid = [
        jax.reshard(f, NamedSharding(target.mesh, spec))
        for f, spec in zip(view.laid, parts.laid, strict=True)
    ]
    return [view.remade(walk.bind(eqn, view)[0], laid, view.roles)]
