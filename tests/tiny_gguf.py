"""A tiny random model of the Llama family as a quantized GGUF file."""

from pathlib import Path
from typing import Any

import gguf
from llama import Config
from param_tree import names
from tiny_llama import tiny_tensors
from tokenizers import pre_tokenizers

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def write_gguf(path: Path, entries: dict[str, Any]) -> Path:
    """Write what llama.cpp's converter makes of `write_model(folder, entries)`.

    Matrices are stored in Q4_1, and the embedding in Q8_0.
    """
    e, writer = entries, gguf.GGUFWriter(path, "llama")
    heads, kv = e["num_attention_heads"], e["num_key_value_heads"]
    writer.add_block_count(e["num_hidden_layers"])
    writer.add_context_length(e["max_position_embeddings"])
    writer.add_embedding_length(e["hidden_size"])
    writer.add_feed_forward_length(e["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_freq_base(e["rope_theta"])
    writer.add_layer_norm_rms_eps(e["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "12"]
    writer.add_token_list([*tokens, *(f"<{i}>" for i in range(e["vocab_size"] - len(tokens)))])
    writer.add_token_types([1] * 256 + [3, 1] + [3] * (e["vocab_size"] - 258))
    writer.add_token_merges(["1 2"])
    writer.add_eos_token_id(e["eos_token_id"])
    raw = tiny_tensors(entries)
    sizes = Config(*(0,) * 2, 0, e["num_hidden_layers"], *(0,) * 4, tied=e["tie_word_embeddings"])
    for _, name, hf in names(sizes):
        value, count = raw[hf], {"attn_q": heads, "attn_k": kv}.get(name.split(".")[-2])
        if count:  # the two numbers that RoPE rotates are next to each other
            value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if value.ndim == 1:
            writer.add_tensor(name, value)
            continue
        kind = Q8_0 if name.startswith("token_embd") else Q4_1
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
