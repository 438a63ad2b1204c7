"""Rules for what multiplies: x·(W + s·A·B) becomes x·W + (x·A)·(s·B), whatever is contracted."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType

from jlora._arrays import accumulator
from jlora.transform._registry import rule
from jlora.transform._view import RANK, View, all_names, contract, flops, narrowed, plus, scaled
from jlora.transform._walk import Walk

TOKENS = "tokens"


class Form(NamedTuple):
    """How an activation meets a weight's factors: labels for the axes of all, and the order."""

    x: tuple[Any, ...]
    x_shape: tuple[int, ...]
    factors: tuple[tuple[Any, ...], tuple[Any, ...]]
    first: int
    between: tuple[Any, ...]
    out: tuple[Any, ...]
    dtype: Any
    precision: Any


@functools.partial(jax.jit, static_argnames="form")
def low_rank(base: Any, x: Any, parts: tuple[Any, ...], form: Form) -> Any:
    """Return x·W + (x·A)·(s·B), the base product given.

    A function of its own under jit: layers of one shape share its trace, its derivative and its
    lowering, which is most of what an adapter costs to trace.
    """
    a, b, *s = parts
    pair = [a, scaled(b, s[0]) if s else b]
    one, two = (narrowed(pair[k], form.dtype) for k in (form.first, 1 - form.first))
    x = narrowed(lax.reshape(x, form.x_shape), form.dtype)
    first, second = form.factors[form.first], form.factors[1 - form.first]
    z = narrowed(contract(x, form.x, one, first, form.between, form.precision), form.dtype)
    y = contract(z, form.between, two, second, form.out, form.precision)
    return plus(base, lax.reshape(y, base.shape))


@rule("dot_general", whole=True)
def _dot_general(walk: Walk, eqn: JaxprEqn, lhs: Any, rhs: Any) -> Any:
    lhs, rhs = (x.settled() if isinstance(x, View) and "e" in x.roles else x for x in (lhs, rhs))
    if isinstance(lhs, View) and isinstance(rhs, View):
        both = _of_weights(walk, eqn, lhs.settled(), rhs.settled())
        if both is not NotImplemented:
            return both
        lhs = walk.materialize(eqn, lhs)
    view, x = (lhs, rhs) if isinstance(lhs, View) else (rhs, lhs)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    w_sum, x_sum = (lhs_sum, rhs_sum) if view is lhs else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if view is lhs else (rhs_batch, lhs_batch)
    w_labels = [("w", k) for k in range(view.ndim)]
    x_labels: list[Any] = [("x", k) for k in range(x.ndim)]
    for w_axis, x_axis in zip([*w_sum, *w_batch], [*x_sum, *x_batch], strict=True):
        x_labels[x_axis] = w_labels[w_axis]
    x_free = [k for n, k in enumerate(x_labels) if n not in (*x_sum, *x_batch)]
    w_free = [k for k in range(view.ndim) if k not in (*w_sum, *w_batch)]
    kept = [w_labels[k] for k in w_free]
    out_labels = [w_labels[k] for k in w_batch] + (kept + x_free if view is lhs else x_free + kept)

    out, cost = walk.bind(eqn, lhs, rhs)[0], 0
    if view.parts:
        dtype = walk.narrow_dtype(x.dtype, out.dtype)
        form, cost = _form(x, x_labels, view, w_labels, out_labels, dtype, eqn.params["precision"])
        atom = eqn.invars[1 if view is lhs else 0]
        x = walk.drop(x if walk.key is None else narrowed(x, dtype), atom)
        out = low_rank(out, x, view.parts, form)
    walk.used(eqn, view, cost, w_sum, w_free)
    return [out]


