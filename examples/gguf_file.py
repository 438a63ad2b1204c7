"""GGUF files (llama.cpp): dequantized weights, sizes and tokenizer from one file."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama import Config
from param_tree import Model, Store, build
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import jlora.gguf

GGML = "tokenizer.ggml"


def read_gguf(
    path: Path,
    layers: int | None = None,
    dtype: str = "float32",
    keep: bool = False,
    store: Store | None = None,
) -> Model:
    """Read a GGUF file of the architecture `llama`, whatever its quantization.

    With `keep`, quantized weights stay as they are in the file; `store` is that of `build`.
    """
    fields, tensors = open_gguf(path)
    try:
        config, stop = gguf_config(path, fields, tensors, layers), fields[f"{GGML}.eos_token_id"]
        config = dataclasses.replace(config, dtype=dtype)
        tokenizer = gguf_tokenizer(path, fields)
    except KeyError as error:
        raise ValueError(f"`--model {path}`: its metadata lacks the key {error}.") from error

    kept = jlora.gguf.read(path) if keep else {}  # with q and k as `unpermute` returns them

    def read(name: str) -> Any:
        if keep:
            return kept.pop(name)
        value = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)  # (out, in)
        if ".attn_q." in name:
            return unpermute(value, config.heads)
        return unpermute(value, config.kv_heads) if ".attn_k." in name else value

    # GGUF lists the dimensions from the innermost to the outermost.
    shapes = {name: tuple(map(int, x.shape[::-1])) for name, x in tensors.items()}
    return config, build(config, shapes, read, 0, path, store), tokenizer, stop


def read_gguf_sizes(path: Path, layers: int | None = None) -> Config:
    """The sizes of the model, from the metadata alone."""
    return gguf_config(path, *open_gguf(path), layers)


def open_gguf(path: Path) -> tuple[dict, dict]:
    """The metadata and the tensors, by name; their data are mapped, not read."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"`--model {path}`: this is not a complete GGUF file ({error}); it may be truncated. "
            "Download it again."
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def gguf_config(path: Path, fields: dict, tensors: dict, layers: int | None) -> Config:
    """The sizes, from the metadata. Raises if the model needs what this decoder lacks."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(
            f"`--model {path}`: architecture {kind!r} is unknown here; the decoder of this "
            "example is of the Llama family ('llama')."
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(f"`--model {path}`: rope scaling ({scaling}) is not implemented here.")
    width, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    blocks = fields["llama.block_count"]
    return Config(
        vocab=len(fields[f"{GGML}.tokens"]),
        width=width,
        hidden=fields["llama.feed_forward_length"],
        layers=min(layers or blocks, blocks),
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", width // heads),
        context=fields["llama.context_length"],
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        tied="output.weight" not in tensors,
    )


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the pair (i, i + D/2) of a head is adjacent."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])  # (H, 2, D/2, C)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`: the two halves that `llama.rope` rotates."""
    rows = weight.reshape(heads, -1, 2, weight.shape[1])  # (H, D/2, 2, C)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def gguf_tokenizer(path: Path, fields: dict) -> Tokenizer:
    """Byte-level BPE from the metadata; only the listed pre-tokenizers are supported."""
    model, kind = fields[f"{GGML}.model"], fields.get(f"{GGML}.pre")
    splits = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
    if model != "gpt2" or kind not in splits:
        raise ValueError(
            f"`--model {path}`: its tokenizer ({model}, {kind}) is not one of those "
            f"supported here: byte-level BPE with the pre-tokenizers {', '.join(splits)}."
        )
    tokens, types = fields[f"{GGML}.tokens"], fields[f"{GGML}.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields[f"{GGML}.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[kind], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, n in zip(tokens, types, strict=True) if n == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
