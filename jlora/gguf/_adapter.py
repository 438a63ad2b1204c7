"""Write adapters as GGUF files for llama.cpp: `llama-cli -m model.gguf --lora adapter.gguf`.

    <tensor>.lora_a  (r, in)        <tensor>.lora_b  (out, r)        s = alpha / r, per tensor

One alpha scales all tensors, so s is multiplied into B and alpha is left out, which llama.cpp reads
as a scale of 1. The rows of q and k of Llama's family are in another order in GGUF, those of
interleaved rotary embeddings, and so are the rows of their B.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jlora._modules import Module
from jlora._paths import near_misses

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
_DTYPES = ("float32", "float16")


def save(
    file: str | os.PathLike[str],
    modules: Sequence[Module],
    config: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Write a LoRA as a GGUF adapter, with s in B.

    Args:
        file: the file to write, adapter.gguf.
        modules: the updates, with Hugging Face's names.
        config: the base's config.json: `model_type`, `num_hidden_layers`, `num_attention_heads`,
            `num_key_value_heads`, `tie_word_embeddings`.
        dtype: "float32" or "float16", of A and B.

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
        ...     reader = gguf.GGUFReader(f"{folder}/adapter.gguf")
        ...     [tensor.name for tensor in reader.tensors]
        ['blk.0.ffn_up.weight.lora_a', 'blk.0.ffn_up.weight.lora_b']

    Reference: llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.cpp`.
    """
    call = f"jlora.gguf.save({os.fspath(file)!r}, modules, config)"
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"`{call}`: the order of the weights of model_type {kind!r} in GGUF is not known here. "
            f"Known are {', '.join(_ARCHITECTURES)}. Merge the adapter, `jlora merge`, and convert "
            "the result with llama.cpp's `convert_hf_to_gguf.py`."
        )
    if dtype not in _DTYPES:
        raise ValueError(f"`{call}`: dtype={dtype!r}; it must be one of {', '.join(_DTYPES)}.")
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        name = _name(module, config, call)
        a, b = _factors(module, config, call)
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(a.astype(dtype))
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(b.astype(dtype))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[kind][0]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    for name, x in sorted(tensors.items()):
        writer.add_tensor(name, x)
    writer.write_header_to_file(Path(file))
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    architecture, _ = _ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, int(config.get("num_hidden_layers", 0)))
    found = names.get_name(f"{module.name}.weight", try_suffixes=(".weight",))
    if found is None:
        known = [name for name in names.mapping if name.startswith("model.")]
        raise ValueError(
            f'`{call}`: "{module.name}" is no tensor of {config["model_type"]} in GGUF. '
            f"{near_misses(module.name, known)}"
        )
    return found


def _factors(module: Module, config: Mapping[str, Any], call: str) -> tuple[Any, Any]:
    """Return A and `s B`, with the rows of B in GGUF's order."""
    a, b = module.a.astype(np.float32), module.b.astype(np.float32) * np.float32(module.scaling)
    if module.kind == "embedding":
        return a.T, b  # llama.cpp looks rows of A up
    if module.kind != "linear":
        raise ValueError(
            f'`{call}`: "{module.name}" is a convolution, which llama.cpp does not adapt. Merge '
            "the adapter, `jlora merge`, and convert the result."
        )
    last = module.name.rpartition(".")[2]
    if not _ARCHITECTURES[config["model_type"]][1] or last not in ("q_proj", "k_proj"):
        return a, b
    heads = config.get("num_attention_heads")
    if last == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or heads < 1 or len(b) % (2 * heads):
        raise ValueError(
            f'`{call}`: "{module.name}" has {len(b)} outputs, which {heads} heads do not divide. '
            "Is this the base's config.json?"
        )
    return a, _permuted(b, heads)


def _permuted(b: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of every head: of rows `(out, r)`."""
    halves = b.reshape(heads, 2, len(b) // heads // 2, *b.shape[1:])
    return halves.swapaxes(1, 2).reshape(b.shape)
