"""Read adapters: their nodes by path, and the shape of a weight whose base is detached."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jlora._arrays import Adapted, FullArray, LoraArray, Tied, is_adapted
from jlora._paths import brief, leaves_with_paths


def is_slot(x: object) -> bool:
    """Whether `x` is one leaf of an adapter: a node, or None where nothing is adapted."""
    return x is None or is_adapted(x)


def check_adapters(adapters: object, call: str) -> None:
    """Refuse anything but a sequence of adapters: one of them, a bank, or none."""
    if not isinstance(adapters, Sequence) or isinstance(adapters, str | bytes):
        raise TypeError(
            f"`{call}`: `adapters` is {brief(adapters)}. Pass a list of adapters, also for one: "
            "`[adapter]`, where `base, adapter = jlora.detach(params)`."
        )
    if not adapters:
        raise ValueError(f"`{call}`: there are no adapters. Pass at least one.")


def nodes_of(adapter: PyTree, call: str) -> dict[str, Adapted]:
    """Return an adapter's nodes by path; refuse those that no other adapter's base fits."""
    nodes = {p: x for p, x in leaves_with_paths(adapter, is_adapted) if is_adapted(x)}
    if not nodes:
        raise ValueError(
            f"`{call}`: there is no `LoraArray` or `FullArray` in it. Pass an adapter: "
            "`base, adapter = jlora.detach(params)`."
        )
    for path, node in nodes.items():
        parts = {"value": node.value} if isinstance(node, FullArray) else node.parts
        if any(isinstance(x, Tied) for x in parts.values()):
            raise ValueError(
                f'`{call}`: "{path}" is tied: a part of it is another node\'s. Pass the adapter '
                "of `jlora.untie(params)`."
            )
        if any(x is None for x in parts.values()) or getattr(node, "scaling", 0) is None:
            raise ValueError(
                f'`{call}`: parts of "{path}" are missing. Put them back first: '
                "`jlora.combine(trainable, frozen)`."
            )
        if isinstance(node, LoraArray) and node.residual:
            raise ValueError(
                f'`{call}`: the base of "{path}" is a residual, which no other adapter has. '
                "Convert it first: `jlora.arithmetic.residual_to_lora(params, initial, base)`."
            )
    return nodes


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a weight, also for a detached adapter."""
    if not isinstance(node, LoraArray):
        return tuple(np.shape(node.value if isinstance(node, FullArray) else node))
    if node.slices is not None:  # B is narrower than the weight
        return tuple(node.base.shape)
    ins, outs = node.layout.count("i"), node.layout.count("o")
    stack = node.lora_a.shape[: node.lora_a.ndim - ins - 1]
    sides = {
        "i": iter(node.lora_a.shape[len(stack) : len(stack) + ins]),
        "o": iter(node.lora_b.shape[node.lora_b.ndim - outs :]),
    }
    return (*stack, *(next(sides[letter]) for letter in node.layout))
