"""Paths of leaves as strings, "layers_0/attn/q_proj/kernel", and short texts for errors.

This file does not know about adapters.
"""

import contextlib
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


def of_attention(path: str) -> bool:
    """Whether a leaf has a name of an attention's weights, whose outputs are divided into heads."""
    names = r"att(entio)?n|head|(^|[/_.])(q|k|v|kv|qkv|query|key|value)([/_.]|$)"
    return re.search(names, path, re.IGNORECASE) is not None


def near_misses(word: str, known: Iterable[str]) -> str:
    """Suggest names similar to `word`, a name or a pattern, as the last sentence of an error."""
    known, word = list(known), word[:300]  # comparing longer texts takes minutes
    if not known:
        return "There are no leaves at all."
    is_name = re.fullmatch(r"[\w/. -]+", word) is not None
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6) if is_name else []
    near = None if close else _near_part(word, known)
    if near is not None:
        path = next(path for path in known if near in path.split("/"))
        return f"Closest: {quoted(near)}" + (f", as in {quoted(path)}." if path != near else ".")
    close = close or difflib.get_close_matches(word, known, n=3, cutoff=0.4) or known[:3]
    return "Closest: " + ", ".join(map(quoted, close)) + "."


def _near_part(word: str, known: Sequence[str]) -> str | None:
    """Return the part of a path that is nearest to the part of a pattern that no path has."""
    parts = list(dict.fromkeys(part for path in known for part in path.split("/")))
    for part in word.split("/"):
        literal = re.sub(r"\W", "", part)
        with contextlib.suppress(re.error):
            if literal and not any(re.fullmatch(part, other) for other in parts):
                near = difflib.get_close_matches(literal, parts, n=1, cutoff=0.6)
                if near:
                    return near[0]
    return None


def is_bias(path: str) -> bool:
    """Whether a leaf has the name of a bias."""
    return re.search(r"(^|_)bias$", path.rpartition("/")[2]) is not None


def describe(path: str, leaf: PyTree) -> str:
    """Name a leaf by path, dtype and shape: `"dense/kernel" float32[3,4]`."""
    return f"{quoted(path)} {_typed(leaf) or type(leaf).__name__}"


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


def quoted(text: str, most: int = 200) -> str:
    """Quote a name, without the middle of a long one."""
    half = most // 2
    return f'"{text}"' if len(text) <= most else f'"{text[:half]}...{text[-half:]}"'


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
