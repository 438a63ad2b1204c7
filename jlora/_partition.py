"""Trainable and frozen leaves: labels for optax, and two trees for `jax.grad`."""

import dataclasses

import jax
import optax
from jaxtyping import PyTree

from jlora import forms
from jlora._arrays import FullArray, LoraArray, is_adapted
from jlora._base import is_stored


def labels(params: PyTree) -> PyTree:
    """Label every leaf "adapter" (trainable parts of an update, `FullArray.value`) or "frozen".

    The form of an update defines which of its parts train: see `jlora.forms`.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes; the leaves may be of any type.

    Returns:
        A tree of the same structure with strings as leaves, for `optax.multi_transform`.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> labels({"w": node})["w"].lora_a, labels({"w": node})["w"].scaling
        ('adapter', 'frozen')
    """

    def label(node: PyTree) -> PyTree:
        def fill(part: PyTree, word: str) -> PyTree:
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
    """Split into the trainable and the frozen leaves, with `None` in place of the others.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.

    Returns:
        `trainable` and `frozen`, each with the structure of `params`; `combine` is the inverse.

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
    """Merge the leaves of two trees into one: the inverse of `partition`.

    Args:
        trainable: a tree with `None` where `frozen` has a leaf.
        frozen: a tree with `None` where `trainable` has a leaf.

    Returns:
        The tree of all leaves.

    Raises:
        ValueError: the two trees have different structures.

    Example:
        >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
        {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it updates the adapter only: frozen leaves get zero updates.

    `optax.multi_transform({"adapter": tx, "frozen": optax.set_to_zero()}, jlora.labels)`. There is
    no optimizer state for frozen leaves. Compute gradient and update in one `jax.jit`, so that XLA
    drops the gradients of the frozen weights, and donate the parameters to it, or the step
    allocates a second copy of them.

    Not to be confused with `optax.transforms.freeze(mask)`, which wraps nothing and zeroes the
    updates of the masked leaves.

    Args:
        tx: an optax gradient transformation.

    Returns:
        A transformation of the tree of all parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> state = freeze(optax.adam(1e-3)).init({"w": node})
        >>> sum(x.size for x in jax.tree.leaves(state)) == 2 * (6 + 8) + 1
        True
    """
    return optax.multi_transform({"adapter": tx, "frozen": optax.set_to_zero()}, labels)
