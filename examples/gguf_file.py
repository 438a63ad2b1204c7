"""GGUF files (llama.cpp): dequantized weights, sizes and tokenizer from one file."""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama import Config
from param_tree import Model, Store, build, names
from rope import Divided, Linear
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import jlora.gguf

GGML = "tokenizer.ggml"
# The architectures, and what they add to Llama's `Config`.
ARCHITECTURES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
# The keys of an architecture that are used, or that change no numbers.
KEYS = set(
    """vocab_size context_length embedding_length block_count feed_forward_length
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scaling.type
    rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    tensor_data_layout""".split()
)
ROPE_FREQS = "rope_freqs.weight"  # divisors of the frequencies, which Llama 3.1 and later have
# How text is cut before the merges of byte-level BPE. Those without an expression use GPT-2's.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": [],
    "llama-bpe": [pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated")],
}


def read_gguf(
    path: Path,
    layers: int | None = None,
    dtype: str = "float32",
    keep: bool = False,
    store: Store | None = None,
) -> Model:
    """Read a GGUF file of one of the `ARCHITECTURES`, whatever its quantization.

    With `keep`, quantized weights stay as they are in the file; `store` is that of `build`.
    """
    fields, tensors = open_gguf(path)
    try:
        config, stop = gguf_config(path, fields, tensors, layers), fields[f"{GGML}.eos_token_id"]
        config = dataclasses.replace(config, dtype=dtype)
        tokenizer = gguf_tokenizer(path, fields)
    except KeyError as error:
        raise ValueError(f"`--model {path}`: its metadata lacks the key {error}.") from error

    rest = {*tensors} - {cpp for _, cpp, _ in names(gguf_config(path, fields, tensors, None))}
    if rest - {ROPE_FREQS}:
        raise ValueError(
            f"`--model {path}`: it has {len(rest)} weights that the model of its metadata does not "
            f"have, such as {', '.join(sorted(rest)[:3])}."
        )
    kept = jlora.gguf.read(path) if keep else {}  # with q and k as `unpermute` returns them

    def read(name: str) -> Any:
        if keep:
            return kept.pop(name)
        value = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)  # (out, in)
        if fields["general.architecture"] != "llama":
            return value
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
        jlora.gguf.check(path)  # the reader believes the lengths of a damaged file
    except ValueError as error:
        raise ValueError(f"`--model {path}`: {error}") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"`--model {path}`: this is not a complete GGUF file ({error}). It may be truncated; "
            "copy it again."
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def gguf_config(path: Path, fields: dict, tensors: dict, layers: int | None) -> Config:
    """The sizes, from the metadata. Raises if the model needs what this decoder lacks."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"`--model {path}`: architecture {kind!r} is unknown here; this example reads GGUF "
            f"files of {', '.join(ARCHITECTURES)}, and other models as Hugging Face directories."
        )
    own = [key for key in fields if key.startswith(f"{kind}.")]
    given = {key.removeprefix(f"{kind}."): fields[key] for key in own}
    for key, value in given.items():
        if key not in KEYS:
            raise ValueError(
                f"`--model {path}`: its metadata has {kind}.{key}={reprlib.repr(value)}, which may "
                "change the numbers and is not implemented here."
            )
    try:
        width, heads = given["embedding_length"], given["attention.head_count"]
        head_dim, blocks = given.get("attention.key_length", width // heads), given["block_count"]
        if not 0 < blocks <= len(tensors):
            raise ValueError(f"`--model {path}`: {kind}.block_count={blocks} is not its own.")
        for key in ("rope.dimension_count", "attention.value_length"):
            if given.get(key, head_dim) != head_dim:
                raise ValueError(
                    f"`--model {path}`: {kind}.{key}={given[key]}, where a head has {head_dim} "
                    "numbers, is not implemented here."
                )
        return Config(
            vocab=len(fields[f"{GGML}.tokens"]),
            width=width,
            hidden=given["feed_forward_length"],
            layers=min(layers or blocks, blocks),
            heads=heads,
            kv_heads=given.get("attention.head_count_kv", heads),
            head_dim=head_dim,
            context=given["context_length"],
            rope_theta=given.get("rope.freq_base", 10000.0),
            rope_scaling=gguf_scaling(path, given, tensors),
            norm_eps=given["attention.layer_norm_rms_epsilon"],
            tied="output.weight" not in tensors,
            **ARCHITECTURES[kind],
        )
    except KeyError as error:
        raise ValueError(f"`--model {path}`: its metadata lacks the key {kind}.{error}.") from error


def gguf_scaling(path: Path, given: dict, tensors: dict) -> Divided | Linear | None:
    """How the context was extended."""
    kind = given.get("rope.scaling.type", "none")
    if kind == "none" and ROPE_FREQS in tensors:
        return Divided(tuple(map(float, tensors[ROPE_FREQS].data)))
    if kind == "none":
        return None
    if kind == "linear" and ROPE_FREQS not in tensors:
        return Linear(float(given["rope.scaling.factor"]))
    raise ValueError(f"`--model {path}`: rope scaling ({kind}) is not implemented here.")


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the pair (i, i + D/2) of a head is adjacent."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])  # (H, 2, D/2, C)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`: the two halves that `rope.rotate` rotates."""
    rows = weight.reshape(heads, -1, 2, weight.shape[1])  # (H, D/2, 2, C)
    return rows.swapaxes(1, 2).reshape(weight.shape)


def gguf_tokenizer(path: Path, fields: dict) -> Tokenizer:
    """Byte-level BPE from the metadata; only the pre-tokenizers of SPLITS are supported."""
    model, kind = fields[f"{GGML}.model"], fields.get(f"{GGML}.pre")
    if model != "gpt2" or kind not in SPLITS:
        raise ValueError(
            f"`--model {path}`: its tokenizer ({model}, {kind}) is not one of those "
            f"supported here: byte-level BPE with the pre-tokenizers {', '.join(SPLITS)}."
        )
    tokens, types = fields[f"{GGML}.tokens"], fields[f"{GGML}.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields[f"{GGML}.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=kind == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    words = any(isinstance(split, pre_tokenizers.Split) for split in SPLITS[kind])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[kind], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    of = lambda kind: [t for t, n in zip(tokens, types, strict=True) if n == kind]
    special, added = of(gguf.TokenType.CONTROL), of(gguf.TokenType.USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer
