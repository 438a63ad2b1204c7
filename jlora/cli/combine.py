"""`jlora combine A=0.7 B=0.3 OUT --method add`: one adapter of several, without a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

import jax

from jlora import arithmetic
from jlora._arrays import FullArray
from jlora.cli._adapter import all_weighted, open_adapter
from jlora.cli._folder import Tree, aligned, ranks_of, tree_of, write_adapter
from jlora.cli._output import add_folder_options, check_target, report

HELP = "combine adapters: the exact sum, or TIES, DARE, DELLA, breadcrumbs, SCE, KnOTS, slerp"
# By method: the options that it needs, and those that it may have.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "add": ((), ("rank",)),
    "ties": (("density", "rank"), ()),
    "magnitude": (("density", "rank"), ()),
    "dare": (("density", "rank"), ("elect", "seed")),
    "della": (("density", "epsilon", "rank"), ("seed",)),
    "breadcrumbs": (("density", "outliers", "rank"), ("elect",)),
    "sce": (("rank",), ("density",)),
    "knots": ((), ("density", "rank")),
    "slerp": ((), ("rank",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapters", nargs="+", metavar="adapter[=weight]", help="PEFT folders")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--method", choices=[*METHODS], default="add")
    parser.add_argument("--rank", type=int, help="of the result; `add` keeps the sum by default")
    parser.add_argument("--density", type=float, help="the part of each update to keep")
    parser.add_argument("--epsilon", type=float, help="della: how far the probabilities spread")
    parser.add_argument("--outliers", type=float, help="breadcrumbs: the largest part to drop")
    parser.add_argument("--elect", action="store_true", default=None, help="elect signs, as TIES")
    parser.add_argument("--seed", type=int, help="of random drops, 0 by default")
    add_folder_options(parser)


def run(args: argparse.Namespace) -> None:
    """Combine."""
    call = "jlora combine ADAPTER=WEIGHT ... OUT"
    options = _options(args, call)
    given = all_weighted(args.adapters, call)
    check_target(args.out, [path for path, _ in given], args.overwrite, call)
    adapters = [open_adapter(path, call) for path, _ in given]
    read = [tree_of(adapter, call) for adapter in adapters]
    trees = aligned([tree for tree, _ in read])
    kinds = {name: kind for _, own in read for name, kind in own.items()}
    _check(trees, [path for path, _ in given], call)
    weights = [weight for _, weight in given]
    total = _combined(args.method, trees, weights, options, call)
    if not args.dry_run:
        write_adapter(args.out, total, kinds, adapters[0].said, args.dtype)
    said = {
        "adapters": {str(path): weight for path, weight in given},
        "out": str(args.out),
        "method": args.method,
        **options,
        "weights": sum(node is not None for node in total.values()),
        "ranks": f"{', '.join(ranks_of(tree) for tree in trees)} -> {ranks_of(total)}",
    }
    report(said, args.json, args.dry_run)


def _options(args: argparse.Namespace, call: str) -> dict[str, Any]:
    """Return the options of the method; refuse lacking ones and those without effect."""
    needs, may = METHODS[args.method]
    names = ("rank", "density", "epsilon", "outliers", "elect", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in needs:
        if name not in given:
            raise ValueError(f"`{call}`: --method {args.method} needs `--{name}`.")
    for name in given:
        if name not in (*needs, *may):
            raise ValueError(f"`{call}`: --method {args.method} does not use `--{name}`.")
    return given


def _check(trees: list[Tree], paths: list[Path], call: str) -> None:
    for tree, path in zip(trees, paths, strict=True):
        full = [name for name, node in tree.items() if isinstance(node, FullArray)]
        if full:
            raise ValueError(
                f'`{call}`: {path.name} has "{full[0]}" whole, and its difference from the base is '
                "what counts. Merge into the base instead: `jlora merge BASE A=0.7 B=0.3 OUT`."
            )


def _combined(
    method: str, trees: list[Tree], weights: list[float], options: dict[str, Any], call: str
) -> Tree:
    options = dict(options)
    rank = options.pop("rank", None)
    if method in ("dare", "della"):
        options["key"] = jax.random.key(options.pop("seed", 0))
    if method == "slerp":
        if len(trees) != 2 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(f"`{call}`: slerp takes two adapters whose weights add up to 1.")
        total = arithmetic.slerp(trees, weights[1])
    elif method == "add":
        total = arithmetic.add(trees, weights)
    elif method == "sce":
        if set(weights) != {1.0}:
            raise ValueError(f"`{call}`: sce computes the weights itself; give none.")
        return arithmetic.sce(trees, rank=rank, **options)
    else:
        return getattr(arithmetic, method)(trees, weights, rank=rank, **options)
    return total if rank is None else arithmetic.compress(total, rank=rank)[0]
