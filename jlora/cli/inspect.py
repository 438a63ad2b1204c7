"""`jlora inspect ADAPTER [--base BASE] [--plot P.png]`: what an adapter changes in each weight."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import arithmetic
from jlora._arrays import FullArray
from jlora.cli._adapter import Adapter, open_adapter, places_of
from jlora.cli._checkpoint import open_checkpoint
from jlora.cli._folder import tree_of
from jlora.cli._output import report
from jlora.cli._safetensors import WEIGHTS
from jlora.cli._source import bridge

HELP = "norms, effective ranks and, with the base, relative norms and intruder dimensions"
_COLUMNS = ("rank", "norm", "effective_rank", "relative", "intruders")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", type=Path, help="a PEFT folder")
    parser.add_argument("--base", type=Path, help="the checkpoint that it adapts")
    parser.add_argument("--top", type=int, default=10, help="singular vectors to compare")
    parser.add_argument("--threshold", type=float, default=0.5, help="of an intruder's cosines")
    parser.add_argument("--plot", type=Path, help="write a picture, P.png; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="report as JSON, with the spectra")


def run(args: argparse.Namespace) -> None:
    """Inspect."""
    call = "jlora inspect ADAPTER"
    plot: Path | None = args.plot
    draw = None if plot is None else bridge("_plot", call).plot
    if plot is not None and (plot.suffix != ".png" or plot.is_dir()):
        raise ValueError(f"`{call}`: --plot {plot} is no name of a .png file.")
    adapter = open_adapter(args.adapter, call)
    tree, _ = tree_of(adapter, call)
    of_base = None if args.base is None else _reader(args.base, adapter, call)
    rows: dict[str, dict[str, Any]] = {}
    for name, node in tree.items():  # one weight of the base is in memory at a time
        rank = "all" if isinstance(node, FullArray) else node.rank
        rows[name] = {"rank": rank}
        if of_base is None and isinstance(node, FullArray):
            continue
        weight = None if of_base is None else {name: of_base(name)}
        found = arithmetic.inspect({name: node}, weight, top=args.top, threshold=args.threshold)
        rows[name] |= {key: np.asarray(x).tolist() for key, x in found[name].items()}
    if plot is not None and draw is not None:
        draw(plot, rows)
    if args.json:
        report({"adapter": str(args.adapter), "weights": rows}, True)
    else:
        _print(rows)


def _reader(base: Path, adapter: Adapter, call: str) -> Callable[[str], Any]:
    """Return a function from an adapter's names to the weights of a checkpoint, outputs first."""
    checkpoint = open_checkpoint(base, call)
    places = places_of(adapter, checkpoint, call)
    paths = {place.name: place.path for place in places.found.places.values()}

    def weight(name: str) -> Any:
        path = paths.get(name, name)
        entry = checkpoint.entries.get(places.added.get(path) or path)
        if entry is None or entry.dtype not in WEIGHTS:
            why = "there are none" if entry is None else f"they are {entry.dtype}, quantized"
            raise ValueError(
                f'`{call}`: the weights of "{name}" cannot be read from BASE: {why}. Pass the '
                "original checkpoint that the adapter was trained on."
            )
        x = jnp.asarray(entry.read().reshape(entry.shape))
        return x.T if places.found.kinds.get(path) == "Conv1D" else x

    return weight


def _print(rows: dict[str, dict[str, Any]]) -> None:
    columns = [c for c in _COLUMNS if any(c in row for row in rows.values())]
    wide = max(map(len, rows))
    print("weight".ljust(wide), *(c.rjust(14) for c in columns))
    for name, row in rows.items():
        cells = [row.get(c, "") for c in columns]
        texts = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells]
        print(name.ljust(wide), *(x.rjust(14) for x in texts))
    norms = [row["norm"] for row in rows.values() if "norm" in row]
    print(f"{len(rows)} weights, norm of all updates {np.linalg.norm(norms):.4g}")
