"""Write a Hugging Face checkpoint as a GGUF model whose matrices are stored in Q4_1.

Llama, Qwen 2 and Qwen 3, as llama.cpp's `convert_hf_to_gguf.py` and `llama-quantize --pure` write
them; the embedding and the head keep their dtype. One tensor is in memory at a time.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gguf
import jax.numpy as jnp
import numpy as np

from jlora._paths import brief, quoted
from jlora.gguf._adapter import architecture_of, heads_of, tensor_names
from jlora.gguf._tokenizer import add_tokenizer, refuse
from jlora.quant import Q4_1
from jlora.quant.ggml import records

_TYPE = gguf.GGMLQuantizationType
_FLOATS = {"F32": _TYPE.F32, "F16": _TYPE.F16, "BF16": _TYPE.BF16}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BIASES = {"llama": "qkvo", "qwen2": "qkv", "qwen3": ""}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("max_position_embeddings", "num_key_value_heads", "head_dim")
_OPTIONAL = ("num_key_value_heads", "head_dim")
_ROPES: dict[Any, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}
_ALIGN = gguf.GGUF_DEFAULT_ALIGNMENT
_CHUNK = 2**22  # weights at a time


@runtime_checkable
class Stored(Protocol):
    """A tensor of the checkpoint."""

    dtype: str
    shape: tuple[int, ...]

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray: ...


class Part(NamedTuple):
    """A tensor to write: where it comes from, and the heads whose rows are reordered."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    source: Stored | np.ndarray
    heads: int | None

    @property
    def size(self) -> int:
        block, record = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * record


