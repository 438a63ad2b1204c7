"""`jlora merge BASE ADAPTER [ADAPTER=0.3 ...] OUT`: merge PEFT adapters into a checkpoint.

A few rows of one tensor are in memory at a time.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jlora.cli._adapter import Adapter, Places, all_weighted, changes_of, open_adapter
from jlora.cli._changes import Change, changed, describe, plain, rounded
from jlora.cli._checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    is_embedding,
    is_head,
    open_checkpoint,
)
from jlora.cli._output import bytes_of, check_target, report, shown, write_folder
from jlora.cli._safetensors import NAMES, WEIGHTS, Target, as_bytes, shards_of

HELP = "merge adapters into a checkpoint: W + s A B, streamed, rounded once"
_HEAD = "lm_head.weight"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("base", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("adapters", nargs="+", metavar="adapter[=weight]", help="PEFT folders")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--dtype", choices=[*_DTYPES], help="of all weights; by default their own")
    parser.add_argument("--max-shard-size", type=bytes_of, help="as 5GB; by default BASE's files")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it has files")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(args: argparse.Namespace) -> None:
    """Merge."""
    call = "jlora merge BASE ADAPTER OUT"
    given = all_weighted(args.adapters, call)
    check_target(args.out, [args.base, *(path for path, _ in given)], args.overwrite, call)
    checkpoint = open_checkpoint(args.base, call)
    adapters = [(open_adapter(path, call), weight) for path, weight in given]
    changes, places = combined(adapters, checkpoint, call)
    _drop_tied_copies(changes, places, adapters)
    places = _with_old_head(changes, places, checkpoint)
    dtype = _DTYPES.get(args.dtype)
    targets = targets_of(checkpoint, changes, places, dtype)
    files = _files(checkpoint, targets, args.max_shard_size)
    untied = _unties(checkpoint, changes)
    texts = _texts(checkpoint, files, untied, args.dtype)
    said = {
        "base": str(args.base),
        "adapters": {str(a.folder): w for a, w in adapters},
        "out": str(args.out),
        "changed": describe(changes),
        "unchanged": len(targets) - len(changes),
        "new tensors": sorted(places.added),
        "keys used": {str(a.folder): f"{len(a.tensors)} of {len(a.tensors)}" for a, _ in adapters},
        "size": shown(sum(t.size for t in targets.values())),
        "files": len(files),
    }
    if untied:
        said["untied"] = "the output head has weights of its own now: tie_word_embeddings is false"
    if not args.dry_run:
        copies = [f for f in checkpoint.carried if f.name not in texts]
        write_folder(args.out, files, texts, copies, call)
    report(said, args.json, args.dry_run)


def combined(
    adapters: list[tuple[Adapter, float]], checkpoint: Checkpoint, call: str
) -> tuple[dict[str, Change], Places]:
    """Return what all adapters together change."""
    total: dict[str, Change] = {}
    places = None
    for adapter, weight in adapters:
        made, here = changes_of(adapter, weight, checkpoint, call)
        for path, change in made.items():
            old = total.setdefault(path, Change())
            new = path in here.added and here.added[path] is None
            if old.labels and (change.gain or old.gain or new):
                what = "a new tensor" if new else "DoRA, whose update is not A B alone,"
                raise ValueError(
                    f'`{call}`: "{path}" has {what} in one adapter and is changed by another too. '
                    "Merge them one after the other if that is what you mean."
                )
            if new and weight != 1:
                raise ValueError(
                    f'`{call}`: "{path}" is not in BASE, so it cannot be weighted with {weight:g}. '
                    "Give this adapter the weight 1."
                )
            for name in ("products", "values", "rows", "added", "labels"):
                getattr(old, name).extend(getattr(change, name))
            old.gain = old.gain or change.gain
        if places is None:
            places = here
        else:
            layouts = {**places.found.layouts, **here.found.layouts}
            found = type(here.found)(here.found.places, layouts, here.found.kinds)
            places = Places(found, {**places.added, **here.added})
    assert places is not None
    return total, places


def _drop_tied_copies(
    changes: dict[str, Change], places: Places, adapters: list[tuple[Adapter, float]]
) -> None:
    """Keep a head tied whose trained copy equals the embedding's."""
    added: Any = places.added
    for head, source in list(added.items()):
        pair = [changes.get(head), changes.get(source or "")]
        values = [x.values[0][1] for x in pair if x is not None and x.is_replaced]
        if source is not None and len(values) == 2 and np.array_equal(values[0], values[1]):
            del changes[head], added[head]


