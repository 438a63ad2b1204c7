"""Codes of four bits: two in a byte, the first in the high half, as bitsandbytes packs them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def pack(codes: UInt8[Array, "*rows inputs"]) -> UInt8[Array, "*rows half"]:
    """Put two consecutive codes in a byte."""
    return (codes[..., 0::2] << jnp.uint8(4)) | codes[..., 1::2]


def pairs_of(table: np.ndarray) -> np.ndarray:
    """Return the two values of each byte, (256, 2): one lookup a byte is faster than two."""
    byte = np.arange(256)
    return np.stack([table[byte >> 4], table[byte & 15]], axis=1)


def look_up(codes: UInt8[Array, "*rows half"], pairs: np.ndarray) -> Float[Array, "*rows inputs"]:
    """Replace codes by their values."""
    values = jnp.asarray(pairs).at[codes].get(mode="promise_in_bounds")
    return values.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def check_block(block: object, call: str) -> None:
    """Refuse a block that is not an even number of inputs."""
    if not isinstance(block, int) or isinstance(block, bool) or block < 2 or block % 2:
        raise ValueError(
            f"`{call}`: two codes share a byte, so the number of inputs that share a scale must be "
            "even and at least 2. Give 32, 64 or 128."
        )