def _form(
    x: Any,
    x_labels: list[Any],
    view: View,
    w_labels: list[Any],
    out_labels: list[Any],
    dtype: Any,
    precision: Any,
) -> tuple[Form, int]:
    """Choose how x meets the two factors, by fewer FLOPs, and count these."""
    labels = [view.labels(k, w_labels) for k in (0, 1)]
    if view.whole:  # B as it lies: (*stack, rank, *out)
        stack = view.roles.count("s")
        labels[1] = [*labels[1][:stack], RANK, *labels[1][stack:-1]]
    sizes = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(w_labels, view.shape, strict=True))
    sizes[RANK] = view.rank
    tokens = [k for k in x_labels if k not in w_labels]
    if len(tokens) > 1 and _adjacent(x_labels, tokens) and _may_merge(x, x_labels, tokens):
        x_labels, out_labels = (_as_one(group, tokens) for group in (x_labels, out_labels))
        sizes[TOKENS] = math.prod(sizes[k] for k in tokens)

    def between(first: int) -> list[Any]:
        needed = {*labels[1 - first], *out_labels}
        made = [*x_labels, *(k for k in labels[first] if k not in x_labels)]
        batch = [k for k in x_labels if k in labels[first] and k in needed]
        return batch + [k for k in made if k in needed and k not in batch]

    def cost(first: int) -> int:
        return flops(sizes, x_labels, labels[first]) + flops(
            sizes, between(first), labels[1 - first]
        )

    first = min((0, 1), key=cost)
    shape = tuple(sizes[k] for k in x_labels)
    factors = (tuple(labels[0]), tuple(labels[1]))
    form = Form(
        *(tuple(x_labels), shape, factors, first, tuple(between(first)), tuple(out_labels)),
        *(jnp.dtype(dtype), precision),
    )
    return form, cost(first)


def _as_one(labels: list[Any], tokens: list[Any]) -> list[Any]:
    """Replace neighboring labels by one.

    Contracting two token axes in the gradient of A would otherwise make XLA transpose and copy
    every saved input.
    """
    first = labels.index(tokens[0])
    return [*labels[:first], TOKENS, *labels[first + len(tokens) :]]


def _adjacent(labels: list[Any], run: list[Any]) -> bool:
    first = labels.index(run[0])
    return labels[first : first + len(run)] == run


