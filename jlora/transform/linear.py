"""Rules for what multiplies: x·(W + s·A·B) becomes x·W + (x·s·A)·B, whatever is contracted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora.transform._form import choose, low_rank
from jlora.transform._gain import multiplied, placed
from jlora.transform._labeled import contract
from jlora.transform._registry import rule
from jlora.transform._view import RANK, View, all_names
from jlora.transform._walk import Walk


@rule("dot_general", whole=True, gain=True)
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

    gain = placed(view, w_labels, x_labels, out_labels)
    if gain is None:
        return NotImplemented
    result: Any = eqn.outvars[0].aval
    dtype = walk.narrow_dtype(jnp.result_type(x), result.dtype)
    form, cost = None, 0
    if view.parts:
        sizes = (*zip(w_labels, view.shape, strict=True), (RANK, view.rank))
        labels = (tuple(x_labels), _factor_labels(view, w_labels), tuple(out_labels))
        form, cost = choose(jax.typeof(x), sizes, *labels, dtype, eqn.params["precision"])

    def product(x: Any) -> Any:
        return walk.bind(eqn, *((view, x) if view is lhs else (x, view)))[0]

    def updated(base: Any, x: Any) -> Any:
        return base if form is None else low_rank(base, x, view.parts, form)

    atom = eqn.invars[1 if view is lhs else 0]
    out = multiplied(walk, atom, x, gain, dtype, product, updated)
    walk.used(eqn, view, cost, w_sum, w_free)
    return [out]


def _factor_labels(view: View, w_labels: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    a, b = (view.labels(k, w_labels) for k in (0, 1))
    if view.whole:  # B as it lies: (*stack, rank, *out)
        stack = view.roles.count("s")
        b = [*b[:stack], RANK, *b[stack:-1]]
    return tuple(a), tuple(b)


def _of_weights(walk: Walk, eqn: JaxprEqn, lhs: View, rhs: View) -> Any:
    """Multiply two weights: (W + AB)(V + CD) = WV + [WC + A(BC) | A] [D ; BV], again a view."""
    if lhs.gain is not None or rhs.gain is not None:
        return NotImplemented
    (l_sum, r_sum), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    l_free = [k for k in range(len(lhs.roles)) if k not in (*l_sum, *l_batch)]
    r_free = [k for k in range(len(rhs.roles)) if k not in (*r_sum, *r_batch)]
    base = walk.bind(eqn, lhs, rhs)[0]
    if not lhs.parts:
        walk.used(eqn, lhs, 0, l_free, l_sum)
        walk.used(eqn, rhs, 0, r_sum, r_free)
        return [base]
    l_side = _side(lhs, l_sum, l_batch, l_free)
    r_side = _side(rhs, r_sum, r_batch, r_free)
    if l_side is None or r_side is None:
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
    b, bn = factor(lhs, ln, l_side, "ab", summed_axes)
    a, an = factor(lhs, ln, 1 - l_side, "ab", left)
    c, cn = factor(rhs, rn, r_side, "cd", summed_axes)
    d, _ = factor(rhs, rn, 1 - r_side, "cd", right)
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
