"""Store the matrices of a GGUF model in 4 bits: everything else is copied, byte for byte."""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np

from jlora.gguf._entries import Reader, place, spans
from jlora.quant import Q4_1
from jlora.quant.ggml import records

_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"
_FLOATS = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(jnp.bfloat16)}
_Q4_1 = int(gguf.GGMLQuantizationType.Q4_1)
_KEPT = ("token_embd.weight", "output.weight")
_CHUNK = 2**22  # weights at a time


class Plan(NamedTuple):
    """A new file: its header, and its tensors in the order of the old one."""

    header: bytes
    tensors: list[tuple[str, tuple[int, ...], int, int, int]]  # name, shape, old type, start, size
    chosen: list[str]
    align: int

    @property
    def size(self) -> int:
        """The bytes of the new file."""
        return len(self.header) + sum(
            -(-size // self.align) * self.align for *_, size in self.tensors
        )


def plan_q4_1(file: Path, call: str) -> Plan:
    """Read a model's header and write that of the model in Q4_1."""
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = Reader(data, call, file.name)
        if reader.take(4) != b"GGUF" or (version := reader.number("I")) not in (2, 3):
            reader.refuse("it does not begin as one")
        count, entries = reader.number("Q"), reader.number("Q")
        begin, said, types = reader.at, {}, []
        for _ in range(entries):
            key, kind = reader.text(), reader.number("I")
            types += [reader.at] if key == _FILE_TYPE and kind == 4 else []
            said[key] = reader.value(kind)
        kept = bytearray(data[begin : reader.at])
        for at in types:
            kept[at - begin : at - begin + 4] = struct.pack("<I", gguf.LlamaFileType.MOSTLY_Q4_1)
        if _VERSION not in said:
            kept += struct.pack("<Q", len(_VERSION)) + _VERSION.encode() + struct.pack("<II", 4, 2)
        places = [place(reader) for _ in range(count)]
        align, found = said.get("general.alignment", 32), spans(reader, said, places)
    chosen = [name for name, shape, kind, _ in places if _fits(name, shape, kind)]
    infos, tensors, at = b"", [], 0
    for (name, shape, kind, _), (start, size) in zip(places, found, strict=True):
        new = name in chosen
        size = math.prod(shape) // 32 * Q4_1.record if new else size
        infos += struct.pack("<Q", len(name.encode())) + name.encode()
        infos += struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape[::-1], _Q4_1 if new else kind, at
        )
        tensors.append((name, shape, kind, start, size))
        at += -(-size // align) * align
    more = _VERSION not in said
    header = struct.pack("<4sIQQ", b"GGUF", version, count, entries + more) + bytes(kept) + infos
    return Plan(header + bytes(-len(header) % align), tensors, chosen, align)


def _fits(name: str, shape: tuple[int, ...], kind: int) -> bool:
    """Whether a tensor is a matrix to store in 4 bits; not the embedding, nor the head."""
    matrix = len(shape) == 2 and shape[1] % 32 == 0 and kind in _FLOATS
    return matrix and name.endswith(".weight") and name not in _KEPT


def write_q4_1(source: Path, target: Path, plan: Plan, done: Callable[[int], None]) -> None:
    """Write the new file, some rows at a time."""
    with target.open("wb") as f:
        f.write(plan.header)
        for name, shape, kind, start, size in plan.tensors:
            for piece in _pieces(source, name in plan.chosen, shape, kind, start, size):
                f.write(piece)
                done(len(piece))
            f.write(bytes(-size % plan.align))


def _pieces(
    source: Path, new: bool, shape: tuple[int, ...], kind: int, start: int, size: int
) -> Iterator[Any]:
    if not new:
        for at in range(0, size, 2**23):
            yield np.fromfile(source, np.uint8, min(2**23, size - at), offset=start + at).tobytes()
        return
    dtype, (rows, columns) = _FLOATS[kind], shape
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        at = start + first * columns * dtype.itemsize
        x = np.fromfile(source, dtype, count * columns, offset=at).astype(np.float32)
        yield records(Q4_1, Q4_1.pack(jnp.asarray(x.reshape(count, columns)))).tobytes()
