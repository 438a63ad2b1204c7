"""An optimizer for each slot of a bank."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jlora._check import check_optimizer
from jlora._freeze import freeze
from jlora._partition import labels
from jlora.bank._slots import Bank, check_bank


def per_slot(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on each slot of a bank alone: K slots train as K separate runs.

    Each slot has its own step count, schedule, moments and norm for clipping. A slot whose
    gradient is exactly 0, because no example used it, keeps its weights and its state. Over a
    bank, Adam itself would move such a slot by its momentum, and decay would shrink it.

    This is a wrapper, not a mask of the ids: which slots were used is read from the gradient, so
    it needs neither the ids nor all micro-batches of an accumulated gradient.

    For a sweep, give each slot its own value of what `optax.inject_hyperparams` injects: the first
    axis of the state's `hyperparams` is the slots.

    Args:
        tx: an optax gradient transformation. Parts that do not train are frozen, as by
            `jlora.freeze`.

    Returns:
        A transformation over a `Bank`.

    Raises:
        TypeError: `tx` is not an optimizer; the parameters or updates are not a bank.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> from jlora.bank import stack
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bank = stack([detach(params)[1]] * 3)
        >>> state = per_slot(optax.adam(1e-3)).init(bank)
        >>> state[0].count.shape
        (3,)
    """
    check_optimizer(tx, "jlora.bank.per_slot")
    inner, call = freeze(tx), "jlora.bank.per_slot(tx)"

    def init(params: PyTree) -> Any:
        check_bank(params, f"{call}.init(params)", "params")
        return jax.vmap(inner.init)(params)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        for name, tree in (("updates", updates), ("params", params)):
            if tree is not None:
                check_bank(tree, f"{call}.update(updates, state, params)", name)

        def one(updates: PyTree, state: Any, params: PyTree) -> Any:
            return inner.update(updates, state, params, **extra)

        found, moved = jax.vmap(one)(updates, state, params)
        used = _used(updates)
        return (
            jax.tree.map(lambda x: jnp.where(_along(used, x), x, jnp.zeros_like(x)), found),
            jax.tree.map(lambda new, old: jnp.where(_along(used, new), new, old), moved, state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _used(grads: Bank) -> Array:
    """Return which slots have a gradient other than 0; NaN is one."""
    each = [
        (x != 0).reshape(x.shape[0], -1).any(1)
        for x, word in zip(jax.tree.leaves(grads), jax.tree.leaves(labels(grads)), strict=True)
        if word == "adapter"
    ]
    return jnp.stack(each).any(0)


def _along(used: Array, x: Array) -> Array:
    return used.reshape(-1, *(1,) * (x.ndim - 1))
