"""A and B in a tree of gradients: where they are, and as pairs of matrices.

A pair is A as `(*stack, in, rank)` and Bᵀ as `(*stack, out, rank)`, so that what holds for one side
holds for the other. It knows no optimizer.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import LoraArray, Tied, accumulator, is_adapted
from jlora._paths import leaves_with_paths

Pair = tuple[Array, Array]

# On a GPU or TPU a float32 product is otherwise rounded to fewer bits than its inverse needs.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def turned(matrix: Array) -> Array:
    """Return `Xᵀ` of every stack element."""
    return jnp.swapaxes(matrix, -1, -2)


def gram(matrix: Array) -> Array:
    """Return `XᵀX`, `(*stack, rank, rank)`."""
    return dot(turned(matrix), matrix)


def divided(gradient: Array, factor: Array, delta: float | int) -> Array:
    """Return `G (XᵀX + δI)⁻¹`: the gradient of one factor by the other one, X."""
    square = gram(factor)
    damped = square + delta * jnp.eye(square.shape[-1], dtype=square.dtype).reshape(
        *(1,) * (square.ndim - 2), *square.shape[-2:]
    )
    # Inverted, for it is rank x rank: solving for every row of G takes far longer.
    return dot(gradient, jnp.linalg.inv(damped))


def pairs(node: LoraArray) -> list[Pair]:
    """Return A and Bᵀ as matrices, in float32 or wider: one pair, or one per slice."""
    wide, layout = accumulator(node.lora_a.dtype), node.layout
    # The base may be absent, so what leads is counted from A.
    axis = node.lora_a.ndim - layout.count("i") - 1
    stack, rank = node.lora_a.shape[:axis], node.lora_b.shape[axis]
    ends, parts = [], 1
    if node.slices is not None:
        ends = list(itertools.accumulate(stop - start for start, stop in node.slices))[:-1]
        parts = len(node.slices)
    a = node.lora_a.astype(wide).reshape(*stack, -1, parts * rank)
    b = jnp.split(node.lora_b.astype(wide), ends, axis + 1)
    return list(
        zip(
            jnp.split(a, parts, -1),
            [turned(piece.reshape(*stack, rank, -1)) for piece in b],
            strict=True,
        )
    )


def unpaired(changed: list[Pair], node: LoraArray) -> LoraArray:
    """Put pairs back where `pairs` took them from, in the shapes and dtypes of `node`."""
    axis = node.lora_a.ndim - node.layout.count("i") - 1
    before, behind = node.lora_b.shape[: axis + 1], node.lora_b.shape[axis + 2 :]
    a = jnp.concatenate([a for a, _ in changed], -1)
    b = jnp.concatenate([turned(b).reshape(*before, -1, *behind) for _, b in changed], axis + 1)
    return dataclasses.replace(
        node,
        lora_a=a.reshape(node.lora_a.shape).astype(node.lora_a.dtype),
        lora_b=b.astype(node.lora_b.dtype),
    )


def label(call: str, *parts: str) -> Callable[[PyTree], PyTree]:
    """Return what labels those parts of every `LoraArray` "factor", and the rest "other"."""

    def mark(node: Any) -> Any:
        words = jax.tree.map(lambda _: "other", node)
        if not isinstance(node, LoraArray):
            return words
        named = {part: jax.tree.map(lambda _: "factor", getattr(node, part)) for part in parts}
        return dataclasses.replace(words, **named)

    def run(params: PyTree) -> PyTree:
        adapted(params, call)
        return jax.tree.map(mark, params, is_leaf=is_adapted)

    return run


def adapted(params: PyTree, call: str) -> list[tuple[str, LoraArray]]:
    """Return the nodes and their paths; refuse a tree without any."""
    found = [
        (path, node)
        for path, node in leaves_with_paths(params, is_adapted)
        if isinstance(node, LoraArray)
    ]
    if not found:
        raise ValueError(
            f"`{call}`: there is no `LoraArray` in the parameters, so nothing would be different. "
            "Give what `jlora.attach` returned, or `jlora.partition(params)[0]` of it."
        )
    return found


def check(params: PyTree, call: str) -> list[tuple[str, LoraArray]]:
    """Return the nodes and their paths; refuse a node without A or B, or with more than them."""
    found = adapted(params, call)
    for path, node in found:
        if not forms.of(node).is_product:
            raise ValueError(
                f'`{call}`: something stands between A and B of "{path}", and the update of one '
                "is a function of the other alone. Attach with another form, or train with an "
                "optimizer of Adam's kind."
            )
        for part in ("lora_a", "lora_b"):
            if isinstance(getattr(node, part), Tied):
                raise ValueError(
                    f'`{call}`: {part} of "{path}" is another node\'s, so its update would be a '
                    "function of several. Train tied parameters with an optimizer of Adam's kind."
                )
            if getattr(node, part) is None or isinstance(getattr(node, part), optax.MaskedNode):
                raise ValueError(
                    f'`{call}`: {part} of "{path}" is taken out, and neither factor is updated '
                    "without the other. Label all that trains alike: `jlora.freeze(tx)`, or "
                    "`jlora.partition(params)[0]`."
                )
    return found


def given(params: PyTree | None, call: str) -> PyTree:
    """Return the parameters; refuse an update without them."""
    if params is None:
        raise ValueError(
            f"`{call}`: the update of A is a function of B, and B's of A. Give the parameters: "
            "`tx.update(grads, state, params)`."
        )
    return params


def refuse_wrapping(call: str, value: Any, line: str) -> None:
    """Refuse an optimizer where a number belongs."""
    if isinstance(value, optax.GradientTransformation):
        raise TypeError(f"`{call}`: it does not wrap an optimizer, it stands in a chain: `{line}`.")
