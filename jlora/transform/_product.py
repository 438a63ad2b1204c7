"""The product of an activation and a weight, for any primitive that computes one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora._paths import brief
from jlora.transform._form import choose, low_rank
from jlora.transform._gain import multiplied, placed
from jlora.transform._labeled import AnyArray, Labels
from jlora.transform._view import RANK, View
from jlora.transform._walk import Walk
from jlora.transform._weight import Operand, Weight
from jlora.transform._wide import bound


def product(
    walk: Walk,
    eqn: JaxprEqn,
    operands: Sequence[Operand],
    dimension_numbers: lax.DotDimensionNumbers,
    *,
    at: tuple[int, int] = (0, 1),
    precision: lax.PrecisionLike = None,
) -> Any:
    """Apply an equation that multiplies two of its operands: x·W becomes x·W + (x·s·A)·B.

    Use it in the rule for a custom kernel that computes what `jax.lax.dot_general` does. The kernel
    runs on the base weight. Dropout, the dtype of the narrow products, DoRA's gain, `jlora.layouts`
    and `jlora.explain` work as for `dot_general`.

    Args:
        walk: the walk that the rule was called with.
        eqn: the equation that the rule was called with.
        operands: its operands. If both factors are weights, the first is materialized.
        dimension_numbers: for the two factors, as in `jax.lax.dot_general`:
            `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`.
        at: the positions of the left and right factor in `operands`.
        precision: for the narrow products, as in `jax.lax.dot_general`.

    Returns:
        A list with the equation's output; NotImplemented if no factored form exists.

    Raises:
        TypeError: `walk` and `eqn` are not those of a rule.

    Example:
        >>> import jlora
        >>> @jlora.transform.rule("example_of_x_times_w_transposed", kind="product")
        ... def example(walk, eqn, x, w):
        ...     return jlora.transform.product(walk, eqn, (x, w), (((1,), (1,)), ((), ())))
    """
    if not (isinstance(walk, Walk) and isinstance(eqn, JaxprEqn)):
        raise TypeError(
            f"`jlora.transform.product(walk, eqn, ...)`: got {brief(walk)} and {brief(eqn)}. Call "
            "it in a rule, with the `walk` and `eqn` of the rule: see `jlora.transform.rule`."
        )
    operands, (lhs, rhs) = list(operands), (operands[k] for k in at)
    left = not isinstance(rhs, Weight)
    view, x, where = (lhs, rhs, at[1]) if left else (rhs, lhs, at[0])
    if not isinstance(view, Weight):
        return NotImplemented
    if view.repeated_role in view.roles:
        view = view.settled()
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    w_sum, x_sum = (lhs_sum, rhs_sum) if left else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if left else (rhs_batch, lhs_batch)
    w_labels = [("w", k) for k in range(view.ndim)]
    x_labels: list[Any] = [("x", k) for k in range(x.ndim)]
    for w_axis, x_axis in zip([*w_sum, *w_batch], [*x_sum, *x_batch], strict=True):
        x_labels[x_axis] = w_labels[w_axis]
    x_free = [k for n, k in enumerate(x_labels) if n not in (*x_sum, *x_batch)]
    w_free = [k for k in range(view.ndim) if k not in (*w_sum, *w_batch)]
    kept = [w_labels[k] for k in w_free]
    out_labels = [w_labels[k] for k in w_batch] + (kept + x_free if left else x_free + kept)

    gain = placed(view, w_labels, x_labels, out_labels)
    if gain is None:
        return NotImplemented
    if isinstance(x, Weight):
        x = walk.materialize(eqn, x)
    result: Any = eqn.outvars[0].aval
    dtype = walk.narrow_dtype(jnp.result_type(x), result.dtype)
    form: Any = None
    cost = 0
    if isinstance(view, View):
        sizes = (*zip(w_labels, view.shape, strict=True), (RANK, view.rank))
        labels = (tuple(x_labels), _factor_labels(view, w_labels), tuple(out_labels))
        form, cost = choose(jax.typeof(x), sizes, *labels, dtype, precision)

    def of_base(x: AnyArray) -> Array:
        return bound(walk, eqn, *operands[:where], x, *operands[where + 1 :])

    def updated(view: View, base: Array, x: AnyArray) -> Array:
        if walk.settings.mix is not None:
            axes = dict(zip(x_labels, x.shape, strict=True))
            return walk.settings.mix.updated(form, tuple(x_free), view, base, x, axes)
        return low_rank(base, x, view.parts, form)

    out = multiplied(walk, eqn, where, view, x, gain, dtype, of_base, updated)
    walk.used(eqn, view, cost, w_sum, w_free)
    return [out]


def _factor_labels(view: View, w_labels: Sequence[Any]) -> tuple[Labels, Labels]:
    a, b = (view.labels(k, w_labels) for k in (0, 1))
    if view.own:  # B as it is stored: (*stack, rank, *out)
        stack = view.roles.count("s")
        b = [*b[:stack], RANK, *b[stack:-1]]
    return tuple(a), tuple(b)
