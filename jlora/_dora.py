"""DoRA: the update turns a weight's columns, and their lengths train by themselves.

    W' = g ∘ (W + s · A B)        g = m / ‖W + s · A B‖

The norm is over the inputs, one per output, and a constant to the gradient (Liu et al. 2024,
arXiv:2402.09353, eq. 5 and section 4.3). It comes from its three terms, ‖W‖² + 2 s Σ B ∘ (WᵀA)ᵀ +
s² Σ B ∘ (AᵀA B): nothing of W's own shape is made.
"""

import functools
import string
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jlora import _compat
from jlora._arrays import Geometry, LoraArray, accumulator, delta, whole_b


def gain(node: LoraArray) -> Float[Array, "..."]:
    """Return `m / ‖W + s · A B‖`, `(*stack, *out_dims)`, in float32 or wider.

    A column of zeros has no direction: its gain is 1, so that B can give it one.
    """
    square, size = _terms(node)
    # Inside a shard_map m lies as the outputs do, so along the other axes the inputs are split.
    split = {*_compat.varying_axes(node.base)} - {*_compat.varying_axes(node.magnitude)}
    if split:
        square, size = lax.psum((square, size), sorted(split))
    norm = _root(square, size)
    has = norm > 0
    m = jnp.asarray(node.magnitude, norm.dtype)
    return jnp.where(has, m / jnp.where(has, norm, 1.0), 1.0)


def column_norm(node: LoraArray) -> Float[Array, "..."]:
    """Return `‖W + s · A B‖` over the inputs, `(*stack, *out_dims)`; no gradient flows through."""
    return _root(*_terms(node))


def weight(node: LoraArray) -> Float[Array, "..."]:
    """Return the whole weight, in float32 or wider."""
    update = delta(node, node.shape, node.dtype)
    summed = node.base.astype(update.dtype) + update
    if node.magnitude is None:
        return summed
    return summed * Geometry.of(node.shape, node.layout).across(gain(node))


def base_of(merged: Array, node: LoraArray) -> Float[Array, "..."]:
    """Return the base whose merged weight is `merged`, in float32 or wider.

    `W' / g - s · A B`, with the gain of `node`. An output of gain 0 is lost: it has `node`'s base.
    """
    update = delta(node, merged.shape, merged.dtype)
    whole = merged.astype(update.dtype)
    if node.magnitude is None:
        return whole - update
    by = Geometry.of(node.shape, node.layout).across(gain(node)).astype(update.dtype)
    lost = by == 0
    return jnp.where(
        lost, node.base.astype(update.dtype), whole / jnp.where(lost, 1.0, by) - update
    )


def _root(square: Array, size: Array) -> Array:
    """Return the norm; what cancels to less than its rounding, or below zero, is held there."""
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).eps * size))


def _terms(node: LoraArray) -> tuple[Array, Array]:
    b = whole_b(node, Geometry.of(node.shape, node.layout))
    parts = (node.base, node.lora_a, b, jnp.asarray(node.scaling))
    return _squares(*(lax.stop_gradient(x) for x in parts), layout=node.layout)


@functools.partial(jax.jit, static_argnames="layout")
def _squares(w: Array, a: Array, b: Array, s: Array, layout: str) -> tuple[Array, Array]:
    """Return ‖W + s·AB‖² and ‖W‖² + ‖s·AB‖², against which the first is rounded."""
    dims = string.ascii_lowercase[: w.ndim]
    stack, own = dims[: w.ndim - len(layout)], dims[w.ndim - len(layout) :]
    ins, outs = ("".join(c for c, k in zip(own, layout, strict=True) if k == side) for side in "io")
    wide, axes = accumulator(w.dtype), _mesh_axes(w, dims)

    def dot(formula: str, x: Array, y: Array) -> Array:
        to = None if axes is None else P(*(axes.get(c) for c in formula.partition("->")[2]))
        highest = lax.Precision.HIGHEST
        return jnp.einsum(
            formula, x, y, precision=highest, preferred_element_type=wide, out_sharding=to
        )

    out, wide_a, b = f"{stack}{outs}", a.astype(wide), b.astype(wide)
    # W first: XLA on CPUs multiplies no bfloat16 by a second operand of several free axes.
    wa = [dot(f"{dims},{stack}{ins}R->{out}R", w, x) for x in _in_dtype(a, w.dtype)]
    aa = dot(f"{stack}{ins}R,{stack}{ins}S->{stack}RS", wide_a, wide_a)
    aab = dot(f"{stack}RS,{stack}S{outs}->{stack}R{outs}", aa, b)
    ww = dot(f"{dims},{dims}->{out}", w, w)
    cross = dot(f"{stack}R{outs},{out}R->{out}", b, functools.reduce(lax.add, wa))
    abab = dot(f"{stack}R{outs},{stack}R{outs}->{out}", b, aab)
    s = s.astype(wide)
    s = s.reshape(*s.shape, *(1,) * (ww.ndim - s.ndim)) if s.ndim else s
    size = ww + s * s * abab
    return size + 2.0 * s * cross, size


def _mesh_axes(w: Array, dims: str) -> dict[str, Any] | None:
    """Return the mesh axes of W's own, where the mesh is explicit: a sum over them has to be told.

    What is summed over several devices comes out as W's outputs lie.
    """
    sharding = jax.typeof(w).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return dict(zip(dims, sharding.spec, strict=True))


def _in_dtype(a: Array, dtype: Any) -> list[Array]:
    """Write A as a sum in W's dtype, so that W need not be cast to A's."""
    kind = jnp.finfo(dtype)
    if jnp.finfo(a.dtype).bits <= kind.bits:
        return [a.astype(dtype)]
    # Not two casts, which a compiler may take for none.
    near = lax.reduce_precision(a, kind.nexp, kind.nmant)
    return [near.astype(dtype), (a - near).astype(dtype)]
