"""The rule for lookups: rows of A, then B; or, along a stack, whole weights."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora._arrays import accumulator
from jlora.transform._gain import times
from jlora.transform._labeled import contract, spread
from jlora.transform._registry import rule
from jlora.transform._view import GAIN, RANK, View, narrowed, plus
from jlora.transform._walk import Walk


@rule("gather", gain=True)
def _gather(walk: Walk, eqn: JaxprEqn, view: Any, indices: Any) -> Any:
    if not isinstance(view, View) or isinstance(indices, View):
        return NotImplemented
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    # An axis that is taken whole is kept, wherever it would start: vmap of dynamic_slice asks so.
    # Only where an index out of bounds fills the row does it matter.
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    looked_up = {
        *(
            k
            for k in dn.start_index_map
            if fills or sizes[k] != view.shape[k] or k in dn.collapsed_slice_dims
        ),
        *dn.operand_batching_dims,
    }
    gone = {*dn.collapsed_slice_dims, *dn.operand_batching_dims}
    fill = eqn.params["fill_value"]
    if view.gain is not None and fills and fill is not None and not math.isnan(fill):
        return NotImplemented  # the gain would scale the fill
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
        repeated = view.new_role if looked_up or not view.parts else "e"
        roles = [repeated if kind == "n" else view.roles[k] for kind, k in out_labels]
        laid = []
        for k in range(len(view.laid)):
            f, labels = _rows(eqn, view, k, indices, looked_up)
            order = [p for p in out_labels if p in labels] + [RANK]
            laid.append(lax.transpose(f, [labels.index(p) for p in order]))
        return [view.remade(base, laid, roles)]
    cost, out = 0, base
    if view.parts:
        dtype = walk.narrow_dtype(base.dtype, base.dtype)
        (a, la), (b, lb) = (_rows(eqn, view, k, indices, looked_up) for k in (0, 1))
        wide = base if view.gain is None else narrowed(base, accumulator(base.dtype))
        out = plus(wide, contract(a.astype(dtype), la, b.astype(dtype), lb, out_labels))
        cost = 2 * base.size * a.shape[-1]
        if view.gain is not None:
            by, labels = _rows(eqn, view, GAIN, indices, looked_up)
            out = narrowed(times(out, spread(by[..., 0], labels[:-1], out_labels)), base.dtype)
    walk.used(eqn, view, cost, sorted(looked_up), [k for kind, k in out_labels if kind == "w"])
    return [out]


def _rows(
    eqn: JaxprEqn, view: View, k: int, indices: Any, looked_up: set[int]
) -> tuple[Any, list[Any]]:
    """Look the same indices up in one factor, as far as it has the indexed axes."""
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    f, axes = view.laid[k], view.axes(k)
    columns = [n for n, d in enumerate(dn.start_index_map) if d in axes and d in looked_up]
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
        # Out of bounds the base has its own fill: the delta adds nothing, and the gain is 1.
        fill_value=int(k == GAIN),
    )
    return rows, [("n", n) for n in range(lead)] + [("w", d) for d in kept] + [RANK]
