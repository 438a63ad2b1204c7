"""A checkpoint in Hugging Face's layout: its tensors by name, its files, its configuration."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora._paths import quoted
from jlora.cli._safetensors import Entry, header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
# The names of input embeddings, for heads that are tied to them.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
HEADS = ("lm_head", "embed_out", "output")
_LANGUAGE = ("ForCausalLM", "LMHeadModel")  # classes of transformers whose head is "lm_head"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, by name.

    Attributes:
        folder: the folder, or the file.
        entries: where each tensor is, in the order of files and bytes.
        files: the names of each file's tensors, by the file's name.
        metadata: of each file, by name.
        config: config.json; empty without one.
    """

    folder: Path
    entries: Mapping[str, Entry]
    files: Mapping[str, list[str]]
    metadata: Mapping[str, dict[str, str]]
    config: Mapping[str, Any]

    @property
    def carried(self) -> list[Path]:
        """The files besides weights: configuration, tokenizer, model card."""
        if self.folder.is_file():
            return []
        found = (f for f in sorted(self.folder.iterdir()) if f.is_file())
        return [f for f in found if f.suffix not in _WEIGHTS and not f.name.endswith(".index.json")]

    def tied_to(self, head: str) -> str | None:
        """Return the embedding whose weight an output head shares, if it has none of its own."""
        if head in self.entries or not is_head(head) or not self.ties:
            return None
        names = [name for name in self.entries if is_embedding(name)]
        return names[0] if len(names) == 1 else None

    @property
    def has_tied_head(self) -> bool:
        """Whether this is a language model whose head is the embedding."""
        said = self.config.get("architectures")
        names = [str(x) for x in said] if isinstance(said, list) else []
        return (
            self.ties
            and any(name.endswith(_LANGUAGE) for name in names)
            and not any(is_head(name) for name in self.entries)
        )

    @property
    def ties(self) -> bool:
        """Whether the head is the embedding; what config.json omits is true in many models."""
        text = self.config.get("text_config", {})
        said = self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
        return bool(said)


def is_embedding(name: str) -> bool:
    """Whether a tensor belongs to an embedding of tokens."""
    return name.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS


def is_head(name: str) -> bool:
    """Whether this is the weight of an output head."""
    return name.removesuffix(".weight").rpartition(".")[2] in HEADS and name.endswith(".weight")


def open_checkpoint(path: Path, call: str) -> Checkpoint:
    """Read the headers of a folder's safetensors files, or of one file."""
    if path.is_file():
        files = [path]
    elif not path.is_dir():
        raise FileNotFoundError(f"`{call}`: there is no {path}. Pass a folder or a file.")
    else:
        files = _files(path, call)
    entries: dict[str, Entry] = {}
    by_file, metadata = {}, {}
    for file in files:
        found, metadata[file.name] = header(file, call)
        for name in found:
            if name in entries:
                raise ValueError(
                    f"`{call}`: {quoted(name)} is in {entries[name].file.name} and in {file.name}. "
                    "Remove the file that is not part of the checkpoint."
                )
        entries |= found
        by_file[file.name] = list(found)
    config = path / CONFIG
    said = read_json(config, call) if path.is_dir() and config.is_file() else {}
    return Checkpoint(path, entries, by_file, metadata, said)


def _files(folder: Path, call: str) -> list[Path]:
    """Return the files that the index lists, or the only one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        weights = read_json(indices[0], call).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(x, str) for x in weights.values()):
            raise ValueError(f'`{call}`: {indices[0].name} has no "weight_map". Copy it again.')
        files = [folder / name for name in dict.fromkeys(weights.values())]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise FileNotFoundError(
                    f"`{call}`: {indices[0].name} lists {quoted(file.name)}, which is not in "
                    f"{folder}. Copy it too."
                )
        return sorted(files)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and (folder / SINGLE) in files:
        files = [folder / SINGLE]
    if len(files) != 1:
        pickles = sorted(p.name for end in (".bin", ".pt", ".pth") for p in folder.glob(f"*{end}"))
        why = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors file"
        hint = f" {pickles[0]} is a pickle, which is never loaded." if pickles else ""
        raise FileNotFoundError(
            f"`{call}`: {folder} has {why}.{hint} Save the model with "
            "`model.save_pretrained(folder)` of transformers."
        )
    return files


def read_json(file: Path, call: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"`{call}`: {file.name} is not a JSON object. Copy it again.")
    return found
