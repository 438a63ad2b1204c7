"""Read the tensors of a model's checkpoint one by one, from safetensors files or a mapping."""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora._paths import brief, quoted

_FLOATS = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2},
}
_INDEX, _FILE = "model.safetensors.index.json", "model.safetensors"
_LONGEST = 100_000_000  # the safetensors library's own limit of a header


class Tensor(NamedTuple):
    """The shape of a tensor, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Weights:
    """Tensors by name; each is read on access and not cached."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_weights(checkpoint: Any, call: str) -> Weights:
    """Open a Hugging Face directory, a safetensors file or a mapping from names to arrays."""
    if isinstance(checkpoint, Mapping):
        return Weights({name: _of_array(name, x, call) for name, x in checkpoint.items()})
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(
            f"`{call}`: the checkpoint is a {type(checkpoint).__name__}; give the folder of the "
            "model, a safetensors file, or a mapping from names to arrays."
        )
    tensors: dict[str, Tensor] = {}
    for file in _files(Path(checkpoint), call):
        tensors |= _header(file, call)
    return Weights(tensors)


def _of_array(name: str, x: Any, call: str) -> Tensor:
    if not hasattr(x, "shape") or not hasattr(x, "__array__"):
        raise TypeError(
            f'`{call}`: "{name}" of the checkpoint is a {type(x).__name__}; give arrays. Of '
            "PyTorch's tensors take `x.float().numpy()`."
        )
    return Tensor(tuple(x.shape), lambda: np.asarray(x))


def _files(place: Path, call: str) -> list[Path]:
    """Return the safetensors files of a model."""
    if place.is_file():
        return [place]
    if (place / _INDEX).is_file():
        shards = _shards(place / _INDEX, call)
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(
                    f"`{call}`: {_INDEX} names {quoted(shard.name)}, which does not exist. "
                    "Copy the folder again."
                )
        return shards
    if (place / _FILE).is_file():
        return [place / _FILE]
    files = sorted(p for p in place.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if not files:
        pickles = [p.name for p in place.glob("*.bin")]
        why = f" {pickles[0]} is a pickle, which is never loaded; convert it." if pickles else ""
        raise FileNotFoundError(f"`{call}`: there is no {_FILE} in {place}.{why}")
    return files


def _shards(index: Path, call: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`{call}`: {_INDEX} cannot be read: {str(error)[:200]}.") from None
    return [index.parent / name for name in names]


def _header(file: Path, call: str) -> dict[str, Tensor]:
    """Read the position of each floating-point tensor, checked against the size of the file."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST):
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            dtype = np.dtype(_FLOATS.get(entry["dtype"], np.uint8))
            shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            count = math.prod(shape)
            is_float = entry["dtype"] in _FLOATS
            if min(shape, default=0) < 0 or not 0 <= start <= stop <= size - 8 - length:
                raise ValueError(f"{quoted(name)} reaches beyond the file")
            if is_float and stop - start != count * dtype.itemsize:
                raise ValueError(f"{quoted(name)} has {stop - start} bytes for {brief(shape)}")
            if is_float:
                where = (8 + length + start, stop - start)
                found[name] = Tensor(shape, functools.partial(_read, file, *where, dtype, shape))
    except (
        ValueError,
        ArithmeticError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"`{call}`: {file.name} is not a complete safetensors file: {str(error)[:200]}. It may "
            "be cut off; copy it again."
        ) from None
    return found


def _read(
    file: Path, offset: int, length: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    return np.fromfile(file, np.uint8, length, offset=offset).view(dtype).reshape(shape)
