"""A tiny random model of the Llama family, written to disk as Hugging Face lays it out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}


def tiny_tensors(entries: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, each (out, in)."""
    e, random = entries, np.random.default_rng(0)
    width, hidden = e["hidden_size"], e["intermediate_size"]
    kv = width // e["num_attention_heads"] * e["num_key_value_heads"]
    shapes = {"model.embed_tokens": (e["vocab_size"], width), "model.norm": (width,)}
    if not e["tie_word_embeddings"]:
        shapes["lm_head"] = (e["vocab_size"], width)
    for i in range(e["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.q_proj": (width, width), f"{at}.self_attn.k_proj": (kv, width)}
        shapes |= {f"{at}.self_attn.v_proj": (kv, width), f"{at}.self_attn.o_proj": (width, width)}
        shapes |= {f"{at}.mlp.gate_proj": (hidden, width), f"{at}.mlp.up_proj": (hidden, width)}
        shapes |= {f"{at}.mlp.down_proj": (width, hidden), f"{at}.input_layernorm": (width,)}
        shapes |= {f"{at}.post_attention_layernorm": (width,)}
    draw = lambda shape: random.normal(0, 0.2, shape) + (1.0 if len(shape) == 1 else 0.0)
    return {f"{name}.weight": draw(shape).astype(np.float32) for name, shape in shapes.items()}


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: 256 bytes and an end mark."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def write_model(folder: Path, entries: dict[str, Any]) -> Path:
    """Write config.json, model.safetensors and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    save_file(tiny_tensors(entries), folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
