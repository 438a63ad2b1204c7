"""Safetensors files of adapters: their tensors, in float32, float16 or bfloat16, and metadata."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora._paths import quoted

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def read(file: Path, call: str) -> dict[str, np.ndarray]:
    """Read every tensor; the format's own checks come first, then the dtype's."""
    return read_all(file, call)[0]


def read_all(file: Path, call: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read every tensor, and the metadata."""
    data = file.read_bytes()
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`{call}`: {file.name} is not a complete safetensors file ({str(error)[:200]}); "
            "it may be cut off. Copy it again."
        ) from None
    tensors = {}
    # The reader's order varies between calls; sort, so that errors list keys in a stable order.
    for key, entry in sorted(entries, key=lambda pair: pair[0]):
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"`{call}`: {quoted(key)} in {file.name} is of dtype {entry['dtype']}; an adapter "
                "is float32, float16 or bfloat16. Cast it in PyTorch."
            )
        # Not `safetensors.numpy.load`, which knows no bfloat16.
        flat = np.frombuffer(entry["data"], np.dtype(_DTYPES[entry["dtype"]]))
        tensors[key] = flat.reshape(entry["shape"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def write(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, made contiguous because the writer ignores strides; PEFT's metadata."""
    laid = {key: np.asarray(x, order="C") for key, x in sorted(tensors.items())}
    said = {"format": "pt", **(metadata or {})}
    safetensors.numpy.save_file(laid, os.fspath(file), metadata=said)
