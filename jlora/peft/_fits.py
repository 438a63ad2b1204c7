"""How a leaf may be a tensor: equal values in some order, and the layouts that this order means."""

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.peft._tensors import in_torch_order

_CHUNK = 2**18
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^shared$|^emb$")
_EXPERTS = ((0, 1, 2), (0, 2, 1))

Mark = tuple[str, int, int, int]  # the dtype, the size, the sums of bits and of their squares


def _bits(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the bit patterns, as float32 or float64, of values as a dtype has them."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(x).astype(dtype)
    return cast.view(np.uint64) if dtype.itemsize == 8 else cast.astype(np.float32).view(np.uint32)


def mark_of(x: np.ndarray, dtype: np.dtype[Any]) -> Mark:
    """Return what is the same for the same values in any order."""
    flat, total, squares = x.reshape(-1), 0, 0
    for start in range(0, flat.size, _CHUNK):
        bits = _bits(flat[start : start + _CHUNK], dtype).astype(np.uint64)
        total += int(bits.sum(dtype=np.uint64))
        squares += int((bits * bits).sum(dtype=np.uint64))
    return dtype.name, flat.size, total % 2**64, squares % 2**64


def is_embedding(name: str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and module != "embed_out" and bool(_EMBEDDING.search(module))


def inputs_first(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the matrices that are (in, out): embeddings, and transformers' Conv1D.

    A bias has as many elements as there are outputs. Where a matrix is square, those that have the
    same last name elsewhere in the model tell.
    """
    found, square, told = set(), {}, collections.defaultdict(set)
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        bias = shapes.get(f"{module}.bias")
        if len(shape) != 2 or parameter != "weight":
            continue
        if bias is None:
            found |= {name} if is_embedding(name) else set()
        elif shape[0] == shape[1]:
            square[name] = module.rpartition(".")[2]
        else:
            told[module.rpartition(".")[2]].add(bias == (shape[1],))
            found |= {name} if bias == (shape[1],) else set()
    return found | {name for name, last in square.items() if told[last] == {True}}


def layouts_of(x: np.ndarray, w: np.ndarray, name: str, transposed: bool) -> Iterator[str]:
    """Yield each layout under which a leaf is the tensor; "" for a vector, and for experts."""
    dtype = np.dtype(x.dtype)
    ours, theirs = _bits(x, dtype), _bits(w, dtype)
    if x.ndim < 2 or w.ndim < 2:
        if np.array_equal(ours.reshape(-1), theirs.reshape(-1)):
            yield ""
        return
    if w.ndim == 3 and not name.endswith(".weight"):
        if x.ndim == 3 and any(np.array_equal(ours.transpose(p), theirs) for p in _EXPERTS):
            yield ""
        return
    seen = set()
    for letters in itertools.product("oi", repeat=x.ndim):
        layout = "".join(letters)
        # An axis of one element is an input as well as an output.
        reduced = tuple(c for c, n in zip(layout, x.shape, strict=True) if n > 1)
        if {*layout} == {"i", "o"} and reduced not in seen:
            moved = _arranged(ours, layout, theirs.shape, transposed)
            if moved is not None and np.array_equal(moved, theirs):
                seen.add(reduced)
                yield layout


def _arranged(
    x: np.ndarray, layout: str, shape: tuple[int, ...], transposed: bool
) -> np.ndarray | None:
    """Arrange a leaf as PyTorch would have it under a layout, where the shape allows it."""
    ins, outs = (tuple(k for k, c in enumerate(layout) if c == side) for side in "io")
    if len(shape) > 2:  # a convolution: channels before the window
        ins = in_torch_order(layout, ins)
        if tuple(x.shape[k] for k in ins) != shape[1:]:
            return None
    first, rest = (ins, outs) if transposed else (outs, ins)
    if math.prod(x.shape[k] for k in first) != shape[0]:
        return None
    return x.transpose(*first, *rest).reshape(shape)
