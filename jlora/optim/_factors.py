"""A and B in a tree of gradients: find them, and convert them to pairs of matrices.

A pair is A as `(*stack, in, rank)` and Bᵀ as `(*stack, out, rank)`, so that the same code serves
both sides. This file does not know the optimizers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import LoraArray, Tied, accumulator, is_adapted
from jlora._boxes import bare, leaves_with_paths, like
from jlora._paths import brief

Pair = tuple[Array, Array]

# By default, GPUs and TPUs round float32 products to fewer bits than the inverses require.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def transposed(matrix: Array) -> Array:
    """Return `Xᵀ` of every stack element."""
    return jnp.swapaxes(matrix, -1, -2)


def gram(matrix: Array) -> Array:
    """Return `XᵀX`, `(*stack, rank, rank)`."""
    return dot(transposed(matrix), matrix)


def preconditioned(gradient: Array, factor: Array, delta: float | int) -> Array:
    """Return `G (XᵀX + δI)⁻¹`, where G is the gradient of one factor and X the other factor."""
    square = gram(factor)
    damped = square + delta * jnp.eye(square.shape[-1], dtype=square.dtype).reshape(
        *(1,) * (square.ndim - 2), *square.shape[-2:]
    )
    # The matrix is only rank x rank: inverting it is much faster than solving for each row of G.
    return dot(gradient, jnp.linalg.inv(damped))


def pairs(node: LoraArray) -> list[Pair]:
    """Return A and Bᵀ as matrices, in float32 or wider: one pair, or one per slice."""
    node = bare(node)
    wide, layout = accumulator(node.lora_a.dtype), node.layout
    # The base may be missing, so the stack axes are counted from A.
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
            [transposed(piece.reshape(*stack, rank, -1)) for piece in b],
            strict=True,
        )
    )


def unpaired(changed: list[Pair], node: LoraArray) -> LoraArray:
    """Undo `pairs`: return `node` with the changed A and B, in its shapes, dtypes and boxes."""
    boxed, node = node, bare(node)
    axis = node.lora_a.ndim - node.layout.count("i") - 1
    before, after = node.lora_b.shape[: axis + 1], node.lora_b.shape[axis + 2 :]
    a = jnp.concatenate([a for a, _ in changed], -1)
    b = jnp.concatenate([transposed(b).reshape(*before, -1, *after) for _, b in changed], axis + 1)
    changes = {
        "lora_a": a.reshape(node.lora_a.shape).astype(node.lora_a.dtype),
        "lora_b": b.astype(node.lora_b.dtype),
    }
    return like(dataclasses.replace(node, **changes), boxed)


def label(call: str, *parts: str) -> Callable[[PyTree], PyTree]:
    """Return a function that labels these parts of every `LoraArray` "factor", others "other"."""

    def mark(node: PyTree) -> PyTree:
        words = jax.tree.map(lambda _: "other", node)
        if not isinstance(node, LoraArray):
            return words
        named = {part: jax.tree.map(lambda _: "factor", getattr(node, part)) for part in parts}
        return dataclasses.replace(words, **named)

    def run(params: PyTree) -> PyTree:
        lora_nodes(params, call)
        return jax.tree.map(mark, params, is_leaf=is_adapted)

    return run


def lora_nodes(params: PyTree, call: str) -> list[tuple[str, LoraArray]]:
    """Return all `LoraArray` nodes and their paths; refuse a tree without any."""
    found = [
        (path, node)
        for path, node in leaves_with_paths(params, is_adapted)
        if isinstance(node, LoraArray)
    ]
    if not found:
        raise ValueError(
            f"`{call}`: there is no `LoraArray` in the parameters, so this would have no effect. "
            "Pass what `jlora.attach` returned, or its `jlora.partition(params)[0]`."
        )
    return found


def factor_nodes(params: PyTree, call: str) -> list[tuple[str, LoraArray]]:
    """Return the nodes and their paths; refuse a node whose update is not a product of A and B."""
    found = lora_nodes(params, call)
    for path, node in found:
        if not forms.of(node).is_product:
            raise ValueError(
                f'`{call}`: the update of "{path}" has other parts between A and B, but this '
                "optimizer updates each factor from the other alone. Attach with another form, or "
                "use an optimizer such as Adam."
            )
        for part in ("lora_a", "lora_b"):
            if isinstance(getattr(node, part), Tied):
                raise ValueError(
                    f'`{call}`: {part} of "{path}" is another node\'s, so its update would depend '
                    "on several nodes. Train tied parameters with an optimizer such as Adam."
                )
            if getattr(node, part) is None or isinstance(getattr(node, part), optax.MaskedNode):
                raise ValueError(
                    f'`{call}`: {part} of "{path}" is missing, and each factor\'s update requires '
                    "the other. Use one label for all trainable leaves: `jlora.freeze(tx)`, or "
                    "`jlora.partition(params)[0]`."
                )
    return found


def required(params: PyTree | None, call: str) -> PyTree:
    """Return the parameters; refuse None."""
    if params is None:
        raise ValueError(
            f"`{call}`: the update of A depends on B, and B's on A. Pass the parameters: "
            "`tx.update(grads, state, params)`."
        )
    return params


def refuse_wrapping(call: str, value: object, line: str) -> None:
    """Refuse an optimizer in place of a number."""
    if isinstance(value, optax.GradientTransformation):
        raise TypeError(f"`{call}`: this does not wrap an optimizer. Use it in a chain: `{line}`.")


def require_wrapped(tx: object, name: str, more: str = "") -> None:
    """Refuse anything but an optimizer."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"`jlora.optim.{name}({brief(tx)})`: pass the optimizer to wrap: "
            f"`jlora.optim.{name}(optax.adamw(1e-4){more})`."
        )
