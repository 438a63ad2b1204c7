"""`jlora extract BASE TUNED OUT --rank 16`: an adapter from the difference of two checkpoints.

A tensor of each checkpoint is in memory at a time.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import arithmetic
from jlora._arrays import FullArray
from jlora._paths import near_misses
from jlora._spec import LoraSpec
from jlora.cli._checkpoint import EMBEDDINGS, HEADS, Checkpoint, open_checkpoint
from jlora.cli._folder import Tree, ranks_of, write_adapter
from jlora.cli._output import Progress, add_folder_options, check_target, report
from jlora.cli._safetensors import WEIGHTS, Entry, blocks

HELP = "make an adapter of the difference of two checkpoints: truncated SVD"
_CONV1D = ("gpt2", "gpt_bigcode", "imagegpt", "openai-gpt")  # models whose weights are (in, out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("base", type=Path, help="the checkpoint before training")
    parser.add_argument("tuned", type=Path, help="the checkpoint after training")
    parser.add_argument("out", type=Path, help="the new PEFT folder")
    parser.add_argument("--rank", type=int, required=True, help="of each weight, or the largest")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--energy", type=float, help="the part of ‖W' - W‖² to keep: fewer ranks")
    how.add_argument("--error", type=float, help="the largest relative error: fewer ranks")
    parser.add_argument("--niter", type=int, help="use a randomized SVD with so many iterations")
    parser.add_argument(
        "--targets",
        help="a regular expression that matches full names; by default all matrices but those of "
        "embeddings and output heads",
    )
    parser.add_argument("--full", action="store_true", help="keep all else that changed whole")
    add_folder_options(parser)


def run(args: argparse.Namespace) -> None:
    """Extract."""
    call = "jlora extract BASE TUNED OUT"
    check_target(args.out, [args.base, args.tuned], args.overwrite, call)
    base, tuned = open_checkpoint(args.base, call), open_checkpoint(args.tuned, call)
    base, tuned = _with_head(base, tuned), _with_head(tuned, base)
    _check_same(base, tuned, call)
    chosen = _targets(base, args.targets, call)
    turned = base.config.get("model_type") in _CONV1D
    spec = LoraSpec(args.rank, args.rank, layout="io" if turned else "oi")
    tree: Tree = {}
    errors, left = {}, []
    progress = Progress(sum(entry.size for entry in base.entries.values()))
    for name, entry in base.entries.items():
        other = tuned.entries[name]
        progress(entry.size)
        if not _differ(entry, other):
            continue
        if name in chosen:
            pair = [jnp.asarray(x.read().reshape(x.shape)) for x in (other, entry)]
            limits = {"energy": args.energy, "error": args.error, "niter": args.niter}
            made, lost = arithmetic.extract(
                {name: pair[0]}, {name: pair[1]}, {re.escape(name): spec}, **limits
            )
            tree[name], errors[name] = made[name], float(lost[name])
        elif args.full:
            tree[name] = FullArray(None, jnp.asarray(other.read().reshape(other.shape)))
        else:
            left.append(name)
    if not tree:
        more = f"; {len(left)} others differ: `--targets` or `--full`" if left else ""
        raise ValueError(f"`{call}`: no chosen tensor differs between the checkpoints{more}.")
    kinds = {name: _kind(node, turned) for name, node in tree.items()}
    said = {"base_model_name_or_path": str(args.base), "fan_in_fan_out": turned}
    if not args.dry_run:
        write_adapter(args.out, tree, {k: x for k, x in kinds.items() if x}, said, args.dtype)
    _report(args, tree, errors, left)


def _with_head(one: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Give a tied head the embedding's weights where the other checkpoint has some of its own."""
    found = {name: one.tied_to(name) for name in other.entries}
    heads = {name: one.entries[source] for name, source in found.items() if source is not None}
    return dataclasses.replace(one, entries={**one.entries, **heads})


def _check_same(base: Checkpoint, tuned: Checkpoint, call: str) -> None:
    """Refuse checkpoints of different tensors or shapes, and codes."""
    for one, word in ((base, "BASE"), (tuned, "TUNED")):
        if "quantization_config" in one.config:
            raise ValueError(
                f"`{call}`: {word} is quantized, and codes have no difference. Pass the original "
                "checkpoints."
            )
    for one, other, word in ((base, tuned, "TUNED"), (tuned, base, "BASE")):
        for name, entry in one.entries.items():
            if name not in other.entries:
                raise ValueError(
                    f'`{call}`: {word} has no "{name}". {near_misses(name, other.entries)}'
                )
            if entry.shape != other.entries[name].shape:
                raise ValueError(
                    f'`{call}`: "{name}" has the shapes {list(base.entries[name].shape)} in BASE '
                    f"and {list(tuned.entries[name].shape)} in TUNED. Cut off added rows first."
                )


def _targets(base: Checkpoint, pattern: str | None, call: str) -> set[str]:
    """Return the names of the matrices to decompose."""
    matrices = {
        name: entry
        for name, entry in base.entries.items()
        if len(entry.shape) == 2 and entry.dtype in WEIGHTS and name.endswith(".weight")
    }
    if pattern is None:
        skipped = {*EMBEDDINGS, *HEADS}
        return {name for name in matrices if not skipped & set(name.split("."))}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{call}`: --targets {pattern!r} is no regular expression: {error}."
        ) from None
    found = {name for name in matrices if compiled.fullmatch(name)}
    if not found:
        raise ValueError(
            f"`{call}`: --targets {pattern!r} matches no matrix. {near_misses(pattern, matrices)}"
        )
    return found


def _differ(one: Entry, other: Entry) -> bool:
    """Whether two tensors differ, read a piece at a time."""

    def pieces() -> Iterator[bool]:
        size = int(np.prod(one.shape, dtype=int))
        for first, last in blocks(size, 1):
            x, y = (e.read(first, last - first) for e in (one, other))
            yield not np.array_equal(x.astype(y.dtype), y)

    return any(pieces())


def _kind(node: Any, turned: bool) -> str | None:
    if isinstance(node, FullArray):
        return "parameter"
    return "Conv1D" if turned else None


def _report(
    args: argparse.Namespace, tree: Tree, errors: dict[str, float], left: list[str]
) -> None:
    worst = max(errors, key=errors.__getitem__, default=None)
    said: dict[str, Any] = {
        "base": str(args.base),
        "tuned": str(args.tuned),
        "out": str(args.out),
        "decomposed": len(errors),
        "ranks": ranks_of(tree),
        "whole": len(tree) - len(errors),
        "changed and left out": left,
    }
    if worst is not None:
        said["mean relative error"] = f"{np.mean(list(errors.values())):.4f}"
        said["largest relative error"] = f"{errors[worst]:.4f} ({worst})"
    report(said | ({"errors": errors} if args.json else {}), args.json, args.dry_run)
