"""Safetensors files, streamed: read a header and parts of tensors, write a header first.

safetensors' own library writes only tensors that are all in memory, and maps what it reads.

    8 bytes  length of the header, little-endian
    header   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    tensors  one after another, without gaps
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from jlora._paths import brief, quoted

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHTS = ("F64", "F32", "F16", "BF16")  # what can be added to
CHUNK = 2**23  # bytes in memory at a time
_AHEAD = 2**25  # bytes that the disk reads while others are computed
_SYNC = 2**27  # bytes after which the disk is told to begin, while others are computed
_LONGEST = 10**8  # of a header, as in safetensors


class Entry(NamedTuple):
    """Where a tensor is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    size: int  # in bytes

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return some elements, all by default, as a flat array."""
        dtype = DTYPES[self.dtype]
        count = self.size // dtype.itemsize - first if count is None else count
        at = self.start + first * dtype.itemsize
        found = np.fromfile(self.file, dtype, count, offset=at)
        if len(found) < count:
            raise ValueError(f"{self.file} ends early: it changed while it was read.")
        return found

    def read_into(self, out: np.ndarray, first: int) -> None:
        """Read as many elements as `out` has."""
        Span(self.file, self.start + first * out.itemsize, out.nbytes).read_into(as_bytes(out))


class Span(NamedTuple):
    """Bytes of a file."""

    file: Path
    start: int
    size: int

    def read_into(self, rest: memoryview) -> None:
        """Read them into memory."""
        with self.file.open("rb", buffering=0) as f:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), self.start + _AHEAD, self.size, os.POSIX_FADV_WILLNEED)
            f.seek(self.start)
            while len(rest):
                rest = rest[self._checked(f.readinto(rest)) :]

    def copy_to(self, target: BinaryIO) -> None:
        """Append them to another file: in the kernel, or through memory where it cannot."""
        at, end = self.start, self.start + self.size
        with contextlib.suppress(OSError, AttributeError), self.file.open("rb") as f:
            while at < end:
                size = os.copy_file_range(f.fileno(), target.fileno(), end - at, at)
                at += self._checked(size)
        if at < end:
            rest = bytearray(end - at)
            Span(self.file, at, end - at).read_into(memoryview(rest))
            _write_all(target, rest)

    def _checked(self, size: int | None) -> int:
        if not size:
            raise ValueError(f"{self.file} ends early: it changed while it was read.")
        return size


def header(file: Path, call: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return a file's tensors, in the order of their bytes, and its metadata."""
    size = file.stat().st_size
    with file.open("rb") as f:
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST):
            _refuse(file, "its header is cut off or too long", call)
        text = f.read(length)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _refuse(file, "its header is not a JSON object", call)
    metadata = found.pop("__metadata__", {})
    good = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
    if not good:
        _refuse(file, "its metadata is not an object of strings", call)
    entries = {name: _entry(file, name, x, 8 + length, call) for name, x in found.items()}
    entries = dict(sorted(entries.items(), key=lambda pair: pair[1].start))
    end = 8 + length
    for name, entry in entries.items():
        if entry.start != end:
            _refuse(file, f"the bytes before {quoted(name)} overlap or have a gap", call)
        end += entry.size
    if end != size:
        _refuse(file, f"it has {size} bytes where its header tells {end}", call)
    return entries, metadata


def _entry(file: Path, name: str, x: Any, offset: int, call: str) -> Entry:
    try:
        dtype, shape, (start, end) = x["dtype"], x["shape"], x["data_offsets"]
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        _refuse(file, f"the entry of {quoted(name)} is {brief(x)}", call)
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        _refuse(file, f"the entry of {quoted(name)} is {brief(x)}", call)
    if dtype not in DTYPES:
        raise ValueError(
            f"`{call}`: {quoted(name)} in {file.name} is of dtype {brief(dtype)}, which is not "
            f"supported. Supported are {', '.join(DTYPES)}."
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        _refuse(file, f"{quoted(name)} has {end - start} bytes for the shape {shape}", call)
    return Entry(file, dtype, tuple(shape), offset + start, end - start)


def _refuse(file: Path, why: str, call: str) -> NoReturn:
    raise ValueError(
        f"`{call}`: {file.name} is not a complete safetensors file: {why}. Copy it again."
    )


class Target(NamedTuple):
    """A tensor to write: its bytes come in pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes | memoryview | Span]]

    @property
    def size(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def encoded(targets: Mapping[str, Target], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file, whose tensors begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, target in targets.items():
        shape = list(target.shape)
        entries[name] = {
            "dtype": target.dtype,
            "shape": shape,
            "data_offsets": [at, at + target.size],
        }
        at += target.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def syncing() -> Generator[Callable[[Path], None]]:
    """Yield what forces a file to the disk, in a thread; at the end, every one is there."""
    with ThreadPoolExecutor(1) as pool:
        begun = []
        yield lambda file: begun.append(pool.submit(_sync, file))
        for one in begun:
            one.result()


def _sync(file: Path) -> None:
    with file.open("r+b") as f:
        os.fsync(f.fileno())


def write(
    file: Path,
    targets: Mapping[str, Target],
    metadata: Mapping[str, str],
    done: Callable[[int], None],
    sync: Callable[[Path], None],
) -> None:
    """Write a file, the header first, then one piece of a tensor after another."""
    with file.open("wb", buffering=0) as f:
        f.write(encoded(targets, metadata))
        since = 0
        for name, target in targets.items():
            written = 0
            for piece in target.pieces():
                if isinstance(piece, Span):
                    size = piece.size
                    piece.copy_to(f)
                else:
                    size = len(piece)
                    _write_all(f, piece)
                written += size
                done(size)
                since += size
                if since > _SYNC:
                    sync(file)
                    since = 0
            if written != target.size:
                raise ValueError(f"{quoted(name)} has {written} bytes, not {target.size}.")
    sync(file)


def _write_all(f: BinaryIO, piece: bytes | bytearray | memoryview) -> None:
    rest = memoryview(piece)
    while len(rest):
        rest = rest[f.write(rest) :]


def blocks(rows: int, columns: int, itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """Divide rows so that a block has about `CHUNK` bytes."""
    step = max(1, CHUNK // max(1, columns * itemsize))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def as_bytes(x: np.ndarray) -> memoryview:
    """Return the bytes of an array."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def shards_of(sizes: Mapping[str, int], most: int) -> Sequence[list[str]]:
    """Divide tensors, in order, among files of at most `most` bytes; a larger one is alone."""
    files: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not files or (total + size > most and files[-1]):
            files.append([])
            total = 0
        files[-1].append(name)
        total += size
    return files
