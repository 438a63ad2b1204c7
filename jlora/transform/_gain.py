"""DoRA's gain in a product: it scales the outputs or, where those are contracted, the inputs.

x·(g ∘ V) is g ∘ (x·V) where V's outputs are kept, and (x ∘ g)·V where they are contracted, as in a
tied head. The weight itself is never scaled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn, Var
from jax.typing import DTypeLike

from jlora import _compat
from jlora._arrays import accumulator
from jlora.transform._labeled import AnyArray, Label, expanded
from jlora.transform._view import GAIN, View, narrowed
from jlora.transform._walk import Walk
from jlora.transform._weight import Weight


class Gain(NamedTuple):
    """What x and the result are multiplied by, shaped to broadcast; None for nothing."""

    before: Any = None
    after: Any = None


NONE = Gain()


def times(x: AnyArray, gain: AnyArray | None) -> Any:
    """Multiply in float32 or wider; return `x` if the gain is None."""
    if gain is None:
        return x
    wide = accumulator(x.dtype)
    gain = _compat.sharded_like(gain, x) if jnp.ndim(gain) else gain
    return narrowed(narrowed(x, wide) * narrowed(gain, wide), x.dtype)


def _inexact(x: AnyArray, dtype: DTypeLike) -> Any:
    """Cast integers to `dtype`, since dropout divides."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else narrowed(x, dtype)


def _before(x: AnyArray, gain: Gain) -> tuple[Any, Any]:
    """Scale an input by its gain; return what is left for the result.

    In float16 the scaled input may overflow, so a gain above 1 is divided by its maximum.
    """
    if gain.before is None or x.dtype != jnp.float16:
        return times(x, gain.before), gain.after
    most = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(gain.before)), 1.0))
    return times(x, gain.before / most), most


def _read_apart(walk: Walk, atom: Any, x: AnyArray) -> AnyArray:
    """Return x, the value of `atom`, as all updates read it: their gradients for it are one sum.

    With the outputs of q, k and v over an axis of a mesh, each device has a part of the sum that
    dq Wqᵀ is. XLA adds the parts of q, k and v and reduces the sum over devices once, but only if
    nothing complete is added between them. That of an update, (dq Bqᵀ) Aqᵀ, is complete: what is
    reduced there is dq Bqᵀ, with r columns.
    """
    if not (isinstance(atom, Var) and jnp.issubdtype(x.dtype, jnp.inexact)):
        return x
    if atom not in walk.apart or walk.apart[atom][0] is not x:
        walk.apart[atom] = x, _apart(x)
    return walk.apart[atom][1]


@jax.custom_jvp
def _apart(x: AnyArray) -> Any:
    return x


@_apart.defjvp
def _(at: tuple[AnyArray], along: tuple[Array]) -> tuple[AnyArray, Array]:
    return at[0], jnp.copy(along[0])  # an equation, after which the transposed program adds


def placed(
    weight: Weight,
    w_labels: Sequence[Label],
    x_labels: Sequence[Label],
    out_labels: Sequence[Label],
) -> Gain | None:
    """Return where a weight's gain is applied, given the axes' labels; None if it cannot be."""
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
    eqn: JaxprEqn,
    at: int,
    weight: Weight,
    x: AnyArray,
    gain: Gain,
    dtype: DTypeLike,
    product: Callable[[Any], Any],
    updated: Callable[[View, Any, Any], Any],
) -> Array:
    """Return x·(g ∘ V), given `product(x) = x·W` and `updated(weight, x·W, x) = x·V`.

    Here V = W + s·A·B, and x is operand `at` of `eqn`. Without a gain, return x·W + x̃·(s·A·B),
    where x̃ is x after dropout, in `dtype`. With a gain, return x·W + x̃·(g ∘ V - W), as PEFT does:
    the change that the gain makes to the base product is part of the update, so it uses the dropped
    input, which costs one more product. The sum is not rounded before the gain is applied.
    """
    if not isinstance(weight, View):  # a probe has no update
        return product(x)
    view, atom = weight, eqn.invars[at]
    result: Any = eqn.outvars[0].aval
    on_mesh = any(map(_compat.is_distributed, (x, view.parts[0])))
    of_update = _read_apart(walk, atom, x) if on_mesh else x
    if gain is NONE:
        out = product(x)
        dropped = of_update if walk.key is None else walk.drop(narrowed(of_update, dtype), atom)
        return narrowed(updated(view, out, dropped), result.dtype)

    def scaled_product(x: AnyArray, of_update: AnyArray) -> Any:
        x, after = _before(x, gain)
        out = product(x)
        wide = out if after is None else narrowed(out, accumulator(out.dtype))
        return times(updated(view, wide, of_update if gain.before is None else x), after)

    if walk.key is None:
        return narrowed(scaled_product(x, of_update), result.dtype)
    out, dropped = product(x), walk.drop(_inexact(x, dtype), atom)
    wide = accumulator(out.dtype)
    full, base = (y.astype(wide) for y in (scaled_product(dropped, dropped), product(dropped)))
    return narrowed(out.astype(wide) + (full - base), result.dtype)
