"""The rule for ragged products: rows grouped by expert meet that expert's A, then its B."""

from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend.core import JaxprEqn

from jlora._arrays import accumulator
from jlora.transform._registry import rule
from jlora.transform._view import View, plus
from jlora.transform._walk import Walk


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
