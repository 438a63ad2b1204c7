"""LoRA-FA: A is frozen; B's update makes s·A·B follow the full-weight gradient."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora._arrays import LoraArray, is_adapted
from jlora._check_values import check_number
from jlora.optim._factors import (
    Pair,
    factor_nodes,
    label,
    pairs,
    preconditioned,
    require_wrapped,
    required,
    unpaired,
)

_CALL = "jlora.optim.lora_fa(tx)"


def lora_fa(
    tx: optax.GradientTransformation, *, scaling: ArrayLike | None = None, delta: float | int = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Freeze A, and project B's gradient so that s·A·B follows the full-weight gradient.

    `∇B ← (AᵀA + δI)⁻¹ ∇B / s²`, for which `s·A·∇B` is the projection of the gradient of W onto the
    columns of A. A's update is zero, and `tx` has no state for it.

    s is read from each node. The trainable tree of `jlora.partition`, and the parameters inside
    `jlora.freeze`, do not contain it: pass `scaling`, or use `lora_fa(jlora.freeze(tx))`. If s
    differs between nodes, only the latter is correct.

    Args:
        tx: the optimizer of B and of all other trainable leaves.
        scaling: s for nodes without scaling, `LoraSpec.s`.
        delta: δ.

    Returns:
        A transformation of trees with `LoraArray` nodes; its `update` requires the parameters. It
        computes in float32 or wider, and passes gradients to `tx` in their original dtype.

    Raises:
        TypeError: `tx` is not an optimizer; `scaling` or `delta` is not a number.
        ValueError: `scaling` is 0 or `delta` below 0; there is no `LoraArray`, or one without A, B
            or s (on `init`); `update` is called without the parameters.

    Example:
        >>> import jlora
        >>> node = jlora.LoraArray(None, jnp.ones((3, 2)), jnp.ones((2, 4)), None, "io")
        >>> tx = lora_fa(optax.adam(1e-3), scaling=2.0)
        >>> state = tx.init({"w": node})
        >>> sum(x.size for x in jax.tree.leaves(state)) == 2 * 8 + 1  # nothing of A's
        True

    Reference: Zhang et al. 2023, arXiv:2308.03303. PEFT's `create_lorafa_optimizer`.
    """
    require_wrapped(tx, "lora_fa")
    wanted = "a number of at least 0, e.g. 1e-8"
    check_number(delta, _CALL, "delta", wanted, lambda x: x >= 0)
    if scaling is not None:
        wanted = "s of the nodes, e.g. `scaling=spec.s`, not 0"
        check_number(scaling, _CALL, "scaling", wanted, lambda x: x != 0, scalar=False)
    return optax.chain(
        _project(scaling, delta),
        optax.multi_transform({"factor": optax.set_to_zero(), "other": tx}, label(_CALL, "lora_a")),
    )


def _project(scaling: ArrayLike | None, delta: float | int) -> optax.GradientTransformation:
    """Replace the gradient of B; A's passes through."""

    def init(params: PyTree) -> optax.EmptyState:
        for path, node in factor_nodes(params, _CALL):
            if scaling is None and not _has_scaling(node):
                raise ValueError(
                    f'`{_CALL}`: the scaling of "{path}" is not in the parameters, but B\'s '
                    "gradient is divided by its square. Pass it, `lora_fa(tx, scaling=spec.s)`, "
                    "or pass the full tree: `lora_fa(jlora.freeze(tx))`."
                )
        return optax.EmptyState()

    def project(gradient: PyTree, node: PyTree) -> PyTree:
        if not isinstance(node, LoraArray):
            return gradient

        def one(da: Array, db: Array, a: Array) -> Pair:
            s = jnp.asarray(node.scaling if _has_scaling(node) else scaling, a.dtype)
            s = s.reshape(*s.shape, *(1,) * (db.ndim - s.ndim))
            return da, preconditioned(db, a, delta) / (s * s)

        both = zip(pairs(gradient), pairs(node), strict=True)
        return unpaired([one(da, db, a) for (da, db), (a, _) in both], gradient)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        return jax.tree.map(project, updates, required(params, _CALL), is_leaf=is_adapted), state

    return optax.GradientTransformation(init, update)


def _has_scaling(node: LoraArray) -> bool:
    return not (node.scaling is None or isinstance(node.scaling, optax.MaskedNode))
