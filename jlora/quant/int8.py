"""Int8: symmetric, with one scale per output, and a product that builds no weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora._arrays import accumulator
from jlora.quant._product import sum_dtype


@dataclasses.dataclass(frozen=True)
class Int8:
    """Store a weight as int8 codes and one float32 scale per output.

    `W ≈ scale ∘ codes` with `scale = max|W| / 127` over the inputs of each output. Products use the
    codes as they are, `(x · codes) · scale`, so the weight is never built for them.

    Example:
        >>> import jax, jlora
        >>> w = jax.random.normal(jax.random.key(0), (6, 4))
        >>> stored = jlora.quantize({"w": w}, {"w": Int8()})["w"]
        >>> stored.parts["codes"].shape, stored.parts["scale"].shape, stored.nbytes
        ((4, 6), (4,), 40)

    Reference: Dettmers et al. 2022, arXiv:2208.07339, section 2.1. The weights of bitsandbytes's
    `Linear8bitLt`, whose `SCB` is `127 · scale`.
    """

    name = "int8"
    block = 1
    settings = property(dataclasses.asdict)

    def pack(self, rows: Float[Array, "*stack out inputs"]) -> dict[str, Array]:
        """Round to int8."""
        most = jnp.abs(rows).max(-1)
        factor = jnp.where(most > 0, 127.0 / jnp.where(most > 0, most, 1.0), 0.0)
        codes = jnp.round(rows * factor[..., None]).astype(jnp.int8)
        # Not most / 127, which a compiler may replace by a product that rounds differently.
        return {"codes": codes, "scale": most * jnp.float32(1 / 127)}

    def unpack(self, parts: Mapping[str, Array]) -> Float[Array, "*stack out inputs"]:
        """Multiply codes and scales."""
        return parts["codes"].astype(jnp.float32) * parts["scale"][..., None]

    def dot(self, parts: Mapping[str, Array], rows: Array, dtype: DTypeLike) -> Array:
        """Return `(x · codes) · scale`, accumulated in float32 or wider."""
        wide = _product(rows, parts["codes"], 1, dtype).astype(accumulator(rows.dtype))
        scale = parts["scale"].astype(wide.dtype).reshape(*(1,) * (wide.ndim - 1), -1)
        return (wide * scale).astype(dtype)

    def dot_transposed(self, parts: Mapping[str, Array], outs: Array, dtype: DTypeLike) -> Array:
        """Return `(y · scale) · codesᵀ`, accumulated in float32 or wider."""
        wide = accumulator(outs.dtype)
        scale = parts["scale"].astype(wide).reshape(*(1,) * (outs.ndim - 1), -1)
        scaled = outs.astype(wide) * scale
        if outs.dtype != jnp.float16:  # whose smallest numbers are above a gradient's, scaled
            scaled = scaled.astype(outs.dtype)
        return _product(scaled, parts["codes"], 0, dtype).astype(dtype)


def _product(x: Array, codes: Array, axis: int, dtype: DTypeLike) -> Any:
    """Contract the last axis of x with an axis of the codes, which every float dtype represents."""
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    wide = sum_dtype(x, dtype)
    return lax.dot_general(x, codes.astype(x.dtype), contract, preferred_element_type=wide)
