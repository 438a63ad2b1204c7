"""DoRA: the update turns a weight's columns, and their lengths train by themselves.

It composes with every form: a part more, which gives a gain. PEFT's `use_dora`, whose
`lora_magnitude_vector` is m.

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
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora import _base, _compat
from jlora._arrays import AXES, Geometry, LoraArray, accumulator
from jlora.forms._factors import factors
from jlora.forms._form import Part

MAGNITUDE = "magnitude"


def gain(node: LoraArray) -> Float[Array, "..."]:
    """Return `m / ‖W + s · A B‖`, `(*stack, *out_dims)`, in float32 or wider.

    A column of zeros has no direction: its gain is 1, so that B can give it one.
    """
    square, size = _terms(node)
    # Inside a shard_map m lies as the outputs do, so along the other axes the inputs are split.
    split = {*_compat.varying_axes(node.base)} - {*_compat.varying_axes(node.extra[MAGNITUDE])}
    if split:
        square, size = lax.psum((square, size), sorted(split))
    norm = _root(square, size)
    has = norm > 0
    m = jnp.asarray(node.extra[MAGNITUDE], norm.dtype)
    return jnp.where(has, m / jnp.where(has, norm, 1.0), 1.0)


def column_norm(node: LoraArray) -> Float[Array, "..."]:
    """Return `‖W + s · A B‖` over the inputs, `(*stack, *out_dims)`; no gradient flows through."""
    return _root(*_terms(node))


def _root(square: Array, size: Array) -> Array:
    """Return the norm; what cancels to less than its rounding, or below zero, is held there."""
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).eps * size))


def _terms(node: LoraArray) -> tuple[Array, Array]:
    parts = (node.base, *factors(node), jnp.asarray(node.scaling))
    return _squares(*(lax.stop_gradient(x) for x in parts), layout=node.layout)


@functools.partial(jax.jit, static_argnames="layout")
def _squares(w: Any, a: Array, b: Array, s: Array, layout: str) -> tuple[Array, Array]:
    """Return ‖W + s·AB‖² and ‖W‖² + ‖s·AB‖², against which the first is rounded."""
    if _base.is_stored(w):
        if getattr(w, "stack", 0):  # one layer is built at a time
            s = jnp.broadcast_to(s, a.shape[:1]) if s.ndim == 0 else s
            return lax.map(lambda layer: _squares(*layer, layout=layout), (w, a, b, s))
        w = w.dequantize()
    dims = string.ascii_lowercase[: w.ndim]
    along = functools.partial(Geometry.of(w.shape, layout).along, of_base=dims)
    stack, out = along("s"), along("so")
    of_a, of_b = (along(axes, rank="R") for axes in AXES.values())
    wide, axes = accumulator(w.dtype), _mesh_axes(w, dims)

    def dot(formula: str, x: Array, y: Array) -> Array:
        to = None if axes is None else P(*(axes.get(c) for c in formula.partition("->")[2]))
        highest = lax.Precision.HIGHEST
        return jnp.einsum(
            formula, x, y, precision=highest, preferred_element_type=wide, out_sharding=to
        )

    wide_a, b = a.astype(wide), b.astype(wide)
    # W first: XLA on CPUs multiplies no bfloat16 by a second operand of several free axes.
    wa = [dot(f"{dims},{of_a}->{out}R", w, x) for x in _in_dtype(a, w.dtype)]
    aa = dot(f"{of_a},{along(AXES['lora_a'], rank='S')}->{stack}RS", wide_a, wide_a)
    aab = dot(f"{stack}RS,{along(AXES['lora_b'], rank='S')}->{of_b}", aa, b)
    ww = dot(f"{dims},{dims}->{out}", w, w)
    cross = dot(f"{of_b},{out}R->{out}", b, functools.reduce(lax.add, wa))
    abab = dot(f"{of_b},{of_b}->{out}", b, aab)
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


def _first(node: LoraArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return column_norm(node).astype(dtype)


PARTS = {MAGNITUDE: Part("so", begin=_first)}
