"""Read and write GGUF adapters of llama.cpp: `llama-cli -m model.gguf --lora adapter.gguf`.

    <tensor>.lora_a  (r, in)        <tensor>.lora_b  (out, r)        s = alpha / r, per tensor

One alpha scales all tensors. Where those of the modules differ, s is multiplied into B and alpha is
left out, which llama.cpp reads as a scale of 1. Rows of q and k of Llama's family are in another
order in GGUF, that of interleaved rotary embeddings, and so are the rows of their B.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from jlora._disk import replacing_files
from jlora._modules import Module, check_pair, scaled
from jlora._paths import brief, near_misses, quoted
from jlora.gguf._entries import entries_of

# transformers' model_type: GGUF's architecture, and whether q and k are permuted.
_ARCHITECTURES: dict[str, tuple[Any, bool]] = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
    "gemma": (gguf.MODEL_ARCH.GEMMA, False),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, False),
    "gemma3_text": (gguf.MODEL_ARCH.GEMMA3, False),
}
_DTYPES = ("float32", "float16", "bfloat16")
# What llama.cpp can adapt in these architectures, by Hugging Face's names.
_OUTSIDE = ("model.embed_tokens", "lm_head")
_INSIDE = [f"self_attn.{x}_proj" for x in "qkvo"] + [
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
]
_ALPHA = "adapter.lora.alpha"


def save(
    file: str | os.PathLike[str],
    modules: Sequence[Module],
    config: Mapping[str, Any],
    dtype: str | None = None,
) -> None:
    """Write a LoRA as a GGUF adapter.

    Args:
        file: the file to write, adapter.gguf.
        modules: the updates, with Hugging Face's names.
        config: the base's config.json: `model_type`, `num_hidden_layers`, `num_attention_heads`,
            `num_key_value_heads`, `tie_word_embeddings`.
        dtype: "float32", "float16" or "bfloat16", of A and B; by default their own, and float32
            where s is multiplied into B.

    Raises:
        ValueError: the architecture is not known; a module has no tensor in it; DoRA; a head that
            is tied to the embedding; heads that do not divide q or k.

    Example:
        >>> import tempfile
        >>> config = {"model_type": "qwen2", "num_hidden_layers": 1}
        >>> a, b = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
        >>> module = Module("model.layers.0.mlp.up_proj", a, b, 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/adapter.gguf", [module], config)
        ...     (module,) = load(f"{folder}/adapter.gguf", config)
        >>> module.name, module.a.shape, module.b.shape, module.scaling
        ('model.layers.0.mlp.up_proj', (2, 4), (6, 2), 0.5)

    Reference: llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.cpp`.
    """
    call = f"jlora.gguf.save({os.fspath(file)!r}, modules, config)"
    architecture = architecture_of(config, call)
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"`{call}`: dtype={dtype!r}; it must be one of {', '.join(_DTYPES)}.")
    alpha = scaled(modules, "alpha") or None
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        name = _name(module, config, call)
        for part, x in zip("ab", _factors(module, config, alpha is None, call), strict=True):
            tensors[f"{name}.lora_{part}"] = x if dtype is None else x.astype(jnp.dtype(dtype))
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(_ALPHA, alpha)
    for name, x in sorted(tensors.items()):
        x, raw = np.ascontiguousarray(x), None
        if x.dtype == jnp.bfloat16:  # which the writer knows as bytes
            x, raw = x.view(np.uint8), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, x, raw_dtype=raw)
    with replacing_files(Path(file).parent) as new, contextlib.closing(writer):
        writer.write_header_to_file(new / Path(file).name)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def load(file: str | os.PathLike[str], config: Mapping[str, Any]) -> list[Module]:
    """Read a GGUF adapter.

    Args:
        file: an adapter of llama.cpp; its tensors are F32, F16, BF16 or Q8_0, which is dequantized.
        config: the base's config.json, as for `save`: GGUF has no names of modules and another
            order of q and k.

    Returns:
        The updates, by Hugging Face's names; A and B have the file's dtype.

    Raises:
        ValueError: the file is damaged, is not a LoRA, or is one of another architecture; a tensor
            that is not in it; A or B is missing or has another rank.
        FileNotFoundError: there is no such file.

    Example:
        See `save`.

    Reference: llama.cpp's `llama-adapter.cpp`.
    """
    call = f"jlora.gguf.load({os.fspath(file)!r}, config)"
    if not Path(file).is_file():
        raise FileNotFoundError(f"`{call}`: there is no such file.")
    architecture = architecture_of(config, call)
    said, tensors = entries_of(Path(file), call)
    kinds = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": architecture,
    }
    for key, value in kinds.items():
        if said.get(key) != value:
            raise ValueError(
                f"`{call}`: its {key} is {brief(said.get(key))}, not {value!r}. "
                "Is this an adapter, and `config` its base's?"
            )
    alpha = said.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha):
        raise ValueError(f"`{call}`: its {_ALPHA} is {brief(alpha)}, not a finite number.")
    known = dict(_known(config, call))
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, x in tensors.items():
        name, _, part = key.rpartition(".")
        if part not in ("lora_a", "lora_b") or name not in known:
            raise ValueError(
                f"`{call}`: {quoted(key)} is no A or B of a tensor of {config['model_type']} that "
                f"can be adapted. {near_misses(name, known)}"
            )
        found.setdefault(name, {})[part] = x
    if not found:
        raise ValueError(f"`{call}`: the file has no tensors.")
    return [_module(known[name], parts, alpha, config, call) for name, parts in found.items()]


def _module(
    name: str, parts: Mapping[str, np.ndarray], alpha: float, config: Mapping[str, Any], call: str
) -> Module:
    a, b = parts.get("lora_a"), parts.get("lora_b")
    kind = "embedding" if name == _OUTSIDE[0] else "linear"
    a = a.T if kind == "embedding" and a is not None else a
    rank = check_pair(a, b, name, call)
    assert a is not None and b is not None
    heads = heads_of(name, len(b), config, call)
    if heads is not None:
        b = b.reshape(heads, len(b) // heads // 2, 2, -1).swapaxes(1, 2).reshape(b.shape)
    return Module(name, a, b, alpha / rank if alpha else 1.0, kind)


def _known(config: Mapping[str, Any], call: str) -> Iterator[tuple[str, str]]:
    """Pair GGUF's names of all tensors that can be adapted with the modules' own."""
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or not 0 < layers < 10_000:
        raise ValueError(
            f"`{call}`: config has num_hidden_layers {brief(layers)}. Is it the base's?"
        )
    inside = [f"model.layers.{n}.{name}" for n in range(layers) for name in _INSIDE]
    names = tensor_names(config)
    for module in (*_OUTSIDE, *inside):
        found = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if found is not None:
            yield found, module


def tensor_names(config: Mapping[str, Any]) -> Any:
    architecture, _ = _ARCHITECTURES[config["model_type"]]
    return gguf.get_tensor_name_map(architecture, int(config.get("num_hidden_layers", 0)))


def architecture_of(config: Mapping[str, Any], call: str) -> str:
    """Return GGUF's name of the model's architecture."""
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"`{call}`: the order of the weights of model_type {kind!r} in GGUF is not known here. "
            f"Known are {', '.join(_ARCHITECTURES)}. Merge the adapter, `jlora merge`, and convert "
            "the result with llama.cpp's `convert_hf_to_gguf.py`."
        )
    return gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[kind][0]]


def _name(module: Module, config: Mapping[str, Any], call: str) -> str:
    """Return the base tensor's name in GGUF."""
    if module.magnitude is not None:
        raise ValueError(
            f'`{call}`: "{module.name}" has a magnitude (DoRA), for which llama.cpp has no form. '
            "Merge the adapter, `jlora merge`, and convert the result."
        )
    tied = config.get("tie_word_embeddings", False)
    if tied and module.name.rpartition(".")[2] in ("lm_head", "embed_out"):
        raise ValueError(
            f'`{call}`: "{module.name}" is the embedding in this model, and GGUF has one tensor '
            "for both. Merge the adapter, `jlora merge`, which gives the head its own weights."
        )
    names = tensor_names(config)
    found = names.get_name(f"{module.name}.weight", try_suffixes=(".weight",))
    if found is None:
        known = [name for name in names.mapping if name.startswith("model.")]
        raise ValueError(
            f'`{call}`: "{module.name}" is no tensor of {config["model_type"]} in GGUF. '
            f"{near_misses(module.name, known)}"
        )
    return found


def _factors(
    module: Module, config: Mapping[str, Any], folded: bool, call: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return A, and B with its rows in GGUF's order, times s if `folded`."""
    a, b = module.a, module.b
    if folded:
        a, b = a.astype(np.float32), b.astype(np.float32) * np.float32(module.scaling)
    if module.kind == "embedding":
        return a.T, b  # llama.cpp looks rows of A up
    if module.kind != "linear":
        raise ValueError(
            f'`{call}`: "{module.name}" is a convolution, which llama.cpp does not adapt. Merge '
            "the adapter, `jlora merge`, and convert the result."
        )
    heads = heads_of(module.name, len(b), config, call)
    if heads is None:
        return a, b
    return a, b.reshape(heads, 2, len(b) // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)


def heads_of(name: str, rows: int, config: Mapping[str, Any], call: str) -> int | None:
    """Return the heads whose two halves GGUF interleaves, or None."""
    last = name.rpartition(".")[2]
    if not _ARCHITECTURES[config["model_type"]][1] or last not in ("q_proj", "k_proj"):
        return None
    heads = config.get("num_attention_heads")
    if last == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise ValueError(
            f'`{call}`: "{name}" has {rows} outputs, which {heads} heads do not divide. Is this '
            "the base's config.json?"
        )
    return heads
