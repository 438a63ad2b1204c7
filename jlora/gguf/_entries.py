"""The entries of a GGUF file: every count in its header is checked against its size.

gguf-py's reader believes what a header says, which in a damaged file may be 2⁶⁰ elements.

    "GGUF"  version u32  tensors u64  entries u64
    entry   length u64, key   type u32   value             (array: type u32, length u64, values)
    tensor  length u64, name  dimensions u32, sizes u64 each, innermost first  type u32  offset u64
    tensors, from the next multiple of general.alignment
"""

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gguf
import jax.numpy as jnp
import numpy as np

from jlora._paths import brief, quoted

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(jnp.bfloat16)}
_Q8_0 = 8
_SIZES = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}

Place = tuple[str, tuple[int, ...], int, int]  # of a tensor: its name, shape, type and offset


class Contents(NamedTuple):
    """Entries that are numbers or texts, and tensors."""

    entries: dict[str, Any]
    tensors: dict[str, np.ndarray]


# GGUF's architecture: transformers' model_type.
_MODELS = {x: x for x in ("llama", "qwen2", "qwen3", "gemma", "gemma2")} | {"gemma3": "gemma3_text"}


class Reader:
    """Read numbers and texts from bytes, none of them past their end."""

    def __init__(self, data: Any, call: str, name: str) -> None:
        self.data, self.at, self._call, self._name = data, 0, call, name

    def refuse(self, why: str) -> NoReturn:
        raise ValueError(
            f"`{self._call}`: {self._name} is not a complete GGUF file: {why}. It may be "
            "truncated; copy it again."
        )

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            self.refuse("it ends early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            self.refuse("a name is no UTF-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value; an array is passed over, and is None."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 2:
            self.refuse(f"it has a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return None
        for _ in range(min(count, len(self.data))):
            self.value(inner, depth + 1)
        return None


def entries_of(file: Path, call: str) -> Contents:
    """Read an adapter's entries and its tensors: F32, F16, BF16, and Q8_0 as float32."""
    reader = Reader(file.read_bytes(), call, file.name)
    found, places = _header(reader)
    tensors: dict[str, np.ndarray] = {}
    for (name, shape, kind, _), (at, _) in zip(places, spans(reader, found, places), strict=True):
        reader.at = at
        tensors[name] = _tensor(reader, name, shape, kind)
    return Contents(found, tensors)


def model_config(file: Path, call: str) -> dict[str, Any]:
    """Return what `load` and `save` ask of config.json, from the metadata of a GGUF model."""
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        said, places = _header(Reader(data, call, file.name))
    kind = str(said.get("general.architecture"))
    entry = lambda name: said.get(f"{kind}.{name}")
    return {
        "model_type": _MODELS.get(kind, kind),
        "num_hidden_layers": entry("block_count"),
        "num_attention_heads": entry("attention.head_count"),
        "num_key_value_heads": entry("attention.head_count_kv"),
        "tie_word_embeddings": all(name != "output.weight" for name, *_ in places),
    }


def check_header(file: Path, call: str) -> dict[str, Any]:
    """Refuse a file whose header does not fit its size; return the entries."""
    if file.stat().st_size == 0:
        Reader(b"", call, file.name).refuse("it is empty")
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = Reader(data, call, file.name)
        found, places = _header(reader)
        spans(reader, found, places)
    return found


def _header(reader: Reader) -> tuple[dict[str, Any], list[Place]]:
    """Read the entries, and the name, shape, type and offset of every tensor."""
    if reader.take(4) != b"GGUF" or reader.number("I") not in (2, 3):
        reader.refuse("it does not begin as one")
    count, entries = reader.number("Q"), reader.number("Q")
    found: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.text()
        if key in found:
            reader.refuse(f"it has {quoted(key)} twice")
        found[key] = reader.value(reader.number("I"))
    return found, [place(reader) for _ in range(count)]


def place(reader: Reader) -> Place:
    """Read the name, shape, type and offset of a tensor."""
    name, dims = reader.text(), reader.number("I")
    if not 1 <= dims <= 4:
        reader.refuse(f"{quoted(name)} has {dims} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dims))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def spans(
    reader: Reader, entries: Mapping[str, Any], places: Sequence[Place]
) -> list[tuple[int, int]]:
    """Return where each tensor begins and its bytes; the reader is at the end of the header.

    As llama.cpp requires, each tensor begins where the one before ends, up to the alignment, and
    the last ends with the file. A header with another count, size or type does not fit then.
    """
    align = entries.get("general.alignment", 32)
    if type(align) is not int or align < 1 or align & (align - 1):
        reader.refuse(f"its alignment is {brief(align)}, not a power of two")
    start, at, found = -(-reader.at // align) * align, 0, []
    seen: set[str] = set()
    for name, shape, kind, offset in places:
        if name in seen:
            reader.refuse(f"it has {quoted(name)} twice")
        if offset != at:
            reader.refuse(f"{quoted(name)} does not begin where the tensor before it ends")
        size = _size(reader, name, shape, kind)
        seen.add(name)
        found.append((start + at, size))
        if start + at + size > len(reader.data):
            reader.refuse(f"it ends early: {quoted(name)} goes past its end")
        at += -(-size // align) * align
    if len(reader.data) > max(start + at, reader.at):
        reader.refuse("it goes on after its last tensor")
    return found


def _size(reader: Reader, name: str, shape: tuple[int, ...], kind: int) -> int:
    """Return the bytes of a tensor."""
    if kind not in _SIZES:
        reader.refuse(f"{quoted(name)} is of type {kind}")
    block, record = _SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        reader.refuse(f"{quoted(name)} has rows of {shape[-1]}, not of blocks of {block}")
    return math.prod(shape) // block * record


def _tensor(reader: Reader, name: str, shape: tuple[int, ...], kind: int) -> np.ndarray:
    size = math.prod(shape)
    if kind in _DTYPES:
        dtype = _DTYPES[kind]
        return np.frombuffer(reader.take(size * dtype.itemsize), dtype).reshape(shape)
    if kind != _Q8_0 or shape[-1] % 32:
        reader.refuse(
            f"{quoted(name)} is of type {brief(kind)}; an adapter is F32, F16, BF16, Q8_0"
        )
    blocks = np.frombuffer(reader.take(size // 32 * 34), np.uint8).reshape(*shape[:-1], -1)
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
