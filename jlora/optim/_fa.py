"""LoRA-FA: A is frozen, and B's gradient is that of the weight, as near as A lets it come."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora._arrays import LoraArray, is_adapted
from jlora.optim._factors import Pair, check, divided, given, label, pairs, unpaired

_CALL = "jlora.optim.lora_fa(tx)"


def lora_fa(
    tx: optax.GradientTransformation, *, scaling: ArrayLike | None = None, delta: float | int = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Freeze A, and give `tx` the gradient of B that moves `s A B` nearest to W's: of norm least.

    `∇B ← (AᵀA + δI)⁻¹ ∇B / s²`. A's update is zero, and `tx` has no state for it.

    s is each node's own where the parameters have it. The trainable tree of `jlora.partition`, and
    what `jlora.freeze` lets through, do not: there give `scaling`, or let it see the whole tree,
    `lora_fa(jlora.freeze(tx))`. Where s differs from node to node, only the latter is right.

    Args:
        tx: the optimizer of B and of all else that trains.
        scaling: s of the nodes whose parameters have none, `LoraSpec.s`.
        delta: δ.

    Returns:
        A transformation over any tree with `LoraArray` nodes; its `update` needs the parameters.
        It computes in float32 (or wider), and `tx` is given the gradients' dtype.

    Raises:
        TypeError: `tx` is not an optimizer.
        ValueError: the parameters have no `LoraArray`, one without A or B, or one whose s is not
            known (on `init`); `update` is not given the parameters.

    Example:
        >>> import jlora
        >>> node = jlora.LoraArray(None, jnp.ones((3, 2)), jnp.ones((2, 4)), None, "io")
        >>> tx = lora_fa(optax.adam(1e-3), scaling=2.0)
        >>> state = tx.init({"w": node})
        >>> sum(x.size for x in jax.tree.leaves(state)) == 2 * 8 + 1  # nothing of A's
        True

    Reference: Zhang et al. 2023, arXiv:2308.03303. PEFT's `create_lorafa_optimizer`.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`jlora.optim.lora_fa({tx!r})`: it wraps an optimizer: "
            "`jlora.optim.lora_fa(optax.adamw(1e-4))`."
        )
    return optax.chain(
        _project(scaling, delta),
        optax.multi_transform({"factor": optax.set_to_zero(), "other": tx}, label(_CALL, "lora_a")),
    )


def _project(scaling: ArrayLike | None, delta: float | int) -> optax.GradientTransformation:
    """Replace the gradient of B, and leave A's for who comes next."""

    def init(params: PyTree) -> optax.EmptyState:
        for path, node in check(params, _CALL):
            if scaling is None and not _has_scaling(node):
                raise ValueError(
                    f'`{_CALL}`: the scaling of "{path}" is not in the parameters, and B\'s '
                    "gradient is divided by its square. Give it, `lora_fa(tx, scaling=spec.s)`, "
                    "or let the whole tree through: `lora_fa(jlora.freeze(tx))`."
                )
        return optax.EmptyState()

    def project(gradient: Any, node: Any) -> Any:
        if not isinstance(node, LoraArray):
            return gradient

        def one(da: Array, db: Array, a: Array) -> Pair:
            s = jnp.asarray(node.scaling if _has_scaling(node) else scaling, a.dtype)
            s = s.reshape(*s.shape, *(1,) * (db.ndim - s.ndim))
            return da, divided(db, a, delta) / (s * s)

        both = zip(pairs(gradient), pairs(node), strict=True)
        return unpaired([one(da, db, a) for (da, db), (a, _) in both], gradient)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return jax.tree.map(project, updates, given(params, _CALL), is_leaf=is_adapted), state

    return optax.GradientTransformation(init, update)


def _has_scaling(node: LoraArray) -> bool:
    return not (node.scaling is None or isinstance(node.scaling, optax.MaskedNode))
