"""What trains and what is frozen: labels for optax, and two trees for `jax.grad`."""

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jlora import forms
from jlora._arrays import FullArray, LoraArray, is_adapted
from jlora._base import is_stored


def labels(params: PyTree) -> PyTree:
    """Label every leaf "adapter" (what trains of an update, a full parameter's value) or "frozen".

    Which parts of an update train is said by its form: see `jlora.forms`.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes, of arrays or of anything.

    Returns:
        A tree of the same structure, with strings for leaves: what `optax.multi_transform` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> labels({"w": node})["w"].lora_a, labels({"w": node})["w"].scaling
        ('adapter', 'frozen')
    """

    def label(node: Any) -> Any:
        def fill(part: Any, word: str) -> Any:
            return jax.tree.map(lambda _: word, part)

        if isinstance(node, LoraArray):
            words = {k: "frozen" if x.frozen else "adapter" for k, x in forms.parts(node).items()}
            filled = {name: fill(x, words[name]) for name, x in node.parts.items()}
            base, scaling = fill(node.base, "frozen"), fill(node.scaling, "frozen")
            return dataclasses.replace(node, base=base, scaling=scaling).with_parts(filled)
        if isinstance(node, FullArray):
            return FullArray(fill(node.base, "frozen"), fill(node.value, "adapter"))
        return "frozen"

    return jax.tree.map(label, params, is_leaf=is_adapted)


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split into the leaves that train and the leaves that do not; `None` fills the holes.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.

    Returns:
        `trainable` and `frozen`, each of the shape of `params`; `combine` puts them together.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> trainable, frozen = partition({"w": node})
        >>> trainable["w"].base is None, frozen["w"].lora_a is None
        (True, True)
    """
    words = labels(params)
    trainable = jax.tree.map(
        lambda x, word: x if word == "adapter" else None, params, words, is_leaf=is_stored
    )
    frozen = jax.tree.map(
        lambda x, word: None if word == "adapter" else x, params, words, is_leaf=is_stored
    )
    return trainable, frozen


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Fill the holes of one tree from the other: the inverse of `partition`.

    Args:
        trainable: a tree with `None` where `frozen` has a leaf.
        frozen: a tree with `None` where `trainable` has a leaf.

    Returns:
        The whole tree.

    Raises:
        ValueError: the trees have other structures.

    Example:
        >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
        {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Update the adapter with `tx` and leave the rest: no state for it, zero updates.

    `optax.multi_transform({"adapter": tx, "frozen": optax.set_to_zero()}, jlora.labels)`. Compute
    gradient and update in one `jax.jit`, and XLA drops the gradients of the frozen weights; donate
    the parameters to it, or the step hands out a second copy of them.

    Args:
        tx: an optax gradient transformation.

    Returns:
        A transformation over the whole tree of parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> state = freeze(optax.adam(1e-3)).init({"w": node})
        >>> sum(x.size for x in jax.tree.leaves(state)) == 2 * (6 + 8) + 1
        True
    """
    return optax.multi_transform({"adapter": tx, "frozen": optax.set_to_zero()}, labels)
