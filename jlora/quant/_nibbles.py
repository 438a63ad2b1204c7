"""Codes of four bits: two in a byte, the first in the high half, as bitsandbytes packs them."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8


def pack(codes: UInt8[Array, "*rows inputs"]) -> UInt8[Array, "*rows half"]:
    """Put two consecutive codes in a byte."""
    return (codes[..., 0::2] << jnp.uint8(4)) | codes[..., 1::2]


def pairs_of(table: np.ndarray) -> np.ndarray:
    """Return the two values of each byte, (256, 2): one lookup a byte is faster than two."""
    byte = np.arange(256)
    return np.stack([table[byte >> 4], table[byte & 15]], axis=1)


def shifted(x: Array, by: Sequence[int], axis: int) -> Array:
    """Shift bytes right by each of several numbers of bits, along a new axis of size 1."""
    shape = [1] * x.ndim
    shape[axis] = len(by)
    return x >> jnp.asarray(by, jnp.uint8).reshape(shape)


def look_up(codes: UInt8[Array, "*rows half"], pairs: np.ndarray) -> Float[Array, "*rows inputs"]:
    """Replace codes by their values.

    A TPU would pad the two values of a byte to a row of 128 in memory. There they are selected
    instead, which XLA fuses into the product.
    """

    def looked_up(codes: Array) -> Array:
        values = jnp.asarray(pairs).at[codes].get(mode="promise_in_bounds")
        return values.reshape(*codes.shape[:-1], 2 * codes.shape[-1])

    select = functools.partial(_select, table=tuple(pairs[:16, 1].tolist()))
    return lax.platform_dependent(codes, tpu=select, default=looked_up)


@functools.partial(jax.jit, static_argnames="table")  # traced once for all weights of a shape
def _select(codes: Array, table: tuple[float, ...]) -> Array:
    """Return the two values of each byte."""
    both = shifted(codes[..., None], (4, 0), -1) & jnp.uint8(15)
    return _chosen(both.reshape(*codes.shape[:-1], -1), table)


def look_up_scales(codes: UInt8[Array, "*rows"], table: np.ndarray) -> Float[Array, "*rows"]:
    """Replace codes of eight bits by their values: see `look_up`."""
    looked_up = lambda codes: jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
    select = functools.partial(_select_scales, table=tuple(table.tolist()))
    return lax.platform_dependent(codes, tpu=select, default=looked_up)


@functools.partial(jax.jit, static_argnames="table")
def _select_scales(codes: Array, table: tuple[float, ...]) -> Array:
    """Return `table[codes]`, once: not again for each weight that has a scale."""
    return lax.optimization_barrier(_chosen(codes, table))


def _chosen(codes: Array, table: tuple[float, ...]) -> Array:
    """Return `table[codes]`, chosen by one bit of the codes after the other."""
    found = list(map(jnp.float32, table))
    for bit in range(len(table).bit_length() - 1):
        odd = (codes >> jnp.uint8(bit)) & jnp.uint8(1) != jnp.uint8(0)
        found = [jnp.where(odd, b, a) for a, b in zip(found[0::2], found[1::2], strict=True)]
    return found[0]


def check_block(block: object, call: str) -> None:
    """Refuse a block that is not an even number of inputs."""
    if not isinstance(block, int) or isinstance(block, bool) or block < 2 or block % 2:
        raise ValueError(
            f"`{call}`: two codes share a byte, so the number of inputs that share a scale must be "
            "even and at least 2. Give 32, 64 or 128."
        )
