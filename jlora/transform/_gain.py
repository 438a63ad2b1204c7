"""What a product does with DoRA's gain: it scales the outputs, or the inputs where it meets them.

x·(g ∘ V) is g ∘ (x·V) where the outputs are kept, and (x ∘ g)·V where they are contracted, as a
tied head does; never a scaled copy of the weight.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jlora._arrays import accumulator
from jlora.transform._labeled import expanded
from jlora.transform._view import GAIN, View, narrowed
from jlora.transform._walk import Walk
from jlora.transform._weight import Weight


class Gain(NamedTuple):
    """The factors of x and of the result, arranged to broadcast; None for none."""

    before: Any = None
    after: Any = None


NONE = Gain()


def times(x: Any, gain: Any) -> Any:
    """Multiply in float32 or wider; None multiplies by nothing."""
    if gain is None:
        return x
    wide = accumulator(x.dtype)
    return narrowed(narrowed(x, wide) * narrowed(gain, wide), x.dtype)


def _inexact(x: Any, dtype: Any) -> Any:
    """Return what dropout can divide: integers as `dtype`."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else narrowed(x, dtype)


def placed(
    weight: Weight, w_labels: Sequence[Any], x_labels: Sequence[Any], out_labels: Sequence[Any]
) -> Gain | None:
    """Find where a view's gain goes, given the labels of the axes of all; None if nowhere."""
    if not isinstance(weight, View) or weight.gain is None:
        return NONE
    view = weight
    short = [n for n, k in enumerate(view.axes(GAIN)) if view.shape[k] == 1]
    labels = [w_labels[k] for k in view.axes(GAIN) if view.shape[k] != 1]
    gain = lax.squeeze(view.gain, [*short, view.gain.ndim - 1])
    if set(labels) <= set(out_labels):
        return Gain(after=expanded(gain, labels, out_labels))
    if set(labels) <= set(x_labels):
        return Gain(before=expanded(gain, labels, x_labels))
    return None


def multiplied(
    walk: Walk,
    weight: Weight,
    atom: Any,
    x: Any,
    gain: Gain,
    dtype: Any,
    product: Callable[[Any], Any],
    updated: Callable[[View, Any, Any], Any],
) -> Any:
    """Return x·(g ∘ V), given `product(x) = x·W` and `updated(weight, x·W, x) = x·V`.

    Here V = W + s·A·B. Without a gain, return x·W + x̃·(s·A·B), where dropout drops x, the value of
    `atom`, to x̃ of `dtype`.
    With one, x·W + x̃·(g ∘ V - W), as in PEFT: what the gain changes of the base product is an
    update too, so it sees the dropped input, at the cost of a product. Between the sum and the gain
    nothing is rounded.
    """
    if not isinstance(weight, View):  # a probe has no update
        return product(x)
    view = weight
    if gain is NONE:
        out = product(x)
        return updated(view, out, x if walk.key is None else walk.drop(narrowed(x, dtype), atom))

    def scaled_product(x: Any) -> tuple[Any, Any]:
        x = times(x, gain.before)
        out = product(x)
        wide = out if gain.after is None else narrowed(out, accumulator(out.dtype))
        return times(updated(view, wide, x), gain.after), out.dtype

    if walk.key is None:
        return narrowed(*scaled_product(x))
    out, dropped = product(x), walk.drop(_inexact(x, dtype), atom)
    wide = accumulator(out.dtype)
    full, base = (y.astype(wide) for y in (scaled_product(dropped)[0], product(dropped)))
    return narrowed(out.astype(wide) + (full - base), out.dtype)
