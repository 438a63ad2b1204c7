"""Rules for what multiplies: x·(W + s·A·B) becomes x·W + (x·A)·(s·B), whatever is contracted."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora._arrays import accumulator
from jlora.transform._registry import rule
from jlora.transform._view import RANK, View, contract, flops
from jlora.transform._walk import Walk


def _plus(base: Any, delta: Any) -> Any:
    """Add the delta in the base output's dtype: a bfloat16 layer stays bfloat16."""
    return base + delta.astype(base.dtype)


@rule("dot_general")
def _dot_general(walk: Walk, eqn: JaxprEqn, lhs: Any, rhs: Any) -> Any:
    if isinstance(lhs, View) and isinstance(rhs, View):
        lhs = walk.materialize(eqn, lhs)
    view, x = (lhs, rhs) if isinstance(lhs, View) else (rhs, lhs)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    w_sum, x_sum = (lhs_sum, rhs_sum) if view is lhs else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if view is lhs else (rhs_batch, lhs_batch)
    w_labels = [("w", k) for k in range(len(view.roles))]
    x_labels: list[Any] = [("x", k) for k in range(x.ndim)]
    for w_axis, x_axis in zip([*w_sum, *w_batch], [*x_sum, *x_batch], strict=True):
        x_labels[x_axis] = w_labels[w_axis]
    shared = {*w_sum, *w_batch}
    x_free = [k for n, k in enumerate(x_labels) if n not in (*x_sum, *x_batch)]
    w_free = [k for n, k in enumerate(w_labels) if n not in shared]
    batch = [w_labels[k] for k in w_batch]
    out_labels = batch + (w_free + x_free if view is lhs else x_free + w_free)

    base = walk.bind(eqn, lhs, rhs)[0]
    cost = 0
    out = base
    if view.factors:
        delta, cost = _product(
            walk, x, x_labels, view, w_labels, out_labels, eqn.params["precision"], base.dtype
        )
        out = _plus(base, delta)
    walk.used(eqn, view, cost, w_sum, [k for k in range(len(w_labels)) if k not in shared])
    return [out]


def _product(
    walk: Walk,
    x: Any,
    x_labels: Sequence[Any],
    view: View,
    w_labels: Sequence[Any],
    out_labels: Sequence[Any],
    precision: Any,
    out_dtype: Any,
) -> tuple[Any, int]:
    """Contract x with one factor, then with the other, in the order of fewer FLOPs."""
    dtype = walk.narrow_dtype(x.dtype, out_dtype)
    labels = [view.labels(k, w_labels) for k in (0, 1)]
    sizes = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(w_labels, view.shape, strict=True))
    sizes[RANK] = view.factors[0].shape[-1]

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
    x = walk.drop(x.astype(dtype))
    one, two = view.factors[first].astype(dtype), view.factors[1 - first].astype(dtype)
    z_labels = between(first)
    z = contract(x, x_labels, one, labels[first], z_labels, precision).astype(dtype)
    y = contract(z, z_labels, two, labels[1 - first], out_labels, precision)
    return y, cost(first)


@rule("gather")
def _gather(walk: Walk, eqn: JaxprEqn, view: Any, indices: Any) -> Any:
    if not isinstance(view, View) or isinstance(indices, View):
        return NotImplemented
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked_up = {*dn.start_index_map, *dn.operand_batching_dims}
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
    if stack_only or (not view.factors and indices.ndim == 1):
        roles = ["s" if kind == "n" else view.roles[k] for kind, k in out_labels]
        factors = []
        for k in range(len(view.factors)):
            f, labels = _rows(eqn, view, k, indices)
            order = [p for p in out_labels if p in labels] + [RANK]
            factors.append(lax.transpose(f, [labels.index(p) for p in order]))
        return [View(base, tuple(factors), tuple(roles), view.name)]
    cost, out = 0, base
    if view.factors:
        dtype = walk.narrow_dtype(base.dtype, base.dtype)
        (a, la), (b, lb) = (_rows(eqn, view, k, indices) for k in (0, 1))
        out = _plus(base, contract(a.astype(dtype), la, b.astype(dtype), lb, out_labels))
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


