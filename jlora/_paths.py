"""Paths of leaves as strings, "layers_0/attn/q_proj/kernel", and short texts for errors.

This file does not know about adapters.
"""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath, keystr
from jaxtyping import PyTree


def path_strs(paths: Sequence[KeyPath], tree: PyTree, start: int = 0) -> list[str]:
    """Join key paths of a tree with "/", beginning with the key at index `start`.

    The `value` of a box (`nnx.Param`, `nn.Partitioned`) has the path of the box. A box has no other
    child, unlike a NamedTuple of query, key and value.
    """
    boxes = {p[:-1] for p in paths if _is_value(p)}
    if boxes:
        inside: dict[KeyPath, set[Any]] = {}
        for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None):
            for k in range(len(path)):
                inside.setdefault(path[:k], set()).add(path[k])
        boxes = {p for p in boxes if len(inside.get(p, ())) == 1}
    named = (p[:-1] if _is_value(p) and p[:-1] in boxes else p for p in paths)
    return [keystr(p[start:], simple=True, separator="/") for p in named]


def _is_value(path: KeyPath) -> bool:
    return bool(path) and isinstance(path[-1], GetAttrKey) and path[-1].name == "value"


def leaves_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return `(path, leaf)` for every leaf, in tree order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    names = path_strs([p for p, _ in pairs], tree)
    return [(name, x) for name, (_, x) in zip(names, pairs, strict=True)]


def map_with_paths(
    fn: Callable[[str, Any], Any], tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> PyTree:
    """Return the tree of `fn(path, leaf)`."""
    structure = jax.tree.structure(tree, is_leaf)
    return structure.unflatten([fn(path, x) for path, x in leaves_with_paths(tree, is_leaf)])


def tells(path: str) -> bool:
    """Whether a leaf has one of Flax's names for weights whose inputs come first."""
    leaf = path.rpartition("/")[2]
    return "kernel" in leaf or "embedding" in leaf


def is_doubtful(path: str) -> bool:
    """Whether a leaf has the name of PyTorch and Equinox for weights whose outputs come first."""
    return re.search(r"(^|_)weight(_|$)", path.rpartition("/")[2]) is not None


def near_misses(word: str, known: Iterable[str]) -> str:
    """Suggest names similar to `word`, as the last sentence of an error."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4) or known[:3]
    if not close:
        return "There are no leaves at all."
    return "Closest: " + ", ".join(f'"{c}"' for c in close) + "."


def describe(path: str, leaf: PyTree) -> str:
    """Name a leaf by path, dtype and shape: `"dense/kernel" float32[3,4]`."""
    return f'"{path}" {_typed(leaf) or type(leaf).__name__}'


def _typed(x: Any) -> str | None:
    """Return dtype and shape, `float32[3,4]`; None for what has none."""
    try:
        shape, dtype = x.shape, x.dtype
        return f"{dtype}[{','.join(map(str, shape))}]"
    except Exception:  # whatever a half-built node raises, it has neither
        return None


class _Brief(reprlib.Repr):
    """Print arrays as dtype and shape, and cut everything else."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 3, 4
        self.maxstring = self.maxother = most

    def repr1(self, x: Any, level: int) -> str:
        typed = None if isinstance(x, (type, np.generic)) else _typed(x)
        if typed is None:
            return " ".join(super().repr1(x, level).split())
        arrays = isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))
        return typed if arrays else f"{type(x).__name__}({typed})"


def brief(x: object, most: int = 80) -> str:
    """Print a value of any type and size in about `most` characters."""
    text = _Brief(most).repr(x)
    return text if len(text) <= 2 * most else f"{text[:most]}..."


def short_repr(x: Any) -> str:
    """Print a dataclass in a line or two, without the fields that have their default."""
    shown = []
    for field in dataclasses.fields(x):
        value = getattr(x, field.name)
        default = {} if field.default_factory is dict else field.default
        if not (isinstance(value, (str, bool, dict, type(None))) and value == default):
            shown.append(f"{field.name}={brief(value)}")
    return f"{type(x).__name__}({', '.join(shown)})"
