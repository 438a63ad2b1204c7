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

from jlora.transform._gain import multiplied, placed
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
        form, cost = _form(jax.typeof(x), sizes, *labels, dtype, eqn.params["precision"])

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


@functools.lru_cache(1024)  # layers of one shape share it
def _form(
    x: Any,
    weight_sizes: tuple[tuple[Any, int], ...],
    x_labels: tuple[Any, ...],
    labels: tuple[tuple[Any, ...], tuple[Any, ...]],
    out_labels: tuple[Any, ...],
    dtype: Any,
    precision: Any,
) -> tuple[Form, int]:
    """Choose how x (its type is given) meets the two factors, by fewer FLOPs, and count these."""
    sizes = dict(weight_sizes)
    tokens = [k for k in x_labels if k not in sizes]
    sizes |= dict(zip(x_labels, x.shape, strict=True))
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
    order = (first, tuple(between(first)), out_labels)
    return Form(x_labels, shape, labels, *order, jnp.dtype(dtype), precision), cost(first)


def _as_one(labels: tuple[Any, ...], tokens: list[Any]) -> tuple[Any, ...]:
    """Replace neighboring labels by one.

    Contracting two token axes in the gradient of A would otherwise make XLA transpose and copy
    every saved input.
    """
    first = labels.index(tokens[0])
    return (*labels[:first], TOKENS, *labels[first + len(tokens) :])


def _adjacent(labels: tuple[Any, ...], run: list[Any]) -> bool:
    first = labels.index(run[0])
    return labels[first : first + len(run)] == tuple(run)


def _may_merge(x: Any, labels: tuple[Any, ...], run: list[Any]) -> bool:
    """Whether merging axes keeps a sharded array where it lies: at most the first is sharded.

    Under automatic sharding only the mesh is known, not what is sharded over it, so nothing merges.
    """
    sharding = x.sharding
    if any(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return math.prod(sharding.mesh.axis_sizes) == 1
    return all(sharding.spec[labels.index(k)] is None for k in run[1:])


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
