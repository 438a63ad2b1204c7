"""DoRA: the update changes the direction of W's columns, and their lengths train separately.

It composes with every form, as one more part that defines a gain. PEFT's `use_dora`, whose
`lora_magnitude_vector` is m.

    W' = g ∘ (W + s · A B)        g = m / ‖W + s · A B‖

The norm is taken over the inputs, one per output, and is a constant for the gradient (Liu et al.
2024, arXiv:2402.09353, eq. 5 and section 4.3).
"""

import functools
import string
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jlora import _base, _compat
from jlora._arrays import AXES, Geometry, LoraArray, accumulator
from jlora.forms._factors import factors
from jlora.forms._form import Part

MAGNITUDE = "magnitude"


def gain(node: LoraArray) -> Float[Array, "..."]:
    """Return `m / ‖W + s · A B‖`, `(*stack, *out_dims)`, in float32 or wider.

    A zero column has no direction; its gain is 1, so that B can train one.
    """
    square, size = _terms(node)
    # Inside a shard_map m is sharded like the outputs: W's other mesh axes split the inputs.
    split = {*_compat.varying_axes(node.base)} - {*_compat.varying_axes(node.extra[MAGNITUDE])}
    if split:
        square, size = lax.psum((square, size), sorted(split))
    norm = _root(square, size)
    has = norm > 0
    m = _compat.sharded_like(jnp.asarray(node.extra[MAGNITUDE], norm.dtype), norm)
    return jnp.where(has, m / jnp.where(has, norm, 1.0), 1.0)


def column_norm(node: LoraArray) -> Float[Array, "..."]:
    """Return `‖W + s · A B‖` over the inputs, `(*stack, *out_dims)`, without gradient."""
    return _root(*_terms(node))


def _root(square: Array, size: Array) -> Array:
    """Return the norm; a square that cancels to less than its rounding error is clamped to it."""
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).eps * size))


def _terms(node: LoraArray) -> tuple[Array, Array]:
    parts = (node.base, *factors(node), jnp.asarray(node.scaling))
    return _squares(*(lax.stop_gradient(x) for x in parts), layout=node.layout)


@functools.partial(jax.jit, static_argnames="layout")
def _squares(w: PyTree, a: Array, b: Array, s: Array, layout: str) -> tuple[Array, Array]:
    """Return ‖W + s·AB‖² and ‖W‖² + ‖s·AB‖², which sets the rounding error of the first.

    Per output column o, with w_o and b_o the columns of W and B (sums over inputs i, ranks r),

        ‖w_o + s A b_o‖² = ‖w_o‖² + 2 s ⟨w_o, A b_o⟩ + s² ‖A b_o‖²

    where ⟨w_o, A b_o⟩ = Σ_r (WᵀA)_or B_ro and ‖A b_o‖² = b_oᵀ (AᵀA) b_o = Σ_r B_ro (AᵀA B)_ro.
    So nothing larger than WᵀA, (out, r), is built: W is read twice and W + s·AB is never formed.
    The cross term may be negative, and the sum cancels where s·AB is close to -W: its absolute
    error is then that of the two squares, which is why their sum is returned as well.
    """
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
    terms = _in_dtype(a, w.dtype)
    # XLA on CPUs does not support bfloat16 products whose second operand has several free axes:
    # those of outputs in heads, or of A under a `vmap` over adapters. There W comes second, and the
    # rank before the outputs: a transpose is folded into the product by swapping its operands.
    if len(along("o")) > 1:
        turned, wa = f"{out}R", [dot(f"{dims},{of_a}->{out}R", w, x) for x in terms]
    else:
        turned = f"{stack}R{along('o')}"
        wa = [dot(f"{of_a},{dims}->{turned}", x, w) for x in terms]
    aa = dot(f"{of_a},{along(AXES['lora_a'], rank='S')}->{stack}RS", wide_a, wide_a)
    aab = dot(f"{stack}RS,{along(AXES['lora_b'], rank='S')}->{of_b}", aa, b)
    ww = dot(f"{dims},{dims}->{out}", w, w)
    cross = dot(f"{of_b},{turned}->{out}", b, functools.reduce(lax.add, wa))
    abab = dot(f"{of_b},{of_b}->{out}", b, aab)
    s = s.astype(wide)
    s = s.reshape(*s.shape, *(1,) * (ww.ndim - s.ndim)) if s.ndim else s
    size = ww + s * s * abab
    return size + 2.0 * s * cross, size


def _mesh_axes(w: Array, dims: str) -> dict[str, Any] | None:
    """Return the mesh axes of W on an explicit mesh, where products require an output sharding.

    The norm is sharded like the outputs of W.
    """
    sharding = jax.typeof(w).sharding
    if not _compat.is_explicit(sharding):
        return None
    return dict(zip(dims, sharding.spec, strict=True))


def _in_dtype(a: Array, dtype: DTypeLike) -> list[Array]:
    """Split A into a sum of arrays in W's dtype, so that W is not cast to A's dtype."""
    kind = jnp.finfo(dtype)
    if jnp.finfo(a.dtype).bits <= kind.bits:
        return [a.astype(dtype)]
    # Not two casts, which a compiler may remove.
    near = lax.reduce_precision(a, kind.nexp, kind.nmant)
    return [near.astype(dtype), (a - near).astype(dtype)]


def _first(node: LoraArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return column_norm(node).astype(dtype)


PARTS = {MAGNITUDE: Part("so", begin=_first)}
