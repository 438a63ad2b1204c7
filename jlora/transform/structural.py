"""Rules for what only rearranges: the same on the base, and on each factor's own axes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora.transform._registry import rule
from jlora.transform._view import View
from jlora.transform._walk import Walk


@rule("transpose")
def _transpose(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    perm = eqn.params["permutation"]

    def move(f: Any, axes: list[int]) -> Any:
        return lax.transpose(f, [axes.index(p) for p in perm if p in axes] + [len(axes)])

    return [view.moved(walk.bind(eqn, view)[0], [view.roles[p] for p in perm], move)]


@rule("convert_element_type")
def _cast(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return NotImplemented
    # The factors keep their own dtype: they are cast where they are multiplied.
    return [view.moved(walk.bind(eqn, view)[0], view.roles, lambda f, axes: f)]


@rule("copy", "copy_p", "stop_gradient", "name", "sharding_constraint", "reduce_precision")
def _same(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    base = walk.bind(eqn, view)[0]
    if eqn.primitive.name == "stop_gradient":
        return [view.moved(base, view.roles, lambda f, axes: lax.stop_gradient(f))]
    return [view.moved(base, view.roles, lambda f, axes: f)]


@rule("optimization_barrier")
def _barrier(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    return lax.optimization_barrier(list(operands))


@rule("squeeze")
def _squeeze(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    gone = [d % len(view.roles) for d in eqn.params["dimensions"]]

    def move(f: Any, axes: list[int]) -> Any:
        return lax.squeeze(f, [axes.index(d) for d in gone if d in axes])

    roles = [r for k, r in enumerate(view.roles) if k not in gone]
    return [view.moved(walk.bind(eqn, view)[0], roles, move)]


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: JaxprEqn, view: View, *sizes: Any) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    base = walk.bind(eqn, view, *sizes)[0]
    new = [p for p in range(len(shape)) if p not in dims]
    roles = ["s"] * len(shape)  # a new axis repeats the weight: a stack of equal ones
    for source, p in enumerate(dims):
        roles[p] = view.roles[source]

    def move(f: Any, axes: list[int]) -> Any:
        kept = sorted([*new, *(dims[k] for k in axes)])
        where = [kept.index(dims[k]) for k in axes] + [len(kept)]
        return lax.broadcast_in_dim(f, [*(shape[p] for p in kept), f.shape[-1]], where)

    return [view.moved(base, roles, move)]


@rule("reshape")
def _reshape(walk: Walk, eqn: JaxprEqn, view: View, *sizes: Any) -> Any:
    new = eqn.params["new_sizes"]
    roles: list[str] = [""] * len(new)
    for before, after in _groups(view.shape, new):
        letters = {view.roles[k] for k in before if view.shape[k] > 1} or {"s"}
        if view.factors and len(letters) > 1:
            return NotImplemented  # input and output axes in one: no longer a product
        for p in after:
            roles[p] = "".join(sorted(letters))
    out = View(walk.bind(eqn, view, *sizes)[0], view.factors, tuple(roles), view.name)

    def shape_of(k: int) -> list[int]:
        return [new[p] for p in out.axes(k)] + [view.factors[k].shape[-1]]

    factors = tuple(lax.reshape(f, shape_of(k)) for k, f in enumerate(view.factors))
    return [View(out.base, factors, out.roles, view.name)]


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


@rule("slice")
def _slice(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    p = eqn.params
    strides = p["strides"] or (1,) * len(view.roles)

    def move(f: Any, axes: list[int]) -> Any:
        return lax.slice(
            f,
            [*(p["start_indices"][k] for k in axes), 0],
            [*(p["limit_indices"][k] for k in axes), f.shape[-1]],
            [*(strides[k] for k in axes), 1],
        )

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: JaxprEqn, view: Any, *starts: Any) -> Any:
    if any(isinstance(s, View) for s in starts) or len(starts) != len(view.roles):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]

    def move(f: Any, axes: list[int]) -> Any:
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return lax.dynamic_slice(
            f, [*(starts[k] for k in axes), zero], [*(sizes[k] for k in axes), f.shape[-1]]
        )

    return [view.moved(walk.bind(eqn, view, *starts)[0], view.roles, move)]


@rule("split")
def _split(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    sizes, axis = [int(n) for n in eqn.params["sizes"]], eqn.params["axis"]
    pieces = [
        lax.split(f, sizes, view.axes(k).index(axis)) if axis in view.axes(k) else [f] * len(sizes)
        for k, f in enumerate(view.factors)
    ]
    return [
        View(base, tuple(piece[n] for piece in pieces), view.roles, view.name)
        for n, base in enumerate(walk.bind(eqn, view))
    ]


@rule("rev")
def _rev(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    def move(f: Any, axes: list[int]) -> Any:
        return lax.rev(f, [axes.index(d) for d in eqn.params["dimensions"] if d in axes])

    return [view.moved(walk.bind(eqn, view)[0], view.roles, move)]


@rule("neg")
def _neg(walk: Walk, eqn: JaxprEqn, view: View) -> Any:
    return [_scaled(view, walk.bind(eqn, view)[0], lambda f: -f)]


@rule("mul", "div")
def _scale(walk: Walk, eqn: JaxprEqn, left: Any, right: Any) -> Any:
    divide = eqn.primitive.name == "div"
    view, factor = (left, right) if isinstance(left, View) else (right, left)
    if isinstance(factor, View) or jnp.ndim(factor) or (divide and view is right):
        return NotImplemented  # not a scalar: the weight is read element by element

    def scale(f: Any) -> Any:
        c = jnp.asarray(factor, f.dtype)
        return f / c if divide else f * c

    return [_scaled(view, walk.bind(eqn, left, right)[0], scale)]


def _scaled(view: View, base: Any, scale: Any) -> View:
    factors = (*view.factors[:1], *(scale(f) for f in view.factors[1:]))
    return View(base, factors, view.roles, view.name)
