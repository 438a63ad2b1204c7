"""Fit an adapter to the shapes of a bank's slots: pad its ranks, fill in what it lacks, refuse."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat, forms
from jlora._arrays import FullArray, LoraArray
from jlora._paths import near_misses
from jlora.forms.dora import MAGNITUDE

Nodes = Mapping[str, Any]


def module(*arrays: Any) -> Any:
    """Return `jax.numpy` for traced arrays, else NumPy, which compiles nothing for a new shape."""
    if any(map(_compat.is_traced, arrays)):
        return jnp
    return np if all(getattr(x, "is_fully_addressable", True) for x in arrays) else jnp


def template(nodes: Sequence[Any], rank: int | None) -> Any:
    """Return one slot for these nodes of one weight, with `ShapeDtypeStruct`s as leaves."""
    first = nodes[0]
    if isinstance(first, FullArray):
        same = [x.value for x in nodes if isinstance(x, FullArray)]
        return FullArray(None, jax.ShapeDtypeStruct(same[0].shape, _widest(same)))
    loras = [x for x in nodes if isinstance(x, LoraArray)]
    first = next((x for x in loras if forms.has_gain(x)), first)
    rank = max(x.rank for x in loras) if rank is None else rank
    parts = {
        name: jax.ShapeDtypeStruct(
            _shape(first, name, x, rank), _widest([y.parts[name] for y in loras if name in y.parts])
        )
        for name, x in first.parts.items()
    }
    scalings = [jnp.asarray(x.scaling) for x in loras]
    shape = max((jnp.shape(s) for s in scalings), key=len)
    scaling = jax.ShapeDtypeStruct(shape, _widest(scalings))
    return dataclasses.replace(first, base=None, scaling=scaling).with_parts(parts)


def _widest(arrays: Sequence[Any]) -> Any:
    """Return a dtype that holds the values of all arrays."""
    dtypes = {np.dtype(x.dtype) for x in arrays}
    most = max(jnp.finfo(d).bits for d in dtypes)
    wide = [d for d in dtypes if jnp.finfo(d).bits == most]
    return wide[0] if len(wide) == 1 else np.dtype("float32")


def fitted(nodes: Nodes, like: Nodes, call: str) -> tuple[Nodes, Nodes, Nodes]:
    """Return a slot's nodes, ranks and gains; zeros for what `nodes` lacks."""
    extra = sorted(nodes.keys() - like.keys())
    if extra:
        raise ValueError(
            f'`{call}`: the adapter adapts "{extra[0]}", which no slot of the bank does. Stack '
            f"the bank again, with this adapter. {near_misses(extra[0], like)}"
        )
    found = {path: _one(path, nodes.get(path), to, call) for path, to in like.items()}
    rank = lambda x: 0 if x is None else 1 if isinstance(x, FullArray) else x.rank
    gain = lambda x: float(x is not None and forms.has_gain(x))
    ranks = {path: np.float32(rank(nodes.get(path))) for path in like}
    gains = {
        path: np.float32(gain(nodes.get(path)))
        for path, to in like.items()
        if isinstance(to, LoraArray) and forms.has_gain(to)
    }
    return found, ranks, gains


def _one(path: str, node: Any, to: Any, call: str) -> Any:
    """Return a node with the shapes and dtypes of `to`."""
    if node is None:
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), to)
    if _kind(node) != _kind(to):
        raise ValueError(
            f'`{call}`: "{path}" is {_said(node)}, and {_said(to)} in another adapter of the '
            "bank. A bank has one form and layout for each weight: `jlora.forms.as_lora(node)` "
            "makes LoRA of any form."
        )
    if isinstance(node, FullArray):
        return FullArray(None, _like(path, "value", node.value, to.value, call))
    if node.rank > to.rank:
        raise ValueError(
            f'`{call}`: "{path}" has rank {node.rank}, above the rank of the bank, {to.rank}. '
            f"Stack the bank with `rank={node.rank}`."
        )
    if forms.has_gain(node) and not forms.has_gain(to):
        raise ValueError(
            f'`{call}`: "{path}" has a magnitude (DoRA), and no adapter of the bank has one. Stack '
            "the bank again, with this adapter."
        )
    parts = {k: _padded(path, node, k, to.parts[k], to.rank, call) for k in node.parts}
    lacking = {k: np.zeros(x.shape, x.dtype) for k, x in to.parts.items() if k not in parts}
    s = node.scaling if hasattr(node.scaling, "shape") else np.float32(node.scaling)
    xp = module(s)
    s = xp.asarray(s)
    s = s.reshape((*s.shape, *(1,) * (len(to.scaling.shape) - s.ndim)))
    if len(s.shape) > len(to.scaling.shape) or s.size not in (1, np.prod(to.scaling.shape)):
        _refuse_shape(path, "scaling", jnp.shape(node.scaling), to.scaling.shape, call)
    s = xp.broadcast_to(s, to.scaling.shape).astype(to.scaling.dtype)
    return dataclasses.replace(to, scaling=s).with_parts({**lacking, **parts})


