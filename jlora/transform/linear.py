"""The rule for `dot_general`: x·(W + s·A·B) becomes x·W + (x·s·A)·B for any contraction."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora import _base
from jlora.transform._inputs import Sums, of_dot
from jlora.transform._labeled import AnyArray, Label, contract
from jlora.transform._product import product
from jlora.transform._registry import rule
from jlora.transform._view import View
from jlora.transform._walk import Walk
from jlora.transform._weight import Operand, Weight, all_names


def _sums(eqn: JaxprEqn, lhs: Operand, rhs: Operand) -> Sums | None:
    return of_dot(eqn.params["dimension_numbers"], lhs, rhs)


@rule("dot_general", kind="product", own=True, sums=_sums)
def _dot_general(walk: Walk, eqn: JaxprEqn, lhs: Operand, rhs: Operand) -> Any:
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        both = _of_weights(walk, eqn, lhs.settled(), rhs.settled())
        if both is not NotImplemented:
            return both
    numbers, precision = eqn.params["dimension_numbers"], eqn.params["precision"]
    return product(walk, eqn, (lhs, rhs), numbers, precision=precision)


def _of_weights(walk: Walk, eqn: JaxprEqn, lhs: Weight, rhs: Weight) -> Any:
    """Multiply two weights into a view: (W + AB)(V + CD) = WV + [WC + A(BC) | A] [D ; BV]."""
    if lhs.gain is not None or rhs.gain is not None:
        return NotImplemented
    (l_sum, r_sum), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    l_free = [k for k in range(len(lhs.roles)) if k not in (*l_sum, *l_batch)]
    r_free = [k for k in range(len(rhs.roles)) if k not in (*r_sum, *r_batch)]
    if not isinstance(lhs, View) or not isinstance(rhs, View):
        walk.used(eqn, lhs, 0, l_free, l_sum)
        walk.used(eqn, rhs, 0, r_sum, r_free)
        return walk.bind(eqn, lhs, rhs)
    l_side = _side(lhs, l_sum, l_batch, l_free)
    r_side = _side(rhs, r_sum, r_batch, r_free)
    if l_side is None or r_side is None:
        return NotImplemented
    base = walk.bind(eqn, lhs, rhs)[0]
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
    b, bn = factor(lhs, ln, l_side, "ab", summed_axes)
    a, an = factor(lhs, ln, 1 - l_side, "ab", left)
    c, cn = factor(rhs, rn, r_side, "cd", summed_axes)
    d, _ = factor(rhs, rn, 1 - r_side, "cd", right)
    precision = eqn.params["precision"]
    bc = contract(b, bn, c, cn, [*batch, "ab", "cd"], precision).astype(base.dtype)

    def times(
        view: View, names: list[Label], f: Array, labels: list[Label], out: list[Label]
    ) -> Array:
        def product(w: AnyArray, f: Array) -> Array:
            return contract(w.astype(base.dtype), names, f, labels, out, precision)

        return _base.using(product, view.base, f)

    wc = times(lhs, ln, c, cn, [*left, "cd"]) + contract(
        a, an, bc, [*batch, "ab", "cd"], [*left, "cd"], precision
    )
    bv = times(rhs, rn, b, bn, [*right, "ab"])
    factors = (
        jnp.concatenate([wc, a.astype(wc.dtype)], -1),
        jnp.concatenate([d.astype(bv.dtype), bv], -1),
    )
    roles = ("s",) * len(batch) + ("i",) * len(l_free) + ("o",) * len(r_free)
    return [View(base, factors, roles, all_names([lhs, rhs]))]


def _side(
    view: View, contracted: Sequence[int], batch: Sequence[int], free: Sequence[int]
) -> int | None:
    """Return the factor that is contracted if all else is kept or, for the stack, batch."""
    roles = [{view.roles[k] for k in group} for group in (batch, contracted, free)]
    if roles[0] - {"s"} or roles[1:] not in ([{"i"}, {"o"}], [{"o"}, {"i"}]):
        return None
    return 0 if roles[1] == {"i"} else 1
