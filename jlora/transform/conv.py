"""The rule for convolutions: a narrow convolution with one factor, then a 1x1 with the other."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora._arrays import accumulator
from jlora.transform._gain import Gain, multiplied, placed
from jlora.transform._inputs import EXACT, Sums, pulled, wide
from jlora.transform._labeled import AnyArray, contract, in_dtype_of_first
from jlora.transform._registry import rule
from jlora.transform._view import RANK, View, plus
from jlora.transform._walk import Walk
from jlora.transform._weight import Operand, Weight
from jlora.transform._wide import bound


def of_conv(eqn: JaxprEqn, x: AnyArray, view: Operand) -> Sums | None:
    """Sum over the patches of the input; padding counts as zeros."""
    if not isinstance(view, View) or sides_of(eqn, view) != (0, 0):
        return None
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    groups, x = eqn.params["feature_group_count"], wide(x).astype(view.factors[0].dtype)

    def narrow(a: Array) -> Array:
        kernel = with_rank_at(dataclasses.replace(view, parts=(a, a)), 0, out_axis)
        return convolve(eqn, x, jnp.concatenate([kernel] * groups, out_axis), groups, EXACT)

    patches, second, total = pulled(narrow, view.factors[0])
    return Sums(second, total, jnp.asarray(patches.size // view.rank, second.dtype))


@rule("conv_general_dilated", kind="product", repeated=True, sums=of_conv)
def _conv(walk: Walk, eqn: JaxprEqn, lhs: Operand, view: Operand) -> Any:
    if not isinstance(view, Weight):
        return NotImplemented
    if isinstance(lhs, Weight):
        lhs = walk.materialize(eqn, lhs)
    out_axis, in_axis, *spatial = eqn.params["dimension_numbers"].rhs_spec
    sides, gain = sides_of(eqn, view) if isinstance(view, View) else (0, 0), _gain(eqn, view)
    if sides is None or gain is None:
        return NotImplemented
    result: Any = eqn.outvars[0].aval
    dtype = walk.narrow_dtype(lhs.dtype, result.dtype)

    def product(x: AnyArray) -> Array:
        return bound(walk, eqn, x, view)

    def updated(view: View, base: AnyArray, x: AnyArray) -> Array:
        return plus(base, _narrow_conv(eqn, x.astype(dtype), view, base.shape, sides))

    out = multiplied(walk, eqn, 0, view, lhs, gain, dtype, product, updated)
    window = math.prod(view.shape) // view.shape[out_axis]
    narrow = out.size // view.shape[out_axis] * view.rank
    cost = 2 * narrow * (window + view.shape[out_axis])
    walk.used(eqn, view, cost, [in_axis, *spatial], [out_axis])
    return [out]


def _gain(eqn: JaxprEqn, view: Weight) -> Gain | None:
    """Return where DoRA's gain goes: on the output channels, or the input's if transposed."""
    dn = eqn.params["dimension_numbers"]
    w_labels: list[Any] = [("w", k) for k in range(view.ndim)]
    x_labels, out_labels = ([(name, k) for k in range(view.ndim)] for name in ("x", "out"))
    out_labels[dn.out_spec[1]] = w_labels[dn.rhs_spec[0]]
    if eqn.params["feature_group_count"] == 1:
        x_labels[dn.lhs_spec[1]] = w_labels[dn.rhs_spec[1]]
    return placed(view, w_labels, x_labels, out_labels)


def sides_of(eqn: JaxprEqn, view: View) -> tuple[int, int] | None:
    """Return which factor has the window and which is applied to the input; None if neither."""
    p = eqn.params
    out_axis, in_axis, *spatial = p["dimension_numbers"].rhs_spec
    big = {k: r for k, r in enumerate(view.roles) if view.shape[k] > 1}
    side = {k: "io".index(r) for k, r in big.items() if r in ("i", "o")}
    windows = {side[k] for k in spatial if k in side}
    groups = p["feature_group_count"]
    if len(side) < len(big) or len(windows) > 1 or p["batch_group_count"] > 1:
        return None
    # An axis of size 1 fits on either side: the channels take opposite sides, and a window takes
    # the side of the input channels.
    inward = side.get(in_axis, 1 - side[out_axis] if out_axis in side else 0)
    window = windows.pop() if windows else inward
    if side.get(out_axis, 1 - inward) == inward or (window != inward and groups > 1):
        return None
    return window, inward


def _narrow_conv(
    eqn: JaxprEqn, x: AnyArray, view: View, shape: tuple[int, ...], sides: tuple[int, int]
) -> Array:
    """Convolve with the factor that has the window; multiply by the other at each position."""
    p, dn = eqn.params, eqn.params["dimension_numbers"]
    out_axis, in_axis, *_ = dn.rhs_spec
    groups, (window, inward) = p["feature_group_count"], sides
    dtype = x.dtype
    # The rank replaces the output channels of the narrow kernel or, if the inputs are projected
    # first (as for a transposed kernel), its input channels.
    replaced = out_axis if window == inward else in_axis
    kernel = with_rank_at(view, window, replaced)
    other = view.factors[1 - window]
    other = other.reshape(-1, other.shape[-1])  # (channels, rank): drops spatial axes of size 1
    if replaced == in_axis:
        feature = dn.lhs_spec[1]
        labels: list[Any] = [("x", k) for k in range(x.ndim)]
        narrow = [RANK if k == feature else label for k, label in enumerate(labels)]
        x = contract(x, labels, other, [labels[feature], RANK], narrow, p["precision"])
        return convolve(eqn, x.astype(dtype), kernel, 1)
    if groups > 1:
        kernel = jnp.concatenate([kernel] * groups, axis=out_axis)
    z = convolve(eqn, x, kernel, groups).astype(dtype)
    feature = dn.out_spec[1]
    rank, channels = other.shape[-1], other.shape[0]
    z = z.reshape(*z.shape[:feature], groups, rank, *z.shape[feature + 1 :])
    other = other.reshape(groups, channels // groups, rank)
    labels = [("x", k) for k in range(z.ndim)]
    labels[feature : feature + 2] = ["group", RANK]
    wide = [*labels[: feature + 1], "channel", *labels[feature + 2 :]]
    y = contract(z, labels, other, ["group", "channel", RANK], wide, p["precision"])
    return y.reshape(shape)


def with_rank_at(view: View, k: int, axis: int) -> Any:
    """Arrange a factor as a kernel with as many axes as the base, its rank at `axis`."""
    f, axes = view.factors[k], view.axes(k)
    for missing in range(len(view.roles)):
        if missing != axis and missing not in axes:  # a window of size 1 on the other side
            axes = sorted([*axes, missing])
            f = jnp.expand_dims(f, axes.index(missing))
    return jnp.moveaxis(f if axis not in axes else f.squeeze(axes.index(axis)), -1, axis)


def convolve(
    eqn: JaxprEqn,
    x: Any,
    kernel: Array,
    groups: int,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Convolve as `eqn` does, with a kernel that has a different number of channels.

    A kernel of another dtype is cast to that of x, and its gradient is not rounded to it. Operands
    of a convolution must have one dtype, so for the gradient x is widened: then, not kept so.
    """
    p = eqn.params

    def product(x: Any, kernel: Array) -> Array:
        dtype = x.dtype if x.dtype == kernel.dtype else accumulator(x.dtype)
        return lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            p["dimension_numbers"],
            feature_group_count=groups,
            precision=precision or p["precision"],
            preferred_element_type=accumulator(x.dtype),
        )

    if x.dtype == kernel.dtype:
        return product(x, kernel)
    return in_dtype_of_first(jax.checkpoint(product, prevent_cse=False), x, kernel)