@rule("conv_general_dilated")
def _conv(walk: Walk, eqn: JaxprEqn, lhs: Any, view: Any) -> Any:
    if not isinstance(view, View):
        return NotImplemented
    if isinstance(lhs, View):
        lhs = walk.materialize(eqn, lhs)
    p = eqn.params
    out_axis, in_axis, *spatial = p["dimension_numbers"].rhs_spec
    base = walk.bind(eqn, lhs, view)[0]
    cost, out = 0, base
    if view.factors:
        delta = _narrow_conv(walk, eqn, lhs, view, base)
        if delta is NotImplemented:
            return NotImplemented
        out = _plus(base, delta)
        window = math.prod(view.shape) // view.shape[out_axis]
        rank = view.factors[0].shape[-1]
        cost = 2 * base.size // view.shape[out_axis] * rank * (window + view.shape[out_axis])
    walk.used(eqn, view, cost, [in_axis, *spatial], [out_axis])
    return [out]


def _narrow_conv(walk: Walk, eqn: JaxprEqn, x: Any, view: View, base: Any) -> Any:
    """Convolve with the factor that has the window, and multiply by the other at each position."""
    p, dn = eqn.params, eqn.params["dimension_numbers"]
    out_axis, in_axis, *spatial = dn.rhs_spec
    stacked = any(n > 1 and r == "s" for n, r in zip(view.shape, view.roles, strict=True))
    side = {k: "io".index(r) for k, r in enumerate(view.roles) if r != "s"}
    windows = {side[k] for k in spatial if view.shape[k] > 1} or {side.get(in_axis, 0)}
    groups = p["feature_group_count"]
    if stacked or len(windows) > 1 or p["batch_group_count"] > 1 or len(side) < len(view.roles):
        return NotImplemented
    window = windows.pop()
    if side[out_axis] != 1 - side[in_axis] or (window != side[in_axis] and groups > 1):
        return NotImplemented
    dtype = walk.narrow_dtype(x.dtype, base.dtype)
    x = walk.drop(x.astype(dtype))
    # Where the rank stands in the narrow kernel: for the outputs or, where the inputs are narrowed
    # first (as in a transposed kernel), for the inputs.
    replaced = out_axis if window == side[in_axis] else in_axis
    kernel = _with_rank_at(view, window, replaced).astype(dtype)
    other = view.factors[1 - window].astype(dtype)
    other = other.reshape(-1, other.shape[-1])  # (channels, rank): spatial axes of size 1 fall away
    if replaced == in_axis:
        feature = dn.lhs_spec[1]
        labels: list[Any] = [("x", k) for k in range(x.ndim)]
        narrow = [RANK if k == feature else label for k, label in enumerate(labels)]
        x = contract(x, labels, other, [labels[feature], RANK], narrow, p["precision"])
        return _convolve(eqn, x.astype(dtype), kernel, 1)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    z = _convolve(eqn, x, kernel, groups).astype(dtype)
    feature = dn.out_spec[1]
    rank, channels = other.shape[-1], other.shape[0]
    z = z.reshape(*z.shape[:feature], groups, rank, *z.shape[feature + 1 :])
    other = other.reshape(groups, channels // groups, rank)
    labels = [("x", k) for k in range(z.ndim)]
    labels[feature : feature + 2] = ["group", RANK]
    wide = [*labels[: feature + 1], "channel", *labels[feature + 2 :]]
    y = contract(z, labels, other, ["group", "channel", RANK], wide, p["precision"])
    return y.reshape(base.shape)


def _with_rank_at(view: View, k: int, axis: int) -> Any:
    """Arrange a factor as a kernel of the base's rank, with the rank of the update at one axis."""
    f, axes = view.factors[k], view.axes(k)
    for missing in range(len(view.roles)):
        if missing != axis and missing not in axes:  # a window of size 1 on the other side
            axes = sorted([*axes, missing])
            f = jnp.expand_dims(f, axes.index(missing))
    return jnp.moveaxis(f if axis not in axes else f.squeeze(axes.index(axis)), -1, axis)


def _convolve(eqn: JaxprEqn, x: Any, kernel: Any, groups: int) -> Any:
    p = eqn.params
    return lax.conv_general_dilated(
        x,
        kernel,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        p["dimension_numbers"],
        feature_group_count=groups,
        precision=p["precision"],
        preferred_element_type=accumulator(x.dtype),
    )


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
    if view.factors:
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
            walk.drop(x.astype(dtype)),
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
        out = _plus(
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
        rank = view.factors[0].shape[-1]
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
