"""The rule for lookups: rows of A, then ·B; along a stack axis, the weights of single layers."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora._arrays import accumulator
from jlora.transform._gain import times
from jlora.transform._labeled import AnyArray, contract, expanded
from jlora.transform._probe import Probe
from jlora.transform._registry import rule
from jlora.transform._view import GAIN, RANK, narrowed, plus
from jlora.transform._walk import Walk
from jlora.transform._weight import Operand, Weight


@rule("gather", kind="rearrange")  # or a product with rows of A, which applies the gain
def _gather(walk: Walk, eqn: JaxprEqn, view: Operand, indices: Operand) -> Any:
    if not isinstance(view, Weight) or isinstance(indices, Weight):
        return NotImplemented
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    # An axis whose slice has full size is kept, whatever its start index (from a vmapped
    # dynamic_slice). The index matters only if an out-of-bounds index fills the row.
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
    stays = view.stays(looked_up, several=indices.ndim > 1)
    base = walk.bind(eqn, view, indices, weight=stays)[0]
    kept = iter(k for k in range(len(view.roles)) if k not in gone)
    batch = iter(range(indices.ndim - 1))
    out_labels: list[Any] = [
        ("w", next(kept)) if p in dn.offset_dims else ("n", next(batch)) for p in range(base.ndim)
    ]

    def rows(k: int) -> tuple[Array, list[Any]]:
        # Out of bounds the base has its own fill value: the delta is 0 and the gain is 1.
        return _rows(eqn, view.components[k], view.axes(k), indices, looked_up, fill=int(k == GAIN))

    if stays:
        new = view.new_role if looked_up else view.repeated_role
        roles = [new if kind == "n" else view.roles[k] for kind, k in out_labels]
        components = []
        for f, labels in map(rows, range(len(view.components))):
            order = [p for p in out_labels if p in labels] + [RANK]
            components.append(lax.transpose(f, [labels.index(p) for p in order]))
        return [view.remade(base, components, roles)]

    def updated() -> Array:
        dtype = walk.narrow_dtype(base.dtype, base.dtype)
        (a, la), (b, lb) = rows(0), rows(1)
        # Without a gain the sum is rounded as in a layer, but in float16 each term may overflow.
        rounds = view.gain is None and base.dtype != jnp.float16
        wide = base if rounds else narrowed(base, accumulator(base.dtype))
        out = plus(wide, contract(a.astype(dtype), la, b.astype(dtype), lb, out_labels))
        if view.gain is None:
            return narrowed(out, base.dtype)
        by, labels = rows(GAIN)
        return narrowed(times(out, expanded(by[..., 0], labels[:-1], out_labels)), base.dtype)

    cost, free = 2 * base.size * view.rank, [k for kind, k in out_labels if kind == "w"]
    walk.used(eqn, view, cost, sorted(looked_up), free)
    if isinstance(view, Probe):
        roles = [
            view.new_role if kind == "n" or k in looked_up else view.roles[k]
            for kind, k in out_labels
        ]
        return [view.rows(base, roles)]
    return [updated()]


def _rows(
    eqn: JaxprEqn, f: Array, axes: list[int], indices: AnyArray, looked_up: set[int], fill: int
) -> tuple[Array, list[Any]]:
    """Look up the same indices in one component, along those indexed axes that it has."""
    dn, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
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
        fill_value=fill,
    )
    return rows, [("n", n) for n in range(lead)] + [("w", d) for d in kept] + [RANK]
