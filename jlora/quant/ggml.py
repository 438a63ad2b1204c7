"""The block formats of GGUF files with 32 inputs a block, and what all formats of GGUF share.

A block of a file is a record: float16 scales and packed codes. Here each field is an array of its
own, `(*stack, out, blocks · count)`, and `records` joins them to the bytes of the file again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.quant._nibbles import shifted

Fields = tuple[tuple[str, str, int], ...]  # the name, NumPy's type and count of each, in order


@dataclasses.dataclass(frozen=True, repr=False)
class Ggml:
    """A block format of GGUF files, such as `jlora.quant.Q4_1`: the bytes of llama.cpp.

    Attributes:
        name: GGUF's name of the type, in lower case.
        block: the number of inputs in a block.
        fields: the fields of a block's record, in the order of the file.
        read: returns the values of blocks, `(*blocks, block)`, of fields `(*blocks, count)`.
        write: returns the fields of blocks, on the host; None if jlora reads this format only.

    Example:
        >>> import jlora
        >>> w = jlora.quantize({"w": jnp.ones((64, 3))}, {"w": Q4_1})["w"]
        >>> w.format, {name: x.shape for name, x in w.parts.items()}
        (Q4_1, {'d': (3, 2), 'm': (3, 2), 'qs': (3, 32)})
        >>> w.dequantize()[0].tolist()
        [1.0, 1.0, 1.0]

    Reference: the layouts are those of ggml, as gguf-py's `gguf.quants` reads and writes them.
    """

    name: str
    block: int
    fields: Fields
    read: Callable[[Mapping[str, Array]], Array]
    write: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None

    on_host = True

    def __repr__(self) -> str:
        return self.name.upper()

    @property
    def settings(self) -> dict[str, Any]:
        """Empty: the name says all."""
        return {}

    @property
    def record(self) -> int:
        """The bytes of a block."""
        return sum(np.dtype(kind).itemsize * count for _, kind, count in self.fields)

    def pack(self, rows: Float[Array, "*stack out inputs"]) -> dict[str, Array]:
        """Quantize as gguf-py does, to the same bytes, on the host: it rounds in a fixed order."""
        assert self.write is not None, "`jlora.quantize` refuses it"
        values = np.asarray(rows).reshape(*rows.shape[:-1], -1, self.block)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            made = self.write(values)
        shape = rows.shape[:-1]
        return {name: jnp.asarray(made[name].reshape(*shape, -1)) for name, _, _ in self.fields}

    def unpack(self, parts: Mapping[str, Array]) -> Float[Array, "*stack out inputs"]:
        """Compute the values of the blocks, in float32, in the order of gguf-py."""
        counts = {name: count for name, _, count in self.fields}
        blocks = {k: x.reshape(*x.shape[:-1], -1, counts[k]) for k, x in parts.items()}
        values = self.read(blocks)
        return values.reshape(*values.shape[:-2], -1)


def records(format: Ggml, parts: Mapping[str, Array]) -> np.ndarray:
    """Join fields to the bytes of a file, `(*stack, out, bytes)`."""
    found = []
    for name, kind, count in format.fields:
        x = np.asarray(parts[name]).astype(kind, copy=False)
        x = np.ascontiguousarray(x.reshape(*x.shape[:-1], -1, count))
        found.append(x.view(np.uint8))
    joined = np.concatenate(found, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def fields_of(format: Ggml, data: np.ndarray) -> dict[str, Array]:
    """Split the bytes of a file, `(*stack, out, bytes)`, into fields."""
    blocks = data.reshape(*data.shape[:-1], -1, format.record)
    found, at = {}, 0
    for name, kind, count in format.fields:
        size = np.dtype(kind).itemsize * count
        x = np.ascontiguousarray(blocks[..., at : at + size]).view(kind)
        found[name] = jnp.asarray(x.reshape(*x.shape[:-2], -1))
        at += size
    return found


def halves(qs: Array) -> Array:
    """Return 4-bit codes of bytes `(..., n)`: the low halves, then the high ones, `(..., 2 n)`."""
    both = shifted(qs[..., None, :], (0, 4), -2) & jnp.uint8(15)
    return both.reshape(*qs.shape[:-1], -1)


def wide(x: Array) -> Array:
    """Cast to float32."""
    return x.astype(jnp.float32)


def _fifth(qh: Array) -> Array:
    """Return the fifth bits of 32 codes, one of each bit of four bytes, shifted to their place."""
    bits = shifted(qh[..., None], range(8), -1) & jnp.uint8(1)
    return bits.reshape(*qh.shape[:-1], -1) << jnp.uint8(4)


def _centered(codes: Array, zero: int) -> Array:
    return wide(codes.astype(jnp.int8) - jnp.int8(zero))


def _read_q4_0(f: Mapping[str, Array]) -> Array:
    return wide(f["d"]) * _centered(halves(f["qs"]), 8)


def _read_q4_1(f: Mapping[str, Array]) -> Array:
    return wide(f["d"]) * wide(halves(f["qs"])) + wide(f["m"])


def _read_q5_0(f: Mapping[str, Array]) -> Array:
    return wide(f["d"]) * _centered(halves(f["qs"]) | _fifth(f["qh"]), 16)


def _read_q5_1(f: Mapping[str, Array]) -> Array:
    return wide(f["d"]) * wide(halves(f["qs"]) | _fifth(f["qh"])) + wide(f["m"])


def _read_q8_0(f: Mapping[str, Array]) -> Array:
    return wide(f["qs"]) * wide(f["d"])


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _split(codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the low four bits of codes, the second half of a block above the first, and bit 5."""
    half = codes.shape[-1] // 2
    low = codes & np.uint8(15)
    bits = np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little")
    return {"qs": low[..., :half] | (low[..., half:] << np.uint8(4)), "qh": bits}


