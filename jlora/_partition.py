"""Trainable and frozen leaves: labels for optax, and two trees for `jax.grad`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import PyTree

from jlora import _compat, forms
from jlora._arrays import FullArray, LoraArray, is_adapted
from jlora._base import is_stored
from jlora._check import check_function, check_same, check_tree
from jlora._paths import brief


def _by_part(leaf: Any, trainable: Callable[[Any], Any], frozen: Callable[[Any], Any]) -> Any:
    """Apply one function to the parts of a leaf that train and another to those that do not."""
    if isinstance(leaf, LoraArray):
        kinds = forms.parts(leaf)
        parts = {k: (frozen if kinds[k].frozen else trainable)(x) for k, x in leaf.parts.items()}
        base, scaling = frozen(leaf.base), frozen(leaf.scaling)
        return dataclasses.replace(leaf, base=base, scaling=scaling).with_parts(parts)
    if isinstance(leaf, FullArray):
        return FullArray(frozen(leaf.base), trainable(leaf.value))
    return frozen(leaf)


def still(x: Any) -> Any:
    """Make an array a constant of differentiation.

    Only a traced array can be differentiated, so anything else is returned unchanged.
    """
    traced = _compat.is_traced(x) and jnp.issubdtype(x.dtype, jnp.inexact)
    return lax.stop_gradient(x) if traced else x


def constant(leaf: Any) -> Any:
    """Make what does not train of one leaf a constant of differentiation."""
    return _by_part(leaf, lambda x: x, still)


def has_adapted(tree: PyTree) -> bool:
    """Whether a tree has a `LoraArray` or a `FullArray`."""
    return any(map(is_adapted, jax.tree.leaves(tree, is_leaf=is_adapted)))


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

    def fill(word: str) -> Callable[[Any], Any]:
        return lambda part: jax.tree.map(lambda _: word, part)

    label = functools.partial(_by_part, trainable=fill("adapter"), frozen=fill("frozen"))
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
    check_tree(params, "jlora.partition(params)")
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
    check_same(
        (trainable, frozen),
        ("trainable", "frozen"),
        "jlora.combine(trainable, frozen)",
        "Pass the two trees of one `jlora.partition(params)`.",
    )
    return jax.tree.map(
        lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None
    )


def zero(x: Any) -> Any:
    """Return what leaves `x` as it is when added to it; None where nothing can be added."""
    if isinstance(x, (bool, int, float, complex)):
        return type(x)(0)
    numeric = hasattr(x, "dtype") and (
        jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.bool_)
    )
    return jnp.zeros_like(x) if numeric else None


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Add the updates to what trains: `optax.apply_updates` for a tree of any leaves.

    Everything else is returned as it was: PRNG keys, strings and functions, to which nothing can be
    added, and frozen weights bit for bit (`-0.0 + 0.0` is `0.0`).

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.
        updates: of the same structure, from `jlora.freeze(tx).update`; `None` where frozen.

    Returns:
        The new parameters, of the structure and dtypes of `params`.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> params = {"w": node, "key": jax.random.key(0)}
        >>> updates = {"w": jax.tree.map(jnp.ones_like, node), "key": None}
        >>> new = apply_updates(params, updates)["w"]
        >>> float(new.lora_a[0, 0]), float(new.base[0, 0])
        (2.0, 1.0)
    """
    check_same(
        (params, updates),
        ("params", "updates"),
        "jlora.apply_updates(params, updates)",
        "Pass what `jlora.freeze(tx).update(grads, state, params)` returned.",
    )
    trainable, frozen = partition(params)
    return combine(optax.apply_updates(trainable, partition(updates)[0]), frozen)


def value_and_grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """Differentiate a loss in what trains: `jax.value_and_grad` for a tree of any leaves.

    `jax.value_and_grad` refuses integer, boolean and PRNG-key leaves, strings and functions. Here
    only what trains is differentiated, so the rest of the tree may be anything.

    Args:
        fun: returns a scalar, or `(scalar, aux)` with `has_aux`.
        argnums: the positions of the arguments to differentiate. Of one without adapted nodes
            every leaf is differentiated, as in JAX.
        has_aux: whether `fun` returns `(scalar, aux)`.

    Returns:
        A function of the arguments of `fun` that returns `(fun's result, gradients)`. Gradients are
        a tree like the argument, or a tuple of them if `argnums` is a sequence. Numeric leaves that
        do not train have zeros, which XLA drops inside `jax.jit`; keys, strings and functions have
        `None`, which `jlora.freeze(tx).update` and `jlora.apply_updates` take.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> params = {"w": node, "step": jnp.array(7), "key": jax.random.key(0)}
        >>> value, grads = value_and_grad(lambda p: p["w"].lora_a.sum() * p["step"])(params)
        >>> float(value), float(grads["w"].lora_a[0, 0]), float(grads["w"].base[0, 0])
        (42.0, 7.0, 0.0)
    """

    call = "jlora.value_and_grad(fn)"
    check_function(fun, call)
    indices = [argnums] if isinstance(argnums, int) else argnums
    if not (isinstance(indices, Sequence) and indices and all(isinstance(k, int) for k in indices)):
        raise TypeError(
            f"`{call}`: `argnums` is {brief(argnums)}. Pass the position of the parameters, "
            "`argnums=0`, or a tuple of positions."
        )

    @functools.wraps(fun)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not all(-len(args) <= k < len(args) for k in indices):
            raise ValueError(
                f"`{call}`: `argnums` is {argnums}, and there are {len(args)} positional "
                "arguments. Pass what is differentiated by position."
            )
        positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        pairs = [
            partition(x) if has_adapted(x) else (x, jax.tree.map(lambda _: None, x))
            for x in (args[k] for k in positions)
        ]

        def of_trainable(trainables: list[PyTree]) -> Any:
            filled = list(args)
            for k, trainable, (_, frozen) in zip(positions, trainables, pairs, strict=True):
                filled[k] = combine(trainable, frozen)
            return fun(*filled, **kwargs)

        value, found = jax.value_and_grad(of_trainable, has_aux=has_aux)([t for t, _ in pairs])
        grads = tuple(
            combine(g, jax.tree.map(zero, frozen))
            for g, (_, frozen) in zip(found, pairs, strict=True)
        )
        return value, grads[0] if isinstance(argnums, int) else grads

    return run
