"""Paths of leaves: how a key path becomes "layers_0/attn/q_proj/kernel", and what was nearly meant.

Knows nothing of adapters.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath, keystr


def path_strs(paths: Sequence[KeyPath], tree: Any, start: int = 0) -> list[str]:
    """Join key paths of a tree with "/", from one of their keys on.

    The `value` of a box (`nnx.Param`, `nn.Partitioned`) is the box: a node that has nothing else,
    unlike a NamedTuple's query, key and value.
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
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return `(path, leaf)` for every leaf, in tree order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    names = path_strs([p for p, _ in pairs], tree)
    return [(name, x) for name, (_, x) in zip(names, pairs, strict=True)]


def map_with_paths(
    fn: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Return the tree of `fn(path, leaf)`."""
    structure = jax.tree.structure(tree, is_leaf)
    return structure.unflatten([fn(path, x) for path, x in leaves_with_paths(tree, is_leaf)])


def tells(path: str) -> bool:
    """Whether a leaf's name says that its inputs come first, as Flax's names do."""
    leaf = path.rpartition("/")[2]
    return "kernel" in leaf or "embedding" in leaf


def is_doubtful(path: str) -> bool:
    """Whether a leaf's name is one of PyTorch's and Equinox's, where the outputs come first."""
    return re.search(r"(^|_)weight(_|$)", path.rpartition("/")[2]) is not None


def near_misses(word: str, known: Iterable[str]) -> str:
    """Say which of `known` may have been meant by `word`, as the last sentence of an error."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4) or known[:3]
    if not close:
        return "There are no leaves at all."
    return "Closest: " + ", ".join(f'"{c}"' for c in close) + "."


def describe(path: str, leaf: Any) -> str:
    """Name a leaf by path, dtype and shape: `"dense/kernel" float32[3,4]`."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", type(leaf).__name__)
    dims = "" if shape is None else f"[{','.join(map(str, shape))}]"
    return f'"{path}" {dtype}{dims}'
