"""Rules for what only rearranges: the same on the base, and on each factor's own axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora.transform._registry import rule
from jlora.transform._view import GAIN, View, on_factor, varying_sides
from jlora.transform._walk import Walk


@rule("transpose", equal=True, gain=True)
def _transpose(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    return [_transposed(view, walk.bind(eqn, view)[0], eqn.params["permutation"])]


def _transposed(view: View, base: Any, perm: Sequence[int]) -> View:
    def move(f: Any, axes: list[int]) -> Any:
        return lax.transpose(f, [axes.index(p) for p in perm if p in axes] + [len(axes)])

    return view.moved(base, [view.roles[p] for p in perm], move)


@rule("convert_element_type", whole=True, gain=True)
def _cast(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return NotImplemented
    # The factors keep their own dtype: they are cast where they are multiplied.
    return [view.over(walk.bind(eqn, view)[0])]


@rule(
    *("copy", "copy_p", "name", "sharding_constraint", "layout_constraint", "reduce_precision"),
    whole=True,
    gain=True,
)
def _same(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    return [view.over(walk.bind(eqn, view)[0])]


@rule("stop_gradient", gain=True)
def _stop_gradient(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    return [view.moved(walk.bind(eqn, view)[0], view.roles, lambda f, axes: lax.stop_gradient(f))]


@rule("optimization_barrier", gain=True)
def _barrier(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    return lax.optimization_barrier(list(operands))


@rule("squeeze", equal=True, gain=True)
def _squeeze(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    gone = [d % len(view.roles) for d in eqn.params["dimensions"]]

    def move(f: Any, axes: list[int]) -> Any:
        return lax.squeeze(f, [axes.index(d) for d in gone if d in axes])

    roles = [r for k, r in enumerate(view.roles) if k not in gone]
    return [view.moved(walk.bind(eqn, view)[0], roles, move)]


@rule("broadcast_in_dim", equal=True, gain=True)
def _broadcast(walk: Walk, eqn: JaxprEqn, view: View, *sizes: Any) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    base = walk.bind(eqn, view, *sizes)[0]
    roles = ["e" if view.parts else view.new_role] * len(shape)
    for source, p in enumerate(dims):
        roles[p] = view.roles[source]

    def move(f: Any, axes: list[int]) -> Any:
        wide = [*(shape[dims[k]] for k in axes), f.shape[-1]]
        return lax.broadcast_in_dim(f, wide, range(f.ndim))

    return [view.moved(base, roles, move)]


@rule("reshape", equal=True, gain=True)
def _reshape(walk: Walk, eqn: JaxprEqn, view: View, *sizes: Any) -> Any:
    new, base = eqn.params["new_sizes"], walk.bind(eqn, view, *sizes)[0]
    perm = eqn.params["dimensions"]
    if perm is not None:  # batching rules transpose and reshape in one
        view = _transposed(view, lax.transpose(view.base, perm), perm)
    groups = _groups(view.shape, new)
    if view.parts:
        for before, _ in groups:
            merged = _of_one_role(view, before)
            if merged is None:
                return NotImplemented
            view = merged
    roles: list[Any] = ["e" if view.parts else view.new_role] * len(new)
    for before, after in groups:
        big = [view.roles[k] for k in before if view.shape[k] > 1]
        if len(before) == len(after) == 1:
            roles[after[0]] = view.roles[before[0]]
        elif big:
            for p in after:
                if new[p] > 1:
                    roles[p] = big[0] if view.parts else frozenset().union(*big)
    out = View(base, (), tuple(roles), view.names)
    laid = [
        lax.reshape(f, [*(new[p] for p in out.axes(k)), f.shape[-1]])
        for k, f in enumerate(view.laid)
    ]
    return [view.remade(base, laid, roles)]


def _of_one_role(view: View, group: Sequence[int]) -> View | None:
    """Give the axes that a reshape merges one role; None where that is no longer a product."""
    big = [k for k in group if view.shape[k] > 1]
    kinds = {view.roles[k] for k in big} - {"e"}
    sides = kinds & {"i", "o"}
    if len(sides) > 1:
        return None
    role = next(iter(sides or kinds), "e")
    if role == "e":
        return view
    view = view.settled([role if k in big else "e" for k in range(len(view.roles))])
    stack = [k for k in big if view.roles[k] != role]
    if stack and role == "i" and view.gain is not None:
        return None  # outputs would have another gain in each block of the inputs
    blocks = math.prod(view.shape[k] for k in stack)
    roles = [role if k in stack else r for k, r in enumerate(view.roles)]
    most = min(
        math.prod(n for n, r in zip(view.shape, roles, strict=True) if r == side) for side in "io"
    )
    if stack and view.rank * blocks > most:
        return None  # one rank for all the stack's blocks would be no less than the whole weight
    for k in stack:
        view = view.folded(k, "io".index(role))
    return view


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest runs of axes that become runs of axes of the same size."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after, m, n = [], [], 1, 1
        while (not before and not after) or m != n:
            if i < len(old) and (m <= n or j >= len(new)):
                m, before, i = m * old[i], [*before, i], i + 1
            else:
                n, after, j = n * new[j], [*after, j], j + 1
        if m == 1 and not (before and after) and groups:
            # a leftover axis of size 1 joins its neighbor, whose role it takes
            groups[-1][0].extend(before)
            groups[-1][1].extend(after)
        else:
            groups.append((before, after))
    return groups


@rule("slice", gain=True)
def _slice(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    p = eqn.params
    starts, limits, strides = p["start_indices"], p["limit_indices"], p["strides"]

    def move(f: Any, axes: list[int]) -> Any:
        if all(starts[k] == 0 and limits[k] == view.shape[k] for k in axes) and not strides:
            return f
        step = [*(strides[k] for k in axes), 1] if strides else None
        start, limit = [starts[k] for k in axes], [limits[k] for k in axes]
        return lax.slice(f, [*start, 0], [*limit, f.shape[-1]], step)

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("dynamic_slice", gain=True)
def _dynamic_slice(walk: Walk, eqn: JaxprEqn, view: Any, *starts: Any) -> Any:
    if any(isinstance(s, View) for s in starts) or len(starts) != len(view.roles):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]

    def move(f: Any, axes: list[int]) -> Any:
        if all(sizes[k] == view.shape[k] for k in axes):
            return f
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return lax.dynamic_slice(
            f, [*(starts[k] for k in axes), zero], [*(sizes[k] for k in axes), f.shape[-1]]
        )

    return [view.moved(walk.bind(eqn, view, *starts)[0], view.roles, move)]


def _pieces(view: View, axis: int, bases: Sequence[Any], roles: Any, cut: Any) -> list[View]:
    """Cut each factor that has an axis into as many pieces as the base; the other is shared."""
    cuts = [
        cut(f, view.axes(k).index(axis)) if axis in view.axes(k) else [f] * len(bases)
        for k, f in enumerate(view.laid)
    ]
    return [
        view.remade(base, [pieces[n] for pieces in cuts], roles) for n, base in enumerate(bases)
    ]


@rule("split", gain=True)
def _split(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    sizes, axis = [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
    bases = walk.bind(eqn, view)
    return _pieces(view, axis, bases, view.roles, lambda f, k: lax.split(f, sizes, k))


@rule("unstack", gain=True)
def _unstack(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    axis, bases = eqn.params["axis"], walk.bind(eqn, view)
    roles = [r for k, r in enumerate(view.roles) if k != axis]
    return _pieces(view, axis, bases, roles, lambda f, k: jnp.unstack(f, axis=k))


@rule("rev", gain=True)
def _rev(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    def move(f: Any, axes: list[int]) -> Any:
        return lax.rev(f, [axes.index(d) for d in eqn.params["dimensions"] if d in axes])

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("tile", gain=True)
def _tile(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    reps = eqn.params["reps"]

    def move(f: Any, axes: list[int]) -> Any:
        return jnp.tile(f, [*(reps[k] for k in axes), 1])

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("pad")
def _pad(walk: Walk, eqn: JaxprEqn, view: Any, value: Any) -> Any:
    if not isinstance(view, View) or isinstance(value, View):
        return NotImplemented
    config = eqn.params["padding_config"]

    def move(f: Any, axes: list[int]) -> Any:  # where the base is padded the delta is zero
        return lax.pad(f, jnp.zeros((), f.dtype), [*(config[k] for k in axes), (0, 0, 0)])

    return [view.moved(walk.bind(eqn, view, value)[0], view.roles, move)]


@rule("reduce_sum", gain=True)
def _sum(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    gone = list(eqn.params["axes"])
    if view.gain is not None and any(view.shape[k] > 1 for k in view.axes(GAIN) if k in gone):
        return NotImplemented  # a sum of outputs, each with a gain of its own

    def move(f: Any, axes: list[int]) -> Any:
        f = f.sum([n for n, k in enumerate(axes) if k in gone and view.roles[k] != "s"])
        left = [k for k in axes if k not in gone or view.roles[k] == "s"]
        kept = [n for n, k in enumerate(left) if k not in gone]
        stack = [n for n in range(len(left)) if n not in kept]
        # A sum over a stack is one product of the ranks of all.
        f = lax.transpose(f, [*kept, *stack, len(left)])
        return f.reshape(*f.shape[: len(kept)], -1)

    roles = [r for k, r in enumerate(view.roles) if k not in gone]
    return [view.moved(walk.bind(eqn, view)[0], roles, move)]


@rule("neg", gain=True)
def _neg(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    return [_scaled(view, walk.bind(eqn, view)[0], 1, lambda f: -f)]


@rule("mul", "div", gain=True)
def _scale(walk: Walk, eqn: JaxprEqn, left: Any, right: Any) -> Any:
    """Scale by what varies on one side only: the factor of that side takes it."""
    divide = eqn.primitive.name == "div"
    view, other = (left, 1) if isinstance(left, View) else (right, 0)
    if (isinstance(left, View) and isinstance(right, View)) or (divide and view is right):
        return NotImplemented
    base = walk.bind(eqn, left, right)[0]
    if not view.parts:
        return [View(base, (), view.roles, view.names)] if base.shape == view.shape else [base]
    c = walk.narrowest(eqn.invars[other], (left, right)[other])
    sides = varying_sides(view, c)
    if not sides or base.shape != view.shape:
        return NotImplemented

    def scale(f: Any) -> Any:
        by = on_factor(view, sides[-1], c).astype(f.dtype)
        return f / by if divide else f * by

    return [_scaled(view, base, sides[-1], scale)]


def _scaled(view: View, base: Any, side: int, scale: Any) -> View:
    laid = [scale(f) if k == side else f for k, f in enumerate(view.laid)]
    return view.remade(base, laid, view.roles)
