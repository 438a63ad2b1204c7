"""Hugging Face directories: config.json, *.safetensors (one file or shards) and tokenizer.json."""

import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from families import hf_config
from llama import Config
from param_tree import Model, Store, build, names
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from jlora import bitsandbytes
from jlora.quant import QuantArray

DTYPES = ("F32", "F16", "BF16")  # of weights that are not quantized
NF4 = "quant_state.bitsandbytes__nf4"  # what bitsandbytes adds to the name of a 4-bit weight
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4)


class Tensor(NamedTuple):
    """Where a tensor is, and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_directory(
    path: Path,
    layers: int | None = None,
    dtype: str = "float32",
    keep: bool = False,
    store: Store | None = None,
) -> Model:
    """Read a model of one of the `families`, and convert its weights to `dtype`.

    With `keep`, the 4-bit weights of bitsandbytes stay as they are in the files; `store` is that of
    `build`.
    """
    entries = read_json(path / "config.json")
    config, stop = hf_config(path, entries, layers)
    config = dataclasses.replace(config, dtype=dtype)
    check_quantization(path, entries.get("quantization_config"))
    found = list_tensors(path)
    stored = {name for name in found if f"{name}.{NF4}" in found}
    shapes = {name: x.shape for name, x in found.items() if x.dtype in DTYPES}
    shapes |= {name: stored_state(path, found, name)["shape"] for name in stored}
    check_all_read(path, hf_config(path, entries, None)[0], found, stored)
    tokenizer = read_tokenizer(path / "tokenizer.json")

    def read(name: str) -> Any:
        if name not in stored:
            return read_tensor(found, name).astype(np.float32)
        weight = read_stored(path, found, name)
        return weight if keep else np.asarray(weight.dequantize().astype(jnp.float32))

    return config, build(config, shapes, read, 1, path, store), tokenizer, stop


def list_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of all files, by name."""
    found = {}
    for file in shards(path):
        with open_shard(file) as shard:
            for name in shard.keys():
                tensor = shard.get_slice(name)
                found[name] = Tensor(file, tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def read_tensor(found: dict[str, Tensor], name: str) -> np.ndarray:
    with open_shard(found[name].file) as shard:
        return np.asarray(shard.get_tensor(name))


def check_all_read(path: Path, config: Config, found: dict[str, Tensor], stored: set[str]) -> None:
    """Raise for weights that the model has no place for: it would be another model without them."""
    known = {name for _, _, name in names(config)}
    known |= {f"{name}.{part}" for name in stored for part in PARTS}
    idle = "rotary_emb.inv_freq"  # in old files, and computed here
    rest = [name for name in found if name not in known and not name.endswith(idle)]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tied and head in rest and embedding in found:
        if np.array_equal(read_tensor(found, head), read_tensor(found, embedding)):
            rest.remove(head)
    if rest:
        some = ", ".join(name[:80] for name in sorted(rest)[:3])
        raise ValueError(
            f"`--model {path}`: its files have {len(rest)} weights that the model of its "
            f"config.json does not have, such as {some}."
        )


def check_quantization(path: Path, entries: Any) -> None:
    """Raise unless the weights are not quantized, or in bitsandbytes's nf4."""
    if entries is None:
        return
    keys = ("quant_method", "load_in_4bit", "bnb_4bit_quant_type")
    if not isinstance(entries, dict) or [entries.get(key) for key in keys] != [
        *("bitsandbytes", True, "nf4")
    ]:
        raise ValueError(
            f"`--model {path}`: quantization_config={reprlib.repr(entries)} is not implemented "
            "here; the examples read bitsandbytes's 4-bit weights of type nf4."
        )


def stored_state(path: Path, found: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The shape of a 4-bit weight, (out, in), and its dtype."""
    try:
        state = json.loads(bytes(read_tensor(found, f"{name}.{NF4}").astype(np.uint8)))
        return {"shape": tuple(map(int, state["shape"])), "dtype": state["dtype"]}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`--model {path}`: {name}.{NF4} is not what bitsandbytes writes ({error!r:.100}). "
            "Download it again."
        ) from error


def read_stored(path: Path, found: dict[str, Tensor], name: str) -> QuantArray:
    """A 4-bit weight, (out, in); no byte changes."""
    parts = [name, *(f"{name}.{part}" for part in PARTS)]
    tensors = {part: read_tensor(found, part) for part in parts if part in found}
    try:
        return bitsandbytes.from_tensors(tensors, name)
    except (ValueError, KeyError) as error:
        raise ValueError(f"`--model {path}`: {error.args[0]}") from error


def read_sizes(path: Path, layers: int | None = None) -> Config:
    """The sizes of the model, from config.json alone."""
    return hf_config(path, read_json(path / "config.json"), layers)[0]


def shards(path: Path) -> list[Path]:
    """The files of the weights: one, those of the index, or without either all there are."""
    index, alone = path / "model.safetensors.index.json", path / "model.safetensors"
    if alone.is_file() or not index.is_file():
        files = [alone] if alone.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"`--model {path}`: there are no *.safetensors files in it.")
        return files
    listed = read_json(index).get("weight_map")
    named = [*listed.values()] if isinstance(listed, dict) else []
    if not named or not all(isinstance(x, str) and Path(x).name == x for x in named):
        raise ValueError(f"`--model {path}`: {index.name} does not map weights to files in it.")
    files = sorted({*named})
    for name in files:
        if len(name) > 255 or not (path / name).is_file():
            raise FileNotFoundError(
                f"`--model {path}`: there is no {reprlib.repr(name)}, which {index.name} lists."
            )
    return [path / name for name in files]


def open_shard(file: Path) -> Any:
    """Open one file; framework "flax" because NumPy has no bfloat16."""
    try:
        return safe_open(file, framework="flax")
    except SafetensorError as error:
        raise ValueError(
            f"`--model {file.parent}`: {file.name} is not a complete safetensors file "
            f"({str(error)[:200]}); it may be truncated. Download it again."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read one JSON object."""
    if not file.is_file():
        raise FileNotFoundError(
            f"`--model {file.parent}`: there is no {file.name} in it. Give a directory with "
            "config.json, *.safetensors and tokenizer.json."
        )
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`--model {file.parent}`: {file.name} is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`--model {file.parent}`: {file.name} is not a JSON object.")
    return entries


def read_tokenizer(file: Path) -> Tokenizer:
    """Read tokenizer.json, with padding and truncation turned off."""
    read_json(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        why = str(error)
        why = why if len(why) < 300 else f"{why[:100]}...{why[-200:]}"
        raise ValueError(f"`--model {file.parent}`: {file.name}: {why}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
