"""Read the LoRA of Qwix and Tunix: `w_lora_a` and `w_lora_b` next to a weight `w`.

    A: (*batch, *contracted, r)        B: (*batch, r, *others)        s = alpha / r

Neither r nor alpha is in the checkpoint; r is A's last dimension. Qwix is not needed.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from jlora._arrays import LoraArray, is_leaf
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._paths import brief, describe, near_misses, quoted

__all__ = ["load"]

_A, _B = "_lora_a", "_lora_b"


def __dir__() -> list[str]:
    return __all__


def load(
    lora: PyTree, params: PyTree, *, alpha: float | int, layouts: Mapping[str, str] | None = None
) -> PyTree:
    """Put the A and B of Qwix on the weights of a model.

    Args:
        lora: the leaves, as `nnx.state(model, nnx.LoRAParam)` or a checkpoint of Tunix has them:
            `{"layers": {"0": {"attn": {"q_proj": {"w_lora_a": ..., "w_lora_b": ...}}}}}`.
        params: the weights of the model before Qwix added to it, with the same paths.
        alpha: of the provider, `LoraProvider(rank=..., alpha=...)`.
        layouts: from a weight's path to its layout, where shapes leave it open, as two equal axes
            do; see `jlora.layouts`.

    Returns:
        `params` with a `LoraArray` in the place of each adapted weight.

    Raises:
        ValueError: A or B is missing, or fits no weight; a layout is ambiguous; no leaf is LoRA's.

    Example:
        >>> a, b = jnp.ones((4, 2)), jnp.ones((2, 3, 5))
        >>> lora = {"q_proj": {"w_lora_a": a, "w_lora_b": b}}
        >>> params = load(lora, {"q_proj": {"w": jnp.ones((4, 3, 5))}}, alpha=4.0)
        >>> params["q_proj"]["w"].layout, float(params["q_proj"]["w"].scaling)
        ('ioo', 2.0)

    Reference: qwix's `_src/providers/lora.py`.
    """
    call = "jlora.qwix.load(lora, params)"
    weights = dict(leaves_with_paths(params, is_leaf))
    pairs: dict[str, dict[str, Any]] = {}
    for path, x in leaves_with_paths(lora):
        end = next((end for end in (_A, _B) if path.endswith(end)), None)
        if end is None or path.removesuffix(end) not in weights:
            name = path if end is None else path.removesuffix(end)
            raise ValueError(
                f"`{call}`: {describe(path, x)} is not `{_A}` or `{_B}` after the path of a weight "
                f"of `params`. {near_misses(name, weights)}"
            )
        pairs.setdefault(path.removesuffix(end), {})[end] = x
    if not pairs:
        raise ValueError(f"`{call}`: `lora` has no leaves. Pass `nnx.state(model, nnx.LoRAParam)`.")
    given = dict(layouts or {})
    nodes = {
        path: _node(path, weights[path], parts, alpha, given.get(path), call)
        for path, parts in pairs.items()
    }
    return map_with_paths(lambda path, x: nodes.get(path, x), params, is_leaf)


def _node(
    path: str, w: PyTree, parts: dict[str, Any], alpha: float | int, layout: str | None, call: str
) -> LoraArray:
    if len(parts) != 2:
        raise ValueError(f"`{call}`: {quoted(path)} has {''.join(parts)} alone. Copy both.")
    a, b = parts[_A], parts[_B]
    found = [layout] if layout is not None else _layouts(w.shape, a.shape, b.shape)
    if len(found) != 1:
        why = f"has {len(found)} layouts, {', '.join(found)}: pass `layouts=`"
        raise ValueError(
            f"`{call}`: {describe(path, w)} with A {brief(a)} and B {brief(b)} "
            f"{why if found else 'does not fit: is it of another model?'}."
        )
    rank, letters = a.shape[-1], found[0]
    lead = len(w.shape) - len(letters)
    ins = [n for n, side in zip(w.shape[lead:], letters, strict=True) if side == "i"]
    outs = [n for n, side in zip(w.shape[lead:], letters, strict=True) if side == "o"]
    stack = w.shape[:lead]
    a = jnp.asarray(a).reshape(*stack, *ins, rank)
    b = jnp.asarray(b).reshape(*stack, rank, *outs)
    return LoraArray(w, a, b, jnp.float32(alpha / rank), letters)


def _layouts(w: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> list[str]:
    """Return every layout in which A and B fit: a letter an axis, after those of the stack."""
    if len(a) < 2 or len(b) < 2:
        return []
    if len(a) == len(b) > 2 and len(w) > 2 and a[0] == b[0] == w[0]:
        return _layouts(w[1:], a[1:], b[1:])
    if a[-1] != b[0]:
        return []
    found: list[str] = []
    for letters in map("".join, itertools.product("io", repeat=len(w))):
        sides = list(zip(w, letters, strict=True))
        ins = tuple(n for n, side in sides if side == "i")
        outs = tuple(n for n, side in sides if side == "o")
        exact = (ins, outs) == (a[:-1], b[1:])
        # `dot_general` flattens each side.
        flat = len(a) == len(b) == 2 < len(w) and (math.prod(ins), math.prod(outs)) == (a[0], b[1])
        if exact or (flat and "oi" not in letters):
            found.append(letters)
    return found
