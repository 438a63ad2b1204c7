"""`jlora resize ADAPTER OUT --rank 8 | --energy 0.99 | --error 0.1`: lower an adapter's ranks."""

import argparse
from pathlib import Path

import numpy as np

from jlora.arithmetic import compress
from jlora.cli._adapter import open_adapter
from jlora.cli._folder import ranks_of, tree_of, write_adapter
from jlora.cli._output import add_folder_options, check_target, report

HELP = "approximate an adapter by lower ranks: truncated SVD, from the factors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", type=Path, help="a PEFT folder")
    parser.add_argument("out", type=Path, help="the new folder")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rank", type=int, help="of every weight")
    how.add_argument("--energy", type=float, help="the part of each update's square norm to keep")
    how.add_argument("--error", type=float, help="the largest relative error of each update")
    add_folder_options(parser)


def run(args: argparse.Namespace) -> None:
    """Resize."""
    call = "jlora resize ADAPTER OUT"
    check_target(args.out, [args.adapter], args.overwrite, call)
    adapter = open_adapter(args.adapter, call)
    tree, kinds = tree_of(adapter, call)
    small, kept = compress(tree, rank=args.rank, energy=args.energy, error=args.error)
    if not args.dry_run:
        write_adapter(args.out, small, kinds, adapter.said, args.dtype)
    parts = {name: round(float(np.min(x)), 6) for name, x in kept.items()}
    least = min(parts, key=parts.__getitem__)
    said = {
        "adapter": str(args.adapter),
        "out": str(args.out),
        "ranks": f"{ranks_of(tree)} -> {ranks_of(small)}",
        "least norm kept": f"{parts[least]:.4f} ({least})",
        "mean norm kept": f"{np.mean(list(parts.values())):.4f}",
    }
    report(said | ({"norm kept": parts} if args.json else {}), args.json, args.dry_run)
