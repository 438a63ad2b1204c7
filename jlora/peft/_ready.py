"""Ready names: functions from a leaf's path to Hugging Face's name, for `names=`."""

import re
from typing import Any

_ATTENTION = {f"attn/{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"}
_MLP = {f"mlp/{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def llama_names(path: str) -> str | None:
    """Name a leaf of the examples' decoder (`examples/llama.py`) as Hugging Face does.

    The names are those of Llama, Mistral, SmolLM, Qwen, Gemma and Phi-3. Layers are "layers_3/..."
    or, stacked for `scan`, "layers/...".

    Args:
        path: a leaf's path, with or without Flax's "params/" before it.

    Returns:
        The PyTorch name, with "{}" for the layer of a stacked leaf; None where there is none.

    Example:
        >>> llama_names("layers_3/attn/q_proj/kernel")
        'model.layers.3.self_attn.q_proj.weight'
        >>> llama_names("layers/mlp/up_proj/kernel")
        'model.layers.{}.mlp.up_proj.weight'
    """
    path = path.removeprefix("params/")
    top = {
        "embed/embedding": "model.embed_tokens.weight",
        "final_norm/scale": "model.norm.weight",
        "lm_head/kernel": "lm_head.weight",
    }
    norms = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_pre_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
        **{f"attn/{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    }
    fused = {"attn/qkv_proj": "self_attn.qkv_proj", "mlp/gate_up_proj": "mlp.gate_up_proj"}
    linear = _ATTENTION | _MLP | fused
    inside = {
        **{f"{ours}/kernel": f"{theirs}.weight" for ours, theirs in linear.items()},
        **{f"{ours}/bias": f"{theirs}.bias" for ours, theirs in linear.items()},
        **{f"{ours}/scale": f"{theirs}.weight" for ours, theirs in norms.items()},
    }
    layer = re.fullmatch(r"layers(?:_(\d+))?/(.+)", path)
    if layer is None or layer[2] not in inside:
        return top.get(path)
    return f"model.layers.{layer[1] or '{}'}.{inside[layer[2]]}"


def tunix_names(path: str) -> str | None:
    """Name a leaf of Tunix's Llama 3, Qwen 2 or Qwen 3 as Hugging Face does.

    Their attention kernels are einsum weights, (D, N, H) and (N, H, D): give `load` the layouts,
    `jlora.layouts(fn, params, x)`, or "ioo" and "iio".

    The experts of Qwen 3's mixture, (E, in, out) here, are one layer each in Hugging Face's
    checkpoints, and in the adapters of transformers 4: "...mlp.experts.{}.up_proj.weight".
    transformers 5 has gate and up of all experts in one parameter, "mlp.experts.gate_up_proj".
    PEFT 0.21.2 reads a file of one layer each into it, where gate and up are both adapted and the
    experts have the rank and alpha that most of the file has. What it writes over transformers 5
    holds one A for gate and up together: `load` refuses it, but for files of
    `target_parameters=["mlp.experts.down_proj"]`, with "...mlp.experts.down_proj" for a name.

    Args:
        path: a leaf's path, "layers/0/attn/q_proj/w".

    Returns:
        The PyTorch name, with "{}" for the expert; None where there is none.

    Example:
        >>> tunix_names("layers/0/attn/q_proj/w"), tunix_names("layers/0/attn/q_bias")
        ('model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.q_proj.bias')
    """
    top = {
        "embedder/input_embedding": "model.embed_tokens.weight",
        "final_norm/w": "model.norm.weight",
        "lm_head/w": "lm_head.weight",
    }
    inside = {
        **{f"{ours}/w": f"{theirs}.weight" for ours, theirs in _ATTENTION.items()},
        **{f"{ours}/kernel": f"{theirs}.weight" for ours, theirs in _MLP.items()},
        **{f"attn/{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
        **{f"attn/{x}_norm/w": f"self_attn.{x}_norm.weight" for x in "qk"},
        "mlp/router/kernel": "mlp.gate.weight",
        **{f"mlp/{x}_proj": f"mlp.experts.{{}}.{x}_proj.weight" for x in ("gate", "up", "down")},
        "input_layernorm/w": "input_layernorm.weight",
        "post_attention_layernorm/w": "post_attention_layernorm.weight",
    }
    layer = re.fullmatch(r"layers/(\d+)/(.+)", path)
    if layer is None or layer[2] not in inside:
        return top.get(path)
    return f"model.layers.{layer[1]}.{inside[layer[2]]}"


def tunix_gemma3_names(path: str) -> Any:
    """Name a leaf of Tunix's Gemma 3 (its text model) as Hugging Face does.

    `kv_einsum/w` (2, K, D, H) and `qkv_einsum/w` (3, N, D, H) are several parameters of PyTorch's,
    so they have a list of names. With the layout "oio" each has an A of its own; with "ooio", as
    `jlora.layouts` reads it, they share one, which is saved for each.

    Args:
        path: a leaf's path, "layers/0/attn/q_einsum/w".

    Returns:
        The PyTorch name or a list of them; None where there is none.

    Example:
        >>> tunix_gemma3_names("layers/0/attn/q_einsum/w")
        'model.layers.0.self_attn.q_proj.weight'
        >>> len(tunix_gemma3_names("layers/0/attn/kv_einsum/w"))
        2
    """
    top = {
        "embedder/input_embedding": "model.embed_tokens.weight",
        "final_norm/scale": "model.norm.weight",
    }
    inside = {
        "attn/q_einsum/w": "self_attn.q_proj",
        "attn/attn_vec_einsum/w": "self_attn.o_proj",
        "attn/_query_norm/scale": "self_attn.q_norm",
        "attn/_key_norm/scale": "self_attn.k_norm",
        "pre_attention_norm/scale": "input_layernorm",
        "post_attention_norm/scale": "post_attention_layernorm",
        "pre_ffw_norm/scale": "pre_feedforward_layernorm",
        "post_ffw_norm/scale": "post_feedforward_layernorm",
        **{f"{ours}/kernel": theirs for ours, theirs in _MLP.items()},
    }
    layer = re.fullmatch(r"layers/(\d+)/(.+)", path)
    if layer is None:
        return top.get(path)
    prefix, fused = f"model.layers.{layer[1]}.", re.fullmatch(r"attn/(q?kv)_einsum/w", layer[2])
    if fused:
        return [f"{prefix}self_attn.{x}_proj.weight" for x in fused[1]]
    return f"{prefix}{inside[layer[2]]}.weight" if layer[2] in inside else None