def _may_merge(x: Any, labels: list[Any], run: list[Any]) -> bool:
    """Whether merging axes keeps a sharded array where it lies: at most the first is sharded.

    Under automatic sharding only the mesh is known, not what is sharded over it, so nothing merges.
    """
    sharding = jax.typeof(x).sharding
    if any(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return math.prod(sharding.mesh.axis_sizes) == 1
    return all(sharding.spec[labels.index(k)] is None for k in run[1:])


def _of_weights(walk: Walk, eqn: JaxprEqn, lhs: View, rhs: View) -> Any:
    """Multiply two weights: (W + AB)(V + CD) = WV + [WC + A(BC) | A] [D ; BV], again a view."""
    (l_sum, r_sum), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    l_free = [k for k in range(len(lhs.roles)) if k not in (*l_sum, *l_batch)]
    r_free = [k for k in range(len(rhs.roles)) if k not in (*r_sum, *r_batch)]
    base = walk.bind(eqn, lhs, rhs)[0]
    if not lhs.parts:
        walk.used(eqn, lhs, 0, l_free, l_sum)
        walk.used(eqn, rhs, 0, r_sum, r_free)
        return [base]
    inner = [_side(lhs, l_sum, l_batch, l_free), _side(rhs, r_sum, r_batch, r_free)]
    if None in inner:
        return NotImplemented
    ln: list[Any] = [("l", k) for k in range(len(lhs.roles))]
    rn: list[Any] = [("r", k) for k in range(len(rhs.roles))]
    for k, n in zip([*r_sum, *r_batch], [*l_sum, *l_batch], strict=True):
        rn[k] = ln[n]
    batch = [ln[k] for k in l_batch]
    left, right = batch + [ln[k] for k in l_free], batch + [rn[k] for k in r_free]

    def factor(view: View, names: list[Any], k: int, rank: str, out: list[Any]) -> Any:
        f, have = view.factors[k].astype(base.dtype), [*(names[n] for n in view.axes(k)), rank]
        return lax.transpose(f, [have.index(n) for n in [*out, rank]]), [*out, rank]

    summed_axes = batch + [ln[k] for k in l_sum]
    b, bn = factor(lhs, ln, inner[0], "ab", summed_axes)
    a, an = factor(lhs, ln, 1 - inner[0], "ab", left)
    c, cn = factor(rhs, rn, inner[1], "cd", summed_axes)
    d, _ = factor(rhs, rn, 1 - inner[1], "cd", right)
    precision = eqn.params["precision"]
    w, v = (x.base.astype(base.dtype) for x in (lhs, rhs))
    bc = contract(b, bn, c, cn, [*batch, "ab", "cd"], precision).astype(base.dtype)
    wc = contract(w, ln, c, cn, [*left, "cd"], precision) + contract(
        a, an, bc, [*batch, "ab", "cd"], [*left, "cd"], precision
    )
    bv = contract(v, rn, b, bn, [*right, "ab"], precision)
    factors = (
        jnp.concatenate([wc, a.astype(wc.dtype)], -1),
        jnp.concatenate([d.astype(bv.dtype), bv], -1),
    )
    roles = ("s",) * len(batch) + ("i",) * len(l_free) + ("o",) * len(r_free)
    return [View(base, factors, roles, all_names([lhs, rhs]))]


def _side(
    view: View, contracted: Sequence[int], batch: Sequence[int], free: Sequence[int]
) -> int | None:
    """Return the factor that is contracted, where the other one is kept and the stack is batch."""
    roles = [{view.roles[k] for k in group} for group in (batch, contracted, free)]
    if roles[0] - {"s"} or roles[1:] not in ([{"i"}, {"o"}], [{"o"}, {"i"}]):
        return None
    return 0 if roles[1] == {"i"} else 1


@rule("gather")
def _gather(walk: Walk, eqn: JaxprEqn, view: Any, indices: Any) -> Any:
    if not isinstance(view, View) or isinstance(indices, View):
        return NotImplemented
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    # An axis that is taken whole is kept, whatever its start: vmap of dynamic_slice asks so.
    looked_up = {
        *(
            k
            for k in dn.start_index_map
            if sizes[k] != view.shape[k] or k in dn.collapsed_slice_dims
        ),
        *dn.operand_batching_dims,
    }
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    if any(sizes[k] != n for k, n in enumerate(view.shape) if k not in looked_up):
        return NotImplemented
    base = walk.bind(eqn, view, indices)[0]
    kept = iter(k for k in range(len(view.roles)) if k not in gone)
    batch = iter(range(indices.ndim - 1))
    out_labels: list[Any] = [
        ("w", next(kept)) if p in dn.offset_dims else ("n", next(batch)) for p in range(base.ndim)
    ]
    stack_only = all(view.roles[k] == "s" for k in looked_up)
    if stack_only or (not view.parts and indices.ndim == 1):
        roles = [view.new_role if kind == "n" else view.roles[k] for kind, k in out_labels]
        factors = []
        for k in range(len(view.parts)):
            f, labels = _rows(eqn, view, k, indices)
            order = [p for p in out_labels if p in labels] + [RANK]
            factors.append(lax.transpose(f, [labels.index(p) for p in order]))
        return [View(base, tuple(factors), tuple(roles), view.names)]
    cost, out = 0, base
    if view.parts:
        dtype = walk.narrow_dtype(base.dtype, base.dtype)
        (a, la), (b, lb) = (_rows(eqn, view, k, indices) for k in (0, 1))
        out = plus(base, contract(a.astype(dtype), la, b.astype(dtype), lb, out_labels))
        cost = 2 * base.size * a.shape[-1]
    walk.used(eqn, view, cost, sorted(looked_up), [k for kind, k in out_labels if kind == "w"])
    return [out]


def _rows(eqn: JaxprEqn, view: View, k: int, indices: Any) -> tuple[Any, list[Any]]:
    """Look the same indices up in one factor, as far as it has the indexed axes."""
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    f, axes = view.factors[k], view.axes(k)
    columns = [n for n, d in enumerate(dn.start_index_map) if d in axes]
    batching = [
        (axes.index(d), n)
        for d, n in zip(dn.operand_batching_dims, dn.start_indices_batching_dims, strict=True)
        if d in axes
    ]
    if not columns and not batching:
        return f, [("w", d) for d in axes] + [RANK]
    collapsed = [axes.index(d) for d in dn.collapsed_slice_dims if d in axes]
    kept = [d for d in axes if d not in (*dn.collapsed_slice_dims, *dn.operand_batching_dims)]
    lead = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(lead, lead + len(kept) + 1)),
        collapsed_slice_dims=tuple(collapsed),
        start_index_map=tuple(axes.index(dn.start_index_map[n]) for n in columns),
        operand_batching_dims=tuple(d for d, _ in batching),
        start_indices_batching_dims=tuple(n for _, n in batching),
    )
    rows = lax.gather(
        f,
        jnp.take(indices, jnp.asarray(columns, jnp.int32), axis=-1)
        if len(columns) != indices.shape[-1]
        else indices,
        numbers,
        slice_sizes=(*(sizes[d] for d in axes), f.shape[-1]),
        mode=eqn.params["mode"],
        fill_value=0,  # out of bounds the base has its own fill, and the delta adds nothing
    )
    return rows, [("n", n) for n in range(lead)] + [("w", d) for d in kept] + [RANK]


