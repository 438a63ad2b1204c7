"""The tokenizer of a Hugging Face folder as the entries of a GGUF model: byte-level BPE.

llama.cpp knows how text is cut before the merges by a name, which follows from tokenizer.json. A
tokenizer that is none of the known ones is refused: it would give other tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import gguf

from jlora._paths import brief, quoted

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = ("ByteLevel", False, False)
_BYTES_OF_WORDS = ("ByteLevel", False, True)  # cut as GPT-2 cuts
_CUTS: dict[tuple[Any, ...], str] = {
    (_BYTES_OF_WORDS,): "gpt-2",
    (("Digits", True), _BYTES_OF_WORDS): "smollm",
    (("Split", _WORDS % r"\p{N}{1,3}", "Isolated", False), _BYTES): "llama-bpe",
    (("Split", _WORDS % r"\p{N}", "Isolated", False), _BYTES): "qwen2",
}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int, call: str) -> None:
    """Write the tokens, one for each of the embedding's `rows`, the merges and the special ones."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {file}, and llama.cpp needs its tokens.")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        tokens, types = _tokens(said, rows, call)
        cut = _cut(said)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    except (AttributeError, KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"`{call}`: {file.name} is not a tokenizer of Hugging Face "
            f"({type(error).__name__}: {brief(str(error))}). Copy it again."
        ) from None
    if cut is None:
        refuse(
            call,
            "this tokenizer is none of byte-level BPE that cuts text as llama.cpp's "
            f"{', '.join(_CUTS.values())} do",
        )
    if not special.merges:
        refuse(call, "tokenizer.json has no merges, which llama.cpp requires")
    if "eos" not in special.special_token_ids:
        refuse(call, "neither tokenizer_config.json nor config.json says the token that ends text")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def refuse(call: str, why: str) -> NoReturn:
    """Refuse a folder that llama.cpp's own converter may know."""
    raise ValueError(
        f"`{call}`: {why}. Convert the folder with llama.cpp's `convert_hf_to_gguf.py --outtype "
        "f16`, which writes more models, and pass the GGUF file as BASE."
    )


def _tokens(said: Mapping[str, Any], rows: int, call: str) -> tuple[list[str], list[int]]:
    """Return all tokens and their types; rows of the embedding that have none are unused."""
    kinds = gguf.TokenType
    found = {at: (text, kinds.NORMAL) for text, at in said["model"]["vocab"].items()}
    for x in said.get("added_tokens", []):
        found[x["id"]] = (x["content"], kinds.CONTROL if x["special"] else kinds.USER_DEFINED)
    wrong = next((at for at in found if type(at) is not int or not 0 <= at < rows), None)
    if wrong is not None:
        raise ValueError(
            f"`{call}`: the token {quoted(str(found[wrong][0]))} has the number {brief(wrong)}, "
            f"and the embedding has {rows} rows. Is tokenizer.json the model's?"
        )
    pairs = [found.get(at, (f"[PAD{at}]", kinds.UNUSED)) for at in range(rows)]
    return [text for text, _ in pairs], [int(kind) for _, kind in pairs]


def _cut(said: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of what comes before the merges; None if it has none."""
    model, before = said["model"], said.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    name = _CUTS.get(tuple(map(_step, steps)))
    plain = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    whole = bool(model.get("ignore_merges")) == (name == "llama-bpe")
    normal = said.get("normalizer")
    # Qwen's is left out, as llama.cpp's own converter does: composed text is not changed by it.
    same = normal is None or (name == "qwen2" and normal == {"type": "NFC"})
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return name if plain and whole and same and not affixes else None


def _step(x: Mapping[str, Any]) -> tuple[Any, ...]:
    match x.get("type"):
        case "ByteLevel":
            return "ByteLevel", x["add_prefix_space"], x.get("use_regex", True)
        case "Digits":
            return "Digits", x["individual_digits"]
        case "Split":
            return "Split", x["pattern"].get("Regex"), x["behavior"], x["invert"]
    return (x.get("type"),)