def _symmetric(levels: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Quantize to `d · (q - levels/2)`, where d is such that the largest value has the code 0."""

    def write(values: np.ndarray) -> dict[str, np.ndarray]:
        at = np.abs(values).argmax(-1, keepdims=True)
        d = np.take_along_axis(values, at, -1) / np.float32(-levels // 2)
        q = np.trunc(values * _inverse(d) + np.float32(levels / 2 + 0.5)).astype(np.uint8)
        return {"d": d.astype(np.float16), **_split(np.minimum(q, np.uint8(levels - 1)))}

    return write


def _affine(levels: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Quantize to `d · q + m`, where m is the least value."""

    def write(values: np.ndarray) -> dict[str, np.ndarray]:
        least = values.min(-1, keepdims=True)
        d = (values.max(-1, keepdims=True) - least) / np.float32(levels - 1)
        q = np.trunc((values - least) * _inverse(d) + np.float32(0.5)).astype(np.uint8)
        made = _split(np.minimum(q, np.uint8(levels - 1)))
        return {"d": d.astype(np.float16), "m": least.astype(np.float16), **made}

    return write


def _write_q8_0(values: np.ndarray) -> dict[str, np.ndarray]:
    d = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    scaled = values * _inverse(d)
    size = np.abs(scaled)  # halves are rounded away from zero
    below = np.floor(size)
    rounded = np.sign(scaled) * (below + np.floor(2 * (size - below)))
    return {"d": d.astype(np.float16), "qs": rounded.astype(np.int8)}


_D, _M, _QH, _QS = ("d", "<f2", 1), ("m", "<f2", 1), ("qh", "|u1", 4), ("qs", "|u1", 16)
Q4_0 = Ggml("q4_0", 32, (_D, _QS), _read_q4_0, _symmetric(16))
Q4_1 = Ggml("q4_1", 32, (_D, _M, _QS), _read_q4_1, _affine(16))
Q5_0 = Ggml("q5_0", 32, (_D, _QH, _QS), _read_q5_0, _symmetric(32))
Q5_1 = Ggml("q5_1", 32, (_D, _M, _QH, _QS), _read_q5_1, _affine(32))
Q8_0 = Ggml("q8_0", 32, (_D, ("qs", "|i1", 32)), _read_q8_0, _write_q8_0)
