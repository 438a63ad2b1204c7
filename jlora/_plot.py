"""A picture of an adapter: the norm of every update by layer, and its singular values."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jlora._disk import replacing_files

_BOX = {"boxstyle": "round", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
_LAYER = re.compile(r"\.(\d+)(?=\.)")


def plot(file: str | os.PathLike[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw what `jlora.arithmetic.inspect` found, as a PNG.

    On the left, one row for each kind of weight and one column for each layer: the norm of the
    update, relative to the weight's where that is known. On the right the singular values of every
    update over the largest.

    Args:
        file: the file to write.
        rows: by name, `norm`, and optionally `relative`, `intruders` and `singular_values`.
    """
    figure = Figure(figsize=(12, max(4.0, 0.35 * len({_kind(name) for name in rows}) + 2)))
    left, right = figure.subplots(1, 2)
    _map(figure, left, rows)
    for name, row in rows.items():
        s = np.sort(np.asarray(row.get("singular_values", ()), np.float64).reshape(-1))[::-1]
        if s.size and s[0] > 0:
            right.plot(np.arange(1, s.size + 1), s / s[0], color="C0", alpha=0.3, label=name)
    right.set(yscale="log", xlabel="rank", ylabel="singular value / the largest")
    for axis in (left.xaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    with replacing_files(Path(file).parent) as new:
        FigureCanvasAgg(figure).print_png(new / Path(file).name)


def _map(figure: Figure, axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    key = "relative" if any("relative" in row for row in rows.values()) else "norm"
    kinds = sorted({_kind(name) for name in rows})
    layers = 1 + max(_layer(name) for name in rows)
    values = np.full((len(kinds), layers), np.nan)
    for name, row in rows.items():
        at = kinds.index(_kind(name)), _layer(name)
        values[at] = np.linalg.norm(np.asarray(row.get(key, np.nan), np.float64))
        if np.any(row.get("intruders", 0)):
            text = f"{np.sum(row['intruders'])}"
            axes.text(at[1], at[0], text, ha="center", va="center", fontsize=6, bbox=_BOX)
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="norm / weight's" if key == "relative" else "norm")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    title = " (numbers: intruder dimensions)" if key == "relative" else ""
    axes.set(xlabel="layer", title=f"updates{title}")


def _layer(name: str) -> int:
    """Return the first number of a name, `layers.3.`, or 0; a column for each, up to a thousand."""
    found = _LAYER.search(name)
    return min(int(found[1]), 999) if found else 0


def _kind(name: str) -> str:
    return _LAYER.sub("", name, count=1).removesuffix(".weight")[-40:]
