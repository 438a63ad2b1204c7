"""Hugging Face directories: config.json, *.safetensors (one file or shards) and tokenizer.json."""

import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from llama import Config
from param_tree import Model, Store, build
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

# Options that this decoder does not implement: the key and the values that do not need it.
ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}
DTYPES = ("F32", "F16", "BF16")  # of weights; any other tensor is not read
# Llama 3's rope scaling, in the order of `Config.rope_llama3`.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_directory(
    path: Path,
    layers: int | None = None,
    dtype: str = "float32",
    keep: bool = False,
    store: Store | None = None,
) -> Model:
    """Read a model of the Llama family, in whatever dtype, and convert its weights to `dtype`."""
    entries = read_json(path / "config.json")
    config, stop = hf_config(path, entries, layers)
    config = dataclasses.replace(config, dtype=dtype)
    places, shapes = {}, {}
    for file in shards(path):
        with open_shard(file) as shard:
            for name in shard.keys():
                tensor = shard.get_slice(name)
                if tensor.get_dtype() in DTYPES:
                    places[name], shapes[name] = file, tuple(tensor.get_shape())
    tokenizer = read_tokenizer(path / "tokenizer.json")

    def read(name: str) -> np.ndarray:
        with open_shard(places[name]) as shard:
            return np.asarray(shard.get_tensor(name)).astype(np.float32)

    return config, build(config, shapes, read, 1, path, store), tokenizer, stop


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
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"`--model {path}`: {index.name} does not map weights to files in it.")
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"`--model {path}`: there is no {reprlib.repr(name)}, which {index.name} lists."
            )
    return [path / name for name in names]


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
        raise FileNotFoundError(f"`--model {file.parent}`: there is no {file.name} in it.")
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
        raise ValueError(f"`--model {file.parent}`: {file.name}: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def hf_config(path: Path, entries: dict[str, Any], layers: int | None) -> tuple[Config, int]:
    """The sizes and the end token. Raises if the model needs what this decoder lacks."""
    kind, classes = entries.get("model_type"), entries.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or "LlamaForCausalLM" not in classes:
        classes, kind = reprlib.repr(classes), reprlib.repr(kind)
        raise ValueError(
            f"`--model {path}`: architecture {classes} of model_type {kind} is unknown here; "
            "this example's decoder is of the Llama family (LlamaForCausalLM, 'llama')."
        )
    for key, harmless in ONLY.items():
        if entries.get(key, harmless[0]) not in harmless:
            raise ValueError(
                f"`--model {path}`: {key}={reprlib.repr(entries[key])} is not implemented here."
            )
    rope = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"`--model {path}`: rope scaling {reprlib.repr(kind)} is not implemented here."
        )
    stop = entries.get("eos_token_id")
    try:
        heads, width = entries["num_attention_heads"], entries["hidden_size"]
        config = Config(
            vocab=entries["vocab_size"],
            width=width,
            hidden=entries["intermediate_size"],
            layers=min(layers or entries["num_hidden_layers"], entries["num_hidden_layers"]),
            heads=heads,
            kv_heads=entries.get("num_key_value_heads") or heads,
            head_dim=entries.get("head_dim") or width // heads,
            context=entries["max_position_embeddings"],
            rope_theta=entries.get("rope_theta", rope.get("rope_theta", 10000.0)),
            norm_eps=entries.get("rms_norm_eps", 1e-6),
            tied=entries.get("tie_word_embeddings", False),
            rope_llama3=tuple(float(rope[key]) for key in LLAMA3) if kind == "llama3" else None,
        )
        return config, int(stop[0] if isinstance(stop, list) else stop)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"`--model {path}`: config.json lacks an entry, or has one of the wrong type ({error})."
        ) from error
