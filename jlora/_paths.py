"""Paths of leaves: how a key path becomes "layers_0/attn/q_proj/kernel", and what was nearly meant.

Knows nothing of adapters.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, KeyPath, keystr


def path_str(path: KeyPath) -> str:
    """Join a key path with "/"; the `value` of a box (`nnx.Param`, `nn.Partitioned`) is the box."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return `(path, leaf)` for every leaf, in tree order."""
    return [(path_str(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]


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
