"""Rules for meshes: `shard_map`, and the collectives and casts applied to weights inside it.

A shard of `W + s · A B` consists of a shard of W and the matching shards of A and B: a factor is
split along those axes of the base that it has, and never along the rank.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jlora import _compat
from jlora.transform._registry import rule
from jlora.transform._walk import Walk
from jlora.transform._weight import Key, Value, W, Weight


def _specs(view: W, spec: P) -> W:
    """Return the tree of a view's partition specs, given the base's."""
    spec = P(*spec, *(None,) * (len(view.roles) - len(spec)))
    components = [view.along(k, spec) for k in range(len(view.components))]
    return view.remade(spec, components, view.roles)


@rule("shard_map", kind="call")
def _shard_map(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    p = eqn.params
    operands = tuple(x.with_built_base() if isinstance(x, Weight) else x for x in operands)
    specs = [
        _specs(x, spec) if isinstance(x, Weight) else spec
        for x, spec in zip(operands, p["in_specs"], strict=True)
    ]

    def walked(key: Key, operands: Sequence[Any]) -> list[Any]:
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
    def move(f: Array, axes: list[int]) -> Array:
        # A and B of each device may vary already, as when their gradients are averaged later.
        left = tuple(name for name in eqn.params["axes"] if name not in _compat.varying_axes(f))
        return _compat.apply(eqn.primitive, {**eqn.params, "axes": left}, f)[0] if left else f

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("ppermute", kind="rearrange")
def _ppermute(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    name, known = eqn.params["axis_name"], _compat.varying_axes(view.base)
    names = {name} if isinstance(name, str) else {*name}

    def move(f: Array, axes: list[int]) -> Array:
        # A factor that is replicated over these axes is already what each device would receive.
        alike = known and names.isdisjoint(_compat.varying_axes(f))
        return f if alike else _compat.bind(eqn, f)[0]

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("all_gather", kind="rearrange")
def _all_gather(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    p = eqn.params
    axis, groups = p["all_gather_dimension"], p["axis_index_groups"]

    def gather(f: Array, k: int) -> Array:
        return lax.all_gather(f, p["axis_name"], axis=k, tiled=p["tiled"], axis_index_groups=groups)

    base = walk.bind(eqn, view)[0]
    if p["tiled"]:

        def move(f: Array, axes: list[int]) -> Array:
            return gather(f, axes.index(axis)) if axis in axes else f

        return [view.moved(base, view.roles, move)]
    roles = [*view.roles[:axis], view.new_role, *view.roles[axis:]]
    return [view.moved(base, roles, lambda f, axes: gather(f, sum(n < axis for n in axes)))]


@rule("reshard", kind="rearrange")
def _reshard(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    target = eqn.params["dst_sharding"]
    specs: Any = _specs(view, target.spec)
    resharded = [
        jax.reshard(f, NamedSharding(target.mesh, spec))
        for f, spec in zip(view.components, specs.components, strict=True)
    ]
    return [view.remade(walk.bind(eqn, view)[0], resharded, view.roles)]
