"""Riemannian preconditioning: each factor's gradient times the other's inverse Gram matrix."""

import jax
import optax
from jaxtyping import PyTree

from jlora import _compat
from jlora._arrays import LoraArray, is_adapted
from jlora._check_values import check_number
from jlora.optim._factors import (
    factor_nodes,
    pairs,
    preconditioned,
    refuse_wrapping,
    required,
    unpaired,
)


def riemannian(delta: float | int = 1e-6) -> optax.GradientTransformation:
    """Precondition the gradient of each factor by the other's Gram matrix.

    `∇A ← ∇A (B Bᵀ + δI)⁻¹`, `∇B ← (AᵀA + δI)⁻¹ ∇B`. Up to δ, gradient descent then changes `A B`
    by the same step for all factorizations of the same product. Chain an optimizer after it.

    Args:
        delta: δ, above 0; while B is zero, `B Bᵀ + δI` is only δI.

    Returns:
        A stateless transformation of trees with `LoraArray` nodes; its `update` requires the
        parameters. It computes in float32 or wider and returns the gradients' dtype. It changes
        only A and B.

    Raises:
        TypeError: `delta` is an optimizer, or not a number.
        ValueError: `delta` is not above 0; there is no `LoraArray`, or one without A or B (on
            `init`); `update` is called without the parameters.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> a, b = jnp.ones((3, 1)), 2 * jnp.ones((1, 4))
        >>> node = jlora.LoraArray(None, a, b, None, "io")
        >>> tx = optax.chain(riemannian(delta=1e-6), optax.sgd(1.0))
        >>> updates, _ = tx.update({"w": node}, tx.init({"w": node}), {"w": node})
        >>> round(float(updates["w"].lora_a[0, 0]), 4)  # -1 / (2·2 + 2·2 + 2·2 + 2·2)
        -0.0625

    Reference: Zhang and Pilanci 2024, arXiv:2402.02347, whose code uses δ = 1e-6. PEFT's
    `create_riemannian_optimizer`, whose `reg` is 1e-2, and which excludes embeddings and
    convolutions.
    """
    call = "jlora.optim.riemannian(delta)"
    refuse_wrapping(call, delta, "optax.chain(jlora.optim.riemannian(), tx)")
    check_number(delta, call, "delta", "a number above 0, e.g. 1e-6")
    if not (_compat.is_traced(delta) or delta > 0):
        raise ValueError(
            f"`jlora.optim.riemannian(delta={delta})`: give a delta above 0, e.g. 1e-6. B is "
            "initially zero, and without delta its Gram matrix has no inverse."
        )

    def init(params: PyTree) -> optax.EmptyState:
        factor_nodes(params, call)
        return optax.EmptyState()

    # Let G be the gradient of W' = W + A B (s is absorbed in G), so ∇A = G Bᵀ and ∇B = AᵀG. Plain
    # descent moves A B by -η (G BᵀB + A AᵀG) to first order, which depends on the factorization:
    # (A Q, Q⁻¹ B) has the same product but other BᵀB and A Aᵀ. With the inverses it moves by
    #
    #     -η (G Bᵀ(B Bᵀ)⁻¹B + A(AᵀA)⁻¹Aᵀ G) = -η (G P_B + P_A G)
    #
    # where P_B projects onto the rows of B and P_A onto the columns of A, the same for every Q.
    def precondition(gradient: PyTree, node: PyTree) -> PyTree:
        if not isinstance(node, LoraArray):
            return gradient
        both = zip(pairs(gradient), pairs(node), strict=True)
        changed = [
            (preconditioned(da, b, delta), preconditioned(db, a, delta))
            for (da, db), (a, b) in both
        ]
        return unpaired(changed, gradient)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        params = required(params, call)
        return jax.tree.map(precondition, updates, params, is_leaf=is_adapted), state

    return optax.GradientTransformation(init, update)