def plan_folder(
    config: Mapping[str, Any], tensors: Mapping[str, Stored], call: str
) -> tuple[list[Part], list[str]]:
    """Return all tensors to write, and the names of those in 4 bits; refuse other models."""
    kind = config.get("model_type")
    if kind not in _BIASES:
        refuse(call, f"the model_type {kind!r} is none of {', '.join(_BIASES)}")
    _check(config, call)
    wanted = _wanted(config)
    own = {k: x for k, x in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if config.get("tie_word_embeddings") is True:
        own.pop(_HEAD, None)
    for name in own:
        if name not in wanted:
            refuse(call, f"{quoted(name)} is no tensor of {kind} that is known here")
    for name, must in wanted.items():
        if must and name not in own:
            refuse(call, f"BASE has no {quoted(name)}, which is part of {kind}")
    parts = [_part(name, x, config, call) for name, x in own.items()]
    divisors = _divisors(config, call)
    if divisors is not None:
        parts.append(Part("rope_freqs.weight", divisors.shape, _TYPE.F32, divisors, None))
    return parts, [part.name for part in parts if part.type == _TYPE.Q4_1]


def _check(config: Mapping[str, Any], call: str) -> None:
    """Refuse sizes that are none, and what changes numbers and has no entry in GGUF."""
    for key in _SIZES:
        x = config.get(key)
        if not (x is None and key in _OPTIONAL) and (type(x) is not int or not 0 < x < 2**31):
            raise ValueError(f"`{call}`: config.json has {key} {brief(x)}, not a size.")
    for key in ("rms_norm_eps", "rope_theta"):
        if not isinstance(config.get(key, 1.0), int | float):
            raise ValueError(f"`{call}`: config.json has {key} {brief(config[key])}, not a number.")
    for key, value in (("hidden_act", "silu"), ("use_sliding_window", False)):
        if config.get(key, value) != value:
            refuse(call, f"config.json has {key} {brief(config[key])}")


def _wanted(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return the names of all tensors that the model may have, and whether it must."""
    found = {_EMBEDDING: True, "model.norm.weight": True, _HEAD: False}
    inside = {f"self_attn.{x}_proj.weight": True for x in "qkvo"}
    inside |= {f"mlp.{x}_proj.weight": True for x in ("gate", "up", "down")}
    inside |= {f"{x}_layernorm.weight": True for x in ("input", "post_attention")}
    inside |= {f"self_attn.{x}_proj.bias": False for x in _BIASES[config["model_type"]]}
    if config["model_type"] == "qwen3":
        inside |= {f"self_attn.{x}_norm.weight": True for x in "qk"}
    for n in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{n}.{name}": must for name, must in inside.items()}
    return found


def _part(name: str, x: Stored, config: Mapping[str, Any], call: str) -> Part:
    if x.dtype not in _FLOATS or len(x.shape) not in (1, 2):
        raise ValueError(
            f"`{call}`: {quoted(name)} is {x.dtype}{list(x.shape)}; a weight has to be a matrix or "
            "a vector of F32, F16 or BF16. Start from the original weights."
        )
    module = name.rpartition(".")[0]
    found = tensor_names(config).get_name(name, try_suffixes=(".weight", ".bias"))
    kind = _FLOATS[x.dtype] if len(x.shape) == 2 else _TYPE.F32
    if len(x.shape) == 2 and x.shape[1] % 32 == 0 and name not in (_EMBEDDING, _HEAD):
        kind = _TYPE.Q4_1
    return Part(found, x.shape, kind, x, heads_of(module, x.shape[0], config, call))


def _rope(config: Mapping[str, Any]) -> Any:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _divisors(config: Mapping[str, Any], call: str) -> np.ndarray | None:
    """Return what Llama 3 divides the frequencies of RoPE by; refuse what llama.cpp has not."""
    rope, numbers = _rope(config), []
    try:
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = rope.get("partial_rotary_factor", 1) == 1
        numbers = [float(rope[key]) for key in _ROPES[kind]]
    except (AttributeError, KeyError, TypeError, ValueError):
        kind, known = None, False
    if not known:
        refuse(call, f"config.json has the rotary positions {brief(rope)}")
    if kind != "llama3":
        return None
    factor, low, high, context = numbers
    width = _head_dim(config)
    frequencies = _theta(config) ** -(np.arange(0, width, 2) / width)
    turns = context * frequencies / (2 * np.pi)  # of a pair within the old context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def _theta(config: Mapping[str, Any]) -> float:
    return float(config.get("rope_theta") or _rope(config).get("rope_theta") or 10_000.0)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def header_of(folder: Path, config: Mapping[str, Any], parts: list[Part], call: str) -> bytes:
    """Return all that comes before the first tensor."""
    writer = gguf.GGUFWriter(None, architecture_of(config, call))
    writer.add_type(gguf.GGUFType.MODEL)
    _add_sizes(writer, config)
    rows = next(part.shape[0] for part in parts if part.name == "token_embd.weight")
    add_tokenizer(writer, folder, rows, call)
    for part in parts:
        raw = (*part.shape[:-1], part.size // math.prod(part.shape[:-1]))
        writer.add_tensor_info(part.name, raw, np.dtype(np.uint8), part.size, part.type)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "header"
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = file.read_bytes()
    return header + bytes(-len(header) % _ALIGN)


def write_model(
    target: Path, header: bytes, parts: list[Part], done: Callable[[int], None]
) -> None:
    """Write the model, a tensor at a time."""
    with target.open("wb") as f:
        f.write(header)
        done(len(header))
        for part in parts:
            for piece in _pieces(part):
                f.write(piece)
                done(len(piece))
            f.write(bytes(-part.size % _ALIGN))


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_theta(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    if _rope(config).get("rope_type", _rope(config).get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_rope(config)["factor"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _pieces(part: Part) -> Iterator[bytes]:
    x = part.source
    if isinstance(x, np.ndarray):
        yield x.tobytes()
        return
    columns = math.prod(x.shape[1:])
    step = max(1, _CHUNK // columns) if part.heads is None else x.shape[0]
    for first in range(0, x.shape[0], step):
        count = min(step, x.shape[0] - first)
        w = x.read(first * columns, count * columns).reshape(count, *x.shape[1:])
        if part.heads is not None:
            w = w.reshape(part.heads, 2, -1, columns).swapaxes(1, 2).reshape(w.shape)
        yield _encoded(w, part.type)


def _encoded(w: np.ndarray, type: gguf.GGMLQuantizationType) -> bytes:
    if type == _TYPE.Q4_1:
        return records(Q4_1, Q4_1.pack(jnp.asarray(w.astype(np.float32)))).tobytes()
    return (w.astype(np.float32) if type == _TYPE.F32 else w).tobytes()