def _with_old_head(changes: dict[str, Change], places: Places, checkpoint: Checkpoint) -> Places:
    """Give a tied head weights of its own where only the embedding was trained, as a copy.

    PEFT trains the copy, `modules_to_save=["embed_tokens"]`, while the head stays as it was.
    """
    if not checkpoint.has_tied_head or any(is_head(name) for name in changes):
        return places
    trained = [name for name, change in changes.items() if change.values and is_embedding(name)]
    if not trained:
        return places
    changes[_HEAD] = Change(labels=["kept as it was, apart from the embedding"])
    layouts = {**places.found.layouts, _HEAD: "io"}
    found = dataclasses.replace(places.found, layouts=layouts)
    return Places(found, {**places.added, _HEAD: trained[0]})


def targets_of(
    checkpoint: Checkpoint, changes: dict[str, Change], places: Places, dtype: str | None
) -> dict[str, Target]:
    """Return all tensors to write, in the order of BASE."""
    targets = {}
    for name, entry in checkpoint.entries.items():
        own = entry.dtype if dtype is None or entry.dtype not in WEIGHTS else dtype
        pieces = plain(name, entry, own)
        if name in changes:
            pieces = changed(name, entry, changes[name], places.found.layouts.get(name), own)
        targets[name] = Target(own, entry.shape, pieces)
    for name, source in places.added.items():
        change = changes[name]
        if source is not None:
            entry = checkpoint.entries[source]
            own = dtype or entry.dtype
            pieces = changed(name, entry, change, places.found.layouts.get(name), own)
            targets[name] = Target(own, entry.shape, pieces)
        else:
            value = change.values[0][1]
            own = dtype or NAMES[value.dtype]
            cast = rounded(value, own, name)
            targets[name] = Target(own, value.shape, lambda cast=cast: iter([as_bytes(cast)]))
    return targets


def _files(checkpoint: Checkpoint, targets: dict[str, Target], most: int | None) -> dict[str, Any]:
    """Divide the tensors among files: as in BASE, or by size."""
    if most is None:
        groups = {name: list(names) for name, names in checkpoint.files.items()}
        last = list(groups)[-1]
        groups[last] += [name for name in targets if name not in checkpoint.entries]
        metadata = checkpoint.metadata
    else:
        shards = shards_of({name: t.size for name, t in targets.items()}, most)
        n = len(shards)
        named = [f"model-{k + 1:05d}-of-{n:05d}.safetensors" for k in range(n)]
        groups = dict(zip(named if n > 1 else [SINGLE], shards, strict=True))
        metadata = dict.fromkeys(groups, next(iter(checkpoint.metadata.values())))
    return {
        file: ({name: targets[name] for name in names}, metadata[file])
        for file, names in groups.items()
    }


def _unties(checkpoint: Checkpoint, changes: dict[str, Change]) -> bool:
    """Whether an output head changes that transformers would replace by the embedding on loading.

    The embedding of a tied model changes the head too, so nothing is untied for it.
    """
    return checkpoint.ties and any(is_head(name) for name in changes)


def _texts(
    checkpoint: Checkpoint, files: dict[str, Any], untied: bool, dtype: str | None
) -> dict[str, str]:
    """Return the index, and config.json where it changes."""
    texts = {}
    if len(files) > 1 or (checkpoint.folder.is_dir() and (checkpoint.folder / INDEX).is_file()):
        total = sum(t.size for targets, _ in files.values() for t in targets.values())
        weights = {name: file for file, (targets, _) in files.items() for name in targets}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    config = json.loads(json.dumps(checkpoint.config))
    for said in (config, config.get("text_config", {})):
        if untied and (said is config or "tie_word_embeddings" in said):
            said["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in said:
                said[key] = dtype
    if checkpoint.config and config != checkpoint.config:
        texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    return texts
