"""Riemannian preconditioning: each factor's gradient over the other factor's Gram matrix."""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jlora._arrays import LoraArray, is_adapted
from jlora.optim._factors import check, divided, given, pairs, refuse_wrapping, unpaired


def riemannian(delta: float | int = 1e-6) -> optax.GradientTransformation:
    """Divide the gradient of each factor by the other's Gram matrix, before another optimizer.

    `∇A ← ∇A (B Bᵀ + δI)⁻¹`, `∇B ← (AᵀA + δI)⁻¹ ∇B`. Up to δ, gradient descent then takes the
    same step of `A B` from every pair of factors of the same product.

    Args:
        delta: δ, above 0; while B is zero, only δ is left of `B Bᵀ`.

    Returns:
        A transformation without state, over any tree with `LoraArray` nodes; its `update` needs
        the parameters. It computes in float32 (or wider) and returns the gradients' dtype. All
        but A and B passes.

    Raises:
        TypeError: `delta` is an optimizer.
        ValueError: `delta` is not above 0; the parameters have no `LoraArray`, or one without A or
            B (on `init`); `update` is not given the parameters.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> a, b = jnp.ones((3, 1)), 2 * jnp.ones((1, 4))
        >>> node = jlora.LoraArray(None, a, b, None, "io")
        >>> tx = optax.chain(riemannian(delta=1e-6), optax.sgd(1.0))
        >>> updates, _ = tx.update({"w": node}, tx.init({"w": node}), {"w": node})
        >>> round(float(updates["w"].lora_a[0, 0]), 4)  # -1 / (2·2 + 2·2 + 2·2 + 2·2)
        -0.0625

    Reference: Zhang and Pilanci 2024, arXiv:2402.02347, whose code has δ = 1e-6. PEFT's
    `create_riemannian_optimizer`, whose `reg` is 1e-2, and which leaves embeddings and
    convolutions alone.
    """
    call = "jlora.optim.riemannian(delta)"
    refuse_wrapping(call, delta, "optax.chain(jlora.optim.riemannian(), tx)")
    if isinstance(delta, int | float) and delta <= 0:
        raise ValueError(
            f"`jlora.optim.riemannian(delta={delta})`: give a delta above 0, e.g. 1e-6. B starts "
            "at zero, and zero has no inverse."
        )

    def init(params: PyTree) -> optax.EmptyState:
        check(params, call)
        return optax.EmptyState()

    def precondition(gradient: Any, node: Any) -> Any:
        if not isinstance(node, LoraArray):
            return gradient
        both = zip(pairs(gradient), pairs(node), strict=True)
        changed = [(divided(da, b, delta), divided(db, a, delta)) for (da, db), (a, b) in both]
        return unpaired(changed, gradient)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        params = given(params, call)
        return jax.tree.map(precondition, updates, params, is_leaf=is_adapted), state

    return optax.GradientTransformation(init, update)