@rule("ragged_dot_general")
def _ragged_dot(walk: Walk, eqn: JaxprEqn, x: Any, view: Any, group_sizes: Any) -> Any:
    dn = eqn.params["ragged_dot_dimension_numbers"]
    if not isinstance(view, View) or isinstance(x, View):
        return NotImplemented
    (x_sum, w_sum), (x_batch, w_batch) = dn.dot_dimension_numbers
    groups, ragged = [*dn.rhs_group_dimensions], [*dn.lhs_ragged_dimensions]
    if not groups or set(ragged) & {*x_sum, *x_batch}:
        return NotImplemented
    free = [k for k in range(len(view.roles)) if k not in (*w_sum, *w_batch, *groups)]
    base = walk.bind(eqn, x, view, group_sizes)[0]
    cost, out = 0, base
    if view.parts:
        sides = {view.roles[k] for k in w_sum}, {view.roles[k] for k in free}
        stacks = {view.roles[k] for k in (*groups, *w_batch)}
        if stacks != {"s"} or sides not in (({"i"}, {"o"}), ({"o"}, {"i"})):
            return NotImplemented
        first = 0 if sides[0] == {"i"} else 1
        dtype = walk.narrow_dtype(x.dtype, base.dtype)
        axes = view.axes(first)
        numbers = ((x_sum, _at(axes, w_sum)), (x_batch, _at(axes, w_batch)))
        z = _ragged(
            eqn,
            walk.drop(x.astype(dtype), eqn.invars[0]),
            view.factors[first].astype(dtype),
            group_sizes,
            numbers,
            ragged,
            _at(axes, groups),
        )
        x_free = [k for k in range(x.ndim) if k not in (*x_sum, *x_batch)]
        row = len(x_batch) + x_free.index(ragged[0])
        axes = view.axes(1 - first)
        batch = list(range(len(x_batch)))
        numbers = (([z.ndim - 1], [len(axes)]), (batch, _at(axes, w_batch)))
        out = plus(
            base,
            _ragged(
                eqn,
                z.astype(dtype),
                view.factors[1 - first].astype(dtype),
                group_sizes,
                numbers,
                [row],
                _at(axes, groups),
            ),
        )
        rank = view.rank
        cost = 2 * rank * (x.size + base.size)
    walk.used(eqn, view, cost, w_sum, free)
    return [out]


def _at(axes: list[int], wanted: Sequence[int]) -> list[int]:
    return [axes.index(k) for k in wanted]


def _ragged(
    eqn: JaxprEqn, x: Any, w: Any, group_sizes: Any, numbers: Any, ragged: Any, groups: Any
) -> Any:
    return lax.ragged_dot_general(
        x,
        w,
        group_sizes,
        lax.RaggedDotDimensionNumbers(numbers, ragged, groups),
        precision=eqn.params["precision"],
        preferred_element_type=accumulator(x.dtype),
        group_offset=eqn.params["group_offset"],
    )