def _padded(path: str, node: LoraArray, name: str, to: Any, rank: int, call: str) -> Any:
    x = node.parts[name]
    if _shape(node, name, x, rank) != to.shape:
        _refuse_shape(path, name, _shape(node, name, x, rank), to.shape, call)
    return _like(path, name, resized(node, name, x, rank), to, call)


def _like(path: str, name: str, x: Any, to: Any, call: str) -> Any:
    """Cast a part to the bank's dtype, without loss."""
    if x.shape != to.shape:
        _refuse_shape(path, name, x.shape, to.shape, call)
    if _widest([x, to]) != to.dtype:
        raise ValueError(
            f'`{call}`: {name} of "{path}" is {x.dtype}, which the {to.dtype} of the bank would '
            "round. Cast the adapter first, or stack the bank again with it."
        )
    return module(x).asarray(x).astype(to.dtype)


def _refuse_shape(path: str, name: str, got: Any, want: Any, call: str) -> None:
    raise ValueError(
        f'`{call}`: {name} of "{path}" has the shape {got} at the rank of the bank, where the '
        f"bank has {want}. The adapter belongs to another base."
    )


def _kind(node: Any) -> Any:
    full = isinstance(node, FullArray)
    return "full" if full else (node.form, node.layout, node.slices)


def _said(node: Any) -> str:
    if isinstance(node, FullArray):
        return 'trained in full (`"full"`)'
    slices = "" if node.slices is None else f" on the slices {node.slices}"
    return f'of the form "{node.form}" with layout "{node.layout}"{slices}'


def without_gain(node: LoraArray) -> LoraArray:
    """Return a node without its magnitude."""
    extra = {name: x for name, x in node.extra.items() if name != MAGNITUDE}
    return dataclasses.replace(node, extra=extra)


def _rank_axes(node: LoraArray, name: str) -> list[int]:
    """Return which axes of a part are ranks."""
    stack = node.lora_a.ndim - 1 - node.layout.count("i")
    sizes = {"s": stack, "i": node.layout.count("i"), "o": node.layout.count("o"), "r": 1}
    axes, position = [], 0
    for group in forms.parts(node)[name].axes.split():
        axes += [position] if group == "r" else []
        position += sum(sizes[letter] for letter in group)
    return axes


def _shape(node: LoraArray, name: str, x: Any, rank: int) -> tuple[int, ...]:
    """Return the shape of a part at another rank."""
    blocks = len(node.slices) if name == "lora_a" and node.slices is not None else 1
    axes = _rank_axes(node, name)
    return tuple(rank * blocks if k in axes else n for k, n in enumerate(x.shape))


def resized(node: LoraArray, name: str, x: Any, rank: int) -> Any:
    """Pad the ranks of a part with zeros, or cut them off; with slices, in each block of A."""
    xp, shape = module(x), _shape(node, name, x, rank)
    x, axes = xp.asarray(x), _rank_axes(node, name)
    if shape == x.shape:
        return x
    blocks = len(node.slices) if name == "lora_a" and node.slices is not None else 1
    if blocks > 1:
        x = x.reshape(*x.shape[:-1], blocks, -1)
        axes = [x.ndim - 1]
    x = x[tuple(slice(rank) if k in axes else slice(None) for k in range(x.ndim))]
    x = xp.pad(x, [(0, rank - n if k in axes else 0) for k, n in enumerate(x.shape)])
    return x.reshape(shape)
