"""Rules for rearrangements: the same operation on the base and on each factor's own axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora.transform._key import PLAIN
from jlora.transform._registry import rule
from jlora.transform._view import GAIN, View, axes_of, on_factor
from jlora.transform._walk import Walk
from jlora.transform._weight import AnyBase, Role, Value, Weight


@rule("transpose", kind="rearrange", repeated=True)
def _transpose(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    return [_transposed(view, walk.bind(eqn, view)[0], eqn.params["permutation"])]


def _transposed(view: Weight, base: AnyBase, perm: Sequence[int]) -> Weight:
    def move(f: Array, axes: list[int]) -> Array:
        return lax.transpose(f, [axes.index(p) for p in perm if p in axes] + [len(axes)])

    return view.moved(base, [view.roles[p] for p in perm], move)


@rule("convert_element_type", kind="rearrange", own=True)
def _cast(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return NotImplemented
    # The factors keep their dtype; a product casts them.
    return [view.over(walk.bind(eqn, view)[0])]


@rule(
    *("copy", "sharding_constraint", "layout_constraint", "reduce_precision"),
    kind="rearrange",
    own=True,
)
def _same(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    return [view.over(walk.bind(eqn, view)[0])]


@rule("name", kind="rearrange", own=True)
def _name(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    if eqn.params["name"] == PLAIN and isinstance(view, View) and walk.settings.observe is None:
        raise ValueError(
            "`jlora.lora(fn, dropout=..., key=...)`: it is called inside a function that was given "
            "to another `jlora.lora` or to `jlora.bank.each`, which adapts the weights itself, so "
            "nothing would be dropped. Pass what `jlora.lora` returned instead of a function that "
            "calls it: `jlora.bank.each(jlora.lora(fn, dropout=..., key=step_key), ...)`."
        )
    return _same(walk, eqn, view)


@rule("stop_gradient", kind="rearrange")
def _stop_gradient(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    return [view.moved(walk.bind(eqn, view)[0], view.roles, lambda f, axes: lax.stop_gradient(f))]


@rule("optimization_barrier", kind="rearrange")
def _barrier(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    return lax.optimization_barrier(list(operands))


@rule("squeeze", kind="rearrange", repeated=True)
def _squeeze(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    gone = [d % len(view.roles) for d in eqn.params["dimensions"]]

    def move(f: Array, axes: list[int]) -> Array:
        return lax.squeeze(f, [axes.index(d) for d in gone if d in axes])

    roles = [r for k, r in enumerate(view.roles) if k not in gone]
    return [view.moved(walk.bind(eqn, view)[0], roles, move)]


@rule("broadcast_in_dim", kind="rearrange", repeated=True)
def _broadcast(walk: Walk, eqn: JaxprEqn, view: Weight, *sizes: Value) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    base = walk.bind(eqn, view, *sizes)[0]
    roles = [view.repeated_role] * len(shape)
    for source, p in enumerate(dims):
        roles[p] = view.roles[source]

    def move(f: Array, axes: list[int]) -> Array:
        wide = [*(shape[dims[k]] for k in axes), f.shape[-1]]
        return lax.broadcast_in_dim(f, wide, range(f.ndim))

    return [view.moved(base, roles, move)]


@rule("reshape", kind="rearrange", repeated=True)
def _reshape(walk: Walk, eqn: JaxprEqn, weight: Weight, *sizes: Value) -> Any:
    new, perm, view = eqn.params["new_sizes"], eqn.params["dimensions"], weight
    if perm is not None:  # made by batching rules: a transpose and a reshape in one
        shape = jax.ShapeDtypeStruct([view.shape[p] for p in perm], view.base.dtype)
        view = _transposed(view, shape, perm)
    groups = _groups(view.shape, new)
    for before, _ in groups:
        merged = view.of_one_role(before)
        if merged is None:
            return NotImplemented
        view = merged
    roles = [view.repeated_role] * len(new)
    for before, after in groups:
        big = [k for k in before if view.shape[k] > 1]
        if len(before) == len(after) == 1:
            roles[after[0]] = view.roles[before[0]]
        elif big:
            for p in after:
                if new[p] > 1:
                    roles[p] = view.merged_role(big)
    components = [
        lax.reshape(f, [*(new[p] for p in axes_of(k, roles)), f.shape[-1]])
        for k, f in enumerate(view.components)
    ]
    return [view.remade(walk.bind(eqn, weight, *sizes)[0], components, roles)]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into minimal groups of axes with equal products of sizes."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after, m, n = [], [], 1, 1
        while (not before and not after) or m != n:
            if i < len(old) and (m <= n or j >= len(new)):
                m, before, i = m * old[i], [*before, i], i + 1
            else:
                n, after, j = n * new[j], [*after, j], j + 1
        if m == 1 and not (before and after) and groups:
            # a leftover axis of size 1 joins the group before it and takes its role
            groups[-1][0].extend(before)
            groups[-1][1].extend(after)
        else:
            groups.append((before, after))
    return groups


@rule("slice", kind="rearrange")
def _slice(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    p = eqn.params
    starts, limits, strides = p["start_indices"], p["limit_indices"], p["strides"]

    def move(f: Array, axes: list[int]) -> Array:
        if all(starts[k] == 0 and limits[k] == view.shape[k] for k in axes) and not strides:
            return f
        step = [*(strides[k] for k in axes), 1] if strides else None
        start, limit = [starts[k] for k in axes], [limits[k] for k in axes]
        return lax.slice(f, [*start, 0], [*limit, f.shape[-1]], step)

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("dynamic_slice", kind="rearrange")
def _dynamic_slice(walk: Walk, eqn: JaxprEqn, view: Any, *starts: Any) -> Any:
    if any(isinstance(s, Weight) for s in starts) or len(starts) != len(view.roles):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]

    def move(f: Array, axes: list[int]) -> Array:
        if all(sizes[k] == view.shape[k] for k in axes):
            return f
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return lax.dynamic_slice(
            f, [*(starts[k] for k in axes), zero], [*(sizes[k] for k in axes), f.shape[-1]]
        )

    return [view.moved(walk.bind(eqn, view, *starts)[0], view.roles, move)]


def _pieces(
    view: Weight,
    axis: int,
    bases: Sequence[Any],
    roles: Sequence[Role],
    cut: Callable[[Array, int], Sequence[Array]],
) -> list[Weight]:
    """Cut each component that has `axis` into as many pieces as the base; others are shared."""
    cuts = [
        cut(f, view.axes(k).index(axis)) if axis in view.axes(k) else [f] * len(bases)
        for k, f in enumerate(view.components)
    ]
    return [
        view.remade(base, [pieces[n] for pieces in cuts], roles) for n, base in enumerate(bases)
    ]


@rule("split", kind="rearrange")
def _split(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    sizes, axis = [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
    bases = walk.bind(eqn, view)
    return _pieces(view, axis, bases, view.roles, lambda f, k: lax.split(f, sizes, k))


@rule("unstack", kind="rearrange")
def _unstack(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    axis, bases = eqn.params["axis"], walk.bind(eqn, view)
    roles = [r for k, r in enumerate(view.roles) if k != axis]
    return _pieces(view, axis, bases, roles, lambda f, k: jnp.unstack(f, axis=k))


@rule("rev", kind="rearrange")
def _rev(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    def move(f: Array, axes: list[int]) -> Array:
        return lax.rev(f, [axes.index(d) for d in eqn.params["dimensions"] if d in axes])

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("tile", kind="rearrange")
def _tile(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    reps = eqn.params["reps"]

    def move(f: Array, axes: list[int]) -> Array:
        return jnp.tile(f, [*(reps[k] for k in axes), 1])

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("pad", kind="join")  # a join, because a gain must not scale the padding
def _pad(walk: Walk, eqn: JaxprEqn, view: Value, value: Value) -> Any:
    if not isinstance(view, Weight) or isinstance(value, Weight):
        return NotImplemented
    config = eqn.params["padding_config"]

    def move(f: Array, axes: list[int]) -> Array:  # the delta is zero in the padding
        return lax.pad(f, jnp.zeros((), f.dtype), [*(config[k] for k in axes), (0, 0, 0)])

    return [view.moved(walk.bind(eqn, view, value)[0], view.roles, move)]


@rule("reduce_sum", kind="rearrange")
def _sum(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    gone = list(eqn.params["axes"])
    if view.gain is not None:
        if any(view.shape[k] > 1 for k in view.axes(GAIN) if k in gone):
            return NotImplemented  # a sum of outputs that each have their own gain

    def move(f: Array, axes: list[int]) -> Array:
        f = f.sum([n for n, k in enumerate(axes) if k in gone and view.roles[k] != "s"])
        left = [k for k in axes if k not in gone or view.roles[k] == "s"]
        kept = [n for n, k in enumerate(left) if k not in gone]
        stack = [n for n in range(len(left)) if n not in kept]
        # A sum over a stack is a single product with the ranks concatenated.
        f = lax.transpose(f, [*kept, *stack, len(left)])
        return f.reshape(*f.shape[: len(kept)], -1)

    roles = [r for k, r in enumerate(view.roles) if k not in gone]
    return [view.moved(walk.bind(eqn, view)[0], roles, move)]


@rule("neg", kind="rearrange")
def _neg(walk: Walk, eqn: JaxprEqn, view: Weight) -> Any:
    return [view.on_side(walk.bind(eqn, view)[0], 1, lax.neg)]


@rule("mul", "div", kind="rearrange")
def _scale(walk: Walk, eqn: JaxprEqn, left: Any, right: Any) -> Any:
    """Scale by an array that varies along one side only, in the factor of that side."""
    divide = eqn.primitive.name == "div"
    view, other = (left, 1) if isinstance(left, Weight) else (right, 0)
    if (isinstance(left, Weight) and isinstance(right, Weight)) or (divide and view is right):
        return NotImplemented
    c = walk.narrowest(eqn.invars[other], (left, right)[other])
    sides = view.sides_of(c)
    result: Any = eqn.outvars[0].aval
    if not sides or result.shape != view.shape:
        return NotImplemented

    def scale(f: Array) -> Array:
        by = on_factor(view, sides[-1], c).astype(f.dtype)
        return f / by if divide else f * by

    return [view.on_side(walk.bind(eqn, left, right)[0], sides[-1], scale)]
