"""LoRA-RITE: Adam for the product A B, independent of its factorization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jlora._arrays import LoraArray, is_adapted
from jlora._check_values import check_number
from jlora.optim._factors import (
    Pair,
    dot,
    factor_nodes,
    gram,
    label,
    pairs,
    required,
    transposed,
    unpaired,
)

_CALL = "jlora.optim.lora_rite(learning_rate)"


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | int = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Precondition A and B so that the updates of A B do not depend on its factorization.

    With `Bᵀ = U R`, UᵀU = I, and P = UᵀU₋₁, which maps the previous basis to U, A's side is

        `G = ∇A R⁻¹`                                    the unmagnified gradient
        `V = β₂ P V₋₁ Pᵀ + (1 - β₂) GᵀG / in`           rank x rank
        `ρ = β₂ (ρ₋₁ + maxᵢ(λᵢ(V₋₁) - λᵢ(P V₋₁ Pᵀ)))`   the mass that escaped the new basis
        `M = β₁ M₋₁ Pᵀ + (1 - β₁) G (V̂ + ρ̂ I)^-½`
        `A ← A - η (M̂ R⁻ᵀ + weight_decay · A)`

    where a hat divides by 1 - βᵗ; for B's side, swap the roles. Training from (A, B) and from
    (A Q, Q⁻¹ B) yields the same sequence of A B, as long as A and B have full rank. While B is
    zero, A does not change; directions of B below about 3e-4 of its largest (in float32) count as
    zero.

    Args:
        learning_rate: η, or a schedule; of the same magnitude as for Adam.
        b1: β₁.
        b2: β₂.
        eps: added to the root of `V̂ + ρ̂ I`.
        weight_decay: decoupled weight decay of all trainable leaves. It preserves the invariance.

    Returns:
        An optimizer for trees with `LoraArray` nodes; its `update` requires the parameters. Leaves
        other than A and B use Adam. The state of A and B is float32 or wider: two arrays of the
        size of each, as in Adam, and two of rank x rank. Do not clip the norm of the gradients
        before it, which depends on the factorization; clip elements of the update, if anything.

    Raises:
        TypeError: an argument is not a number.
        ValueError: b1 or b2 is outside [0, 1), `eps` or `weight_decay` below 0; there is no
            `LoraArray`, or one without A or B (on `init`); `update` is called
            without the parameters.

    Example:
        >>> import jlora
        >>> a, b = jax.random.normal(jax.random.key(0), (3, 2)), jnp.eye(2, 4)
        >>> q = jnp.array([[1.0, 2.0], [0.0, 5.0]])
        >>> tx, grad = lora_rite(0.1), jax.grad(lambda n: jnp.sum((n.lora_a @ n.lora_b) ** 3))
        >>> def product(a, b):  # after one step
        ...     node = jlora.LoraArray(None, a, b, None, "io")
        ...     with jax.numpy_dtype_promotion("standard"):  # JAX's own default
        ...         update, _ = tx.update(grad(node), tx.init(node), node)
        ...     return (a + update.lora_a) @ (b + update.lora_b)
        >>> bool(jnp.allclose(product(a, b), product(a @ q, jnp.linalg.inv(q) @ b), atol=1e-4))
        True

    Reference: Yen et al. 2024, arXiv:2410.20625, algorithm 1, with the moving averages and the
    division by `in` of the authors' code, without its clipping and skipping of steps.
    """
    if not callable(learning_rate):
        check_number(learning_rate, _CALL, "learning_rate", "a number or a schedule, e.g. 1e-3")
    for name, rate in (("b1", b1), ("b2", b2)):
        check_number(rate, _CALL, name, "a number in [0, 1)", lambda x: (x >= 0) & (x < 1))
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        check_number(value, _CALL, name, "a number of at least 0", lambda x: x >= 0)
    adam = optax.scale_by_adam(b1, b2, eps)
    rite = _scale_by_rite(b1, b2, eps)
    return optax.chain(
        optax.multi_transform({"factor": rite, "other": adam}, label(_CALL, "lora_a", "lora_b")),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


class Side(NamedTuple):
    """State of one factor, in the basis of the other."""

    basis: Float[Array, "*stack other rank"]
    first: Float[Array, "*stack own rank"]
    second: Float[Array, "*stack rank rank"]
    escaped: Float[Array, "*stack"]


class RiteState(NamedTuple):
    """The number of steps, and for each node a pair of `Side`s, for A and B, per slice."""

    count: Int[Array, ""]
    sides: PyTree


def _scale_by_rite(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def empty(node: PyTree) -> list[tuple[Side, Side]]:
        return [(_empty(a, b), _empty(b, a)) for a, b in _pairs(node)]

    def init(params: PyTree) -> RiteState:
        factor_nodes(params, _CALL)
        sides = jax.tree.map(empty, params, is_leaf=is_adapted)
        return RiteState(jnp.zeros((), jnp.int32), sides)

    def step(
        gradient: PyTree, node: PyTree, olds: list[tuple[Side, Side]], count: Array
    ) -> tuple[PyTree, list[tuple[Side, Side]]]:
        changed, news = [], []
        for (da, db), (a, b), (old_a, old_b) in zip(
            _pairs(gradient), _pairs(node), olds, strict=True
        ):
            da, new_a = _step(da, b, old_a, count, b1, b2, eps)
            db, new_b = _step(db, a, old_b, count, b1, b2, eps)
            changed.append((da, db))
            news.append((new_a, new_b))
        return (unpaired(changed, gradient) if changed else gradient), news

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, RiteState]:
        count = state.count + 1
        gradients, tree = jax.tree.flatten(updates, is_leaf=is_adapted)
        nodes = tree.flatten_up_to(required(params, _CALL))
        olds = tree.flatten_up_to(state.sides)
        done = [step(*each, count) for each in zip(gradients, nodes, olds, strict=True)]
        sides = tree.unflatten([news for _, news in done])
        return tree.unflatten([changed for changed, _ in done]), RiteState(count, sides)

    return optax.GradientTransformation(init, update)


def _pairs(node: PyTree) -> list[Pair]:
    """Return a node's pairs; none for a `FullArray`, which Adam updates."""
    return pairs(node) if isinstance(node, LoraArray) else []


def _empty(own: Array, other: Array) -> Side:
    square = jnp.zeros((*own.shape[:-2], own.shape[-1], own.shape[-1]), own.dtype)
    return Side(jnp.zeros_like(other), jnp.zeros_like(own), square, square[..., 0, 0])


def _step(
    gradient: Array, other: Array, old: Side, count: Array, b1: float, b2: float, eps: float
) -> tuple[Array, Side]:
    """Return one factor's update, before the learning rate and its sign, and the new state."""
    # For A, with Bᵀ = U R: ∇A = Z Bᵀ = Z U R, where Z is the gradient of A B, so G = ∇A R⁻¹ = Z U.
    # From (A Q, Q⁻¹ B), Bᵀ Q⁻ᵀ has the same column space: U becomes U O with a rotation O, and G
    # becomes G O. V, the second moment of G, becomes OᵀV O, its inverse root likewise, and M
    # becomes M O. The step of A is M̂ R⁻ᵀ, so that of A B is M̂ R⁻ᵀ (U R)ᵀ = M̂ Uᵀ: R and O cancel.
    #
    # U changes from step to step. P = UᵀU₋₁ moves V and M into the new basis. Where the column
    # space of Bᵀ has changed, P is a contraction and P V Pᵀ loses part of V, which would enlarge
    # the step. ρ accumulates the largest eigenvalue lost; V + ρI replaces V in the inverse root.
    steps = count.astype(gradient.dtype)
    basis, inverse = _basis(other)
    g = dot(gradient, inverse)  # (*stack, own, rank)
    p = dot(transposed(basis), old.basis)  # (*stack, rank, rank)
    moved = dot(dot(p, old.second), transposed(p))
    lost = jnp.linalg.eigvalsh(old.second) - jnp.linalg.eigvalsh(moved)
    escaped = b2 * (old.escaped + jnp.maximum(lost, 0.0).max(-1))
    second = b2 * moved + (1.0 - b2) * gram(g) / g.shape[-2]
    corrected = 1.0 - b2**steps
    root = _inverse_root(second / corrected, escaped / corrected, eps)
    first = b1 * dot(old.first, transposed(p)) + (1.0 - b1) * dot(g, root)
    update = dot(first / (1.0 - b1**steps), transposed(inverse))
    return update, Side(basis, first, second, escaped)


def _basis(x: Array) -> tuple[Array, Array]:
    """Return U and R⁻¹ of `X = U R`; null directions of X are zero in both.

    The second pass restores the orthogonality that the first loses, because XᵀX squares the
    condition number of X.
    """
    tiny = float(jnp.finfo(x.dtype).eps)
    inverse = _pseudo_root(gram(x), tiny)
    rough = dot(x, inverse)
    again = _pseudo_root(gram(rough), 0.5)  # eigenvalues near 1, or near 0 in null directions
    return dot(rough, again), dot(inverse, again)


def _pseudo_root(square: Array, least: float) -> Array:
    """Return `S^-½` of the eigenvalues above `least` times the largest; the others become 0."""
    values, vectors = jnp.linalg.eigh(square)
    kept = values > least * values.max(-1, keepdims=True)
    roots = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1.0)), 0.0)
    return dot(vectors * roots[..., None, :], transposed(vectors))


def _inverse_root(square: Array, more: Array, eps: float) -> Array:
    """Return `(S + more I)^-½`."""
    values, vectors = jnp.linalg.eigh(square)
    # An eigenvalue below its rounding error is noise, and its inverse would be a random step.
    floor = float(jnp.finfo(values.dtype).eps) * values.max(-1, keepdims=True)
    roots = 1.0 / (jnp.sqrt(jnp.maximum(values, floor) + more[..., None]) + eps)
    return dot(vectors * roots[..., None, :], transposed(vectors))
