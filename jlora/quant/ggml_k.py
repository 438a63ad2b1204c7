"""The block formats of GGUF files with 256 inputs a block: read, not written."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from jlora.quant._nibbles import shifted
from jlora.quant.ggml import Ggml, halves, wide


def _scales(f: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return `d · scale` and `dmin · min` of the eight runs of 32, `(..., 8, 1)` each.

    Both have six bits, in twelve bytes: the low bits of the first four scales, of the first four
    mins, then four bits each of the last four; the two high bits of those are with the first.
    """
    low, least, rest = (f["scales"][..., k : k + 4] for k in (0, 4, 8))
    six, two, four = jnp.uint8(63), jnp.uint8(48), jnp.uint8(4)
    last = (rest & jnp.uint8(15)) | ((low >> jnp.uint8(2)) & two)
    scale = jnp.concatenate([low & six, last], axis=-1)
    last = (rest >> four) | ((least >> jnp.uint8(2)) & two)
    minimum = jnp.concatenate([least & six, last], axis=-1)
    d, m = wide(f["d"]) * wide(scale), wide(f["dmin"]) * wide(minimum)
    return d[..., None], m[..., None]


def _runs(qs: Array, n: int) -> Array:
    """Return 4-bit codes of bytes in runs of n: the low halves of a run, then the high ones."""
    codes = halves(qs.reshape(*qs.shape[:-1], -1, n))
    return codes.reshape(*qs.shape[:-1], -1, 32)


def _bits(qh: Array, width: int) -> Array:
    """Return the high bits of codes, `width` of them from each place of bytes in runs of 32."""
    runs = qh.reshape(*qh.shape[:-1], -1, 1, 32)
    high = shifted(runs, range(0, 8, width), -2) & jnp.uint8(2**width - 1)
    return high.reshape(*qh.shape[:-1], -1, 32) << jnp.uint8(4)


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], -1)


def _read_q4_k(f: Mapping[str, Array]) -> Array:
    d, m = _scales(f)
    return _flat(d * wide(_runs(f["qs"], 32)) - m)


def _read_q5_k(f: Mapping[str, Array]) -> Array:
    d, m = _scales(f)
    return _flat(d * wide(_runs(f["qs"], 32) | _bits(f["qh"], 1)) - m)


def _read_q6_k(f: Mapping[str, Array]) -> Array:
    codes = _runs(f["ql"], 64) | _bits(f["qh"], 2)
    centered = wide(codes.astype(jnp.int8) - jnp.int8(32))
    d = wide(f["d"]) * wide(f["scales"])  # of each run of 16
    return _flat(d[..., None] * centered.reshape(*centered.shape[:-2], 16, 16))


_SCALES = ("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "|u1", 12)
_QS = ("qs", "|u1", 128)
Q4_K = Ggml("q4_k", 256, (*_SCALES, _QS), _read_q4_k)
Q5_K = Ggml("q5_k", 256, (*_SCALES, ("qh", "|u1", 32), _QS), _read_q5_k)
Q6_K = Ggml(
    "q6_k",
    256,
    (("ql", "|u1", 128), ("qh", "|u1", 64), ("scales", "|i1", 16), ("d", "<f2", 1)),
    _read_q6_k,
)
