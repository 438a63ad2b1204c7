"""Write the adapted model as a Hugging Face directory, which transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import placing
from hf_directory import list_tensors, stored_state
from llama import Config
from param_tree import names
from safetensors.numpy import save_file

import jlora

WEIGHTS = "model.safetensors"
# The files of the source that are copied, where it has them.
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
COPIED += ("special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt")


def check_source(source: Path, folder: Path, again: bool) -> None:
    """Raise if the directory has something in it, or the model no Hugging Face files to copy.

    `again`: a merged model that the interrupted run had written is replaced.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = again and found <= {WEIGHTS, *COPIED} and folder.resolve() != source.resolve()
    if found and not ours:
        raise ValueError(f"`--merge {folder}`: there are files in it. Name a new directory.")
    if not source.is_dir():
        raise ValueError(
            f"`--merge {folder}`: {source.name} is a GGUF file, without the config.json and the "
            "tokenizer of a Hugging Face directory. Give a directory as --model."
        )


def write_merged(folder: Path, source: Path, config: Config, params: Any) -> None:
    """Merge, and write the weights in the dtypes of `source`, with its other files.

    4-bit weights are written in the dtype that they stand for.
    They are written to a temporary sibling directory, which is renamed. Several processes gather
    the weights one by one, and the first one writes.
    """
    found, tree, tensors = list_tensors(source), jlora.merge(params), {}
    for path, _, name in names(config):
        value = leaf(tree, path)
        value = value.T if path.endswith("/kernel") else value
        kinds = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        kind = kinds.get(found[name].dtype) or stored_state(source, found, name)["dtype"]
        value = placing.host(value.astype(kind))
        if placing.is_first():
            tensors[name] = np.ascontiguousarray(value)
    if not placing.is_first():
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
    for name in COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, part / name)
    entries = json.loads((part / "config.json").read_text())
    if entries.pop("quantization_config", None) is not None:  # the merged weights are not
        (part / "config.json").write_text(json.dumps(entries, indent=2))
    if folder.is_dir():
        shutil.rmtree(folder)
    part.rename(folder)


def leaf(tree: Any, path: str) -> Any:
    """The weight at a path of unstacked layers, in a tree that may be stacked."""
    layer, _, rest = path.partition("/")
    index = layer.removeprefix("layers_")
    stacked = index != layer and "layers" in tree
    node = tree["layers" if stacked else layer]
    for key in rest.split("/"):
        node = node[key]
    return node[int(index)] if stacked else node
