"""AdaLoRA: allocate the ranks to the weights by the importance of their singular values."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from jlora._arrays import LoraArray, is_adapted
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check_values import check_integer, check_number
from jlora.forms.adalora import FORM, VALUES
from jlora.optim._factors import gram, require_wrapped, required, transposed

_CALL = "jlora.optim.adalora(tx, ...)"
_Parts = dict[str, dict[str, Array]]


class AdaLoraState(NamedTuple):
    """State of `adalora`.

    Attributes:
        inner: the state of the wrapped optimizer.
        count: the number of steps.
        sensitivity: the running mean Ī of I = |w · ∇w|, by path and part.
        uncertainty: the running mean Ū of |I - Ī|, by path and part.
        kept: by path, which singular values are not pruned, `(*stack, rank)`.
    """

    inner: optax.OptState
    count: Array
    sensitivity: _Parts
    uncertainty: _Parts
    kept: dict[str, Array]


def adalora(
    tx: optax.GradientTransformation,
    *,
    target_rank: int,
    total_steps: int,
    warmup_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Prune the least important singular values on a shrinking budget.

    The importance is `S_i = s(λ_i) + mean_j s(A_ji) + mean_j s(B_ij)` with `s(w) = Ī · Ū`, the
    running means of `I = |w · ∇w|` and of `|I - Ī|`. The budget for all weights together is all
    singular values for `warmup_steps`, then decreases cubically to `target_rank` per weight; in
    the last `final_steps` the selection is fixed. Shapes do not change, so nothing is recompiled.
    `jlora.optim.orthogonality` is the matching regularizer.

    Args:
        tx: the optimizer of all trainable leaves.
        target_rank: the average number of singular values that a weight keeps.
        total_steps: the number of training steps.
        warmup_steps: the steps before pruning begins. PEFT's `tinit`.
        final_steps: the steps at the end with a fixed selection. PEFT's `tfinal`.
        every: the number of steps between selections. PEFT's `deltaT`.
        beta1: the decay rate of the sensitivity's running mean.
        beta2: the decay rate of the uncertainty's running mean.

    Returns:
        A transformation of trees with `LoraArray` nodes of the form "adalora"; its `update`
        requires the parameters.

    Raises:
        TypeError: `tx` is not an optimizer; a count is not an integer, or a rate not a number.
        ValueError: `target_rank` is below 1 or above a weight's rank; the phases exceed
            `total_steps`; `every` is below 1; a rate is outside (0, 1); no node has singular
            values (on `init`); `update` is called without the parameters.

    Example:
        >>> from jlora import LoraSpec, attach, partition
        >>> params = attach({"w": jnp.ones((8, 6))}, {"w": LoraSpec(4, form="adalora")},
        ...                 key=jax.random.key(0))
        >>> trainable, _ = partition(params)
        >>> tx = adalora(optax.sgd(0.1), target_rank=1, total_steps=2)
        >>> state, grads = tx.init(trainable), jax.tree.map(jnp.ones_like, trainable)
        >>> for _ in range(2):
        ...     updates, state = tx.update(grads, state, trainable)
        ...     trainable = optax.apply_updates(trainable, updates)
        >>> int((trainable["w"].extra["singular_values"] != 0).sum())
        1

    Reference: Zhang et al. 2023, arXiv:2303.10512, section 3.2 and algorithm 1. PEFT's
    `RankAllocator`, called with the steps counted from 1.
    """
    require_wrapped(tx, "adalora", ", target_rank=4, total_steps=1000")
    for name, count, least in (
        ("target_rank", target_rank, 1),
        ("total_steps", total_steps, 1),
        ("warmup_steps", warmup_steps, 0),
        ("final_steps", final_steps, 0),
        ("every", every, 1),
    ):
        check_integer(count, _CALL, name, least)
    for name, rate in (("beta1", beta1), ("beta2", beta2)):
        check_number(rate, _CALL, name, "a number in (0, 1)", lambda x: (x > 0) & (x < 1))
    phases = (warmup_steps, final_steps, total_steps - warmup_steps - final_steps)
    if min(phases) < 0:
        raise ValueError(
            f"`{_CALL}`: total_steps={total_steps} is below warmup_steps={warmup_steps} plus "
            f"final_steps={final_steps}: the phases must fit into `total_steps`."
        )
    plan = _Plan(target_rank, warmup_steps, total_steps - final_steps, every, beta1, beta2)
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> AdaLoraState:
        parts = _parts(params, target_rank)
        # Separate arrays: the same buffer must not be donated twice.
        sensitivity, uncertainty = (jax.tree.map(jnp.zeros_like, parts) for _ in range(2))
        kept = {path: jnp.ones(x[VALUES].shape, bool) for path, x in parts.items()}
        return AdaLoraState(
            tx.init(params), jnp.zeros((), jnp.int32), sensitivity, uncertainty, kept
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: PyTree
    ) -> tuple[PyTree, AdaLoraState]:
        gradients, before = _parts(updates), _parts(required(params, _CALL))
        updates, inner = tx.update(updates, state.inner, params, **extra)
        after = jax.tree.map(lambda w, u: w + u.astype(w.dtype), before, _parts(updates))
        state = plan.follow(state._replace(inner=inner), after, gradients)
        holds = plan.holds(state.count)
        zeroed = {
            path: jnp.where(
                holds & ~state.kept[path], -parts[VALUES], _parts(updates)[path][VALUES]
            )
            for path, parts in before.items()
        }
        return _with_values(updates, zeroed), state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The schedule of selections, and how the importance is averaged."""

    target_rank: int
    warmup: int
    end: int
    every: int
    beta1: float
    beta2: float

    def chooses(self, count: Array) -> Array:
        """Whether this step selects."""
        falling = (count > self.warmup) & (count < self.end) & (count % self.every == 0)
        return falling | (count == self.end)

    def holds(self, count: Array) -> Array:
        """Whether this step sets pruned singular values to zero."""
        return self.chooses(count) | (count > self.end)

    def budget(self, count: Array, most: int, least: int) -> Array:
        """Return the number of singular values to keep, from a table computed in Python."""
        span = max(1, self.end - self.warmup)
        falls = [int((most - least) * (1 - k / span) ** 3 + least) for k in range(span + 1)]
        return jnp.asarray(falls)[jnp.clip(count - self.warmup, 0, span)]

    def follow(self, state: AdaLoraState, after: _Parts, gradients: _Parts) -> AdaLoraState:
        """Update the running importance after a step, and select."""
        # The first-order change of the loss when w is set to zero is |w · ∇w| = I. One batch is a
        # noisy estimate of it, so s(w) = Ī · Ū multiplies its running mean by the running mean of
        # its deviation from that: uncertain weights are kept (Zhang et al., eq. 9 to 11). A triplet
        # (λ_i, column i of A, row i of B) is scored as a unit, with means over the vectors so that
        # the width of a weight does not matter, and all triplets of all weights are ranked
        # together: the budget moves between weights.
        count = state.count + 1

        def mean(old: Array, new: Array, beta: float) -> Array:
            return jnp.where(count < self.end, beta * old + (1 - beta) * new, old)

        def sensitivity_now(old: Array, w: Array, g: Array) -> Array:
            # A NaN that the wrapped optimizer skips would stay in the running mean.
            now = jnp.abs(w * g.astype(w.dtype))
            return jnp.where(jnp.isfinite(now), now, old)

        now = jax.tree.map(sensitivity_now, state.sensitivity, after, gradients)
        sensitivity = jax.tree.map(lambda o, n: mean(o, n, self.beta1), state.sensitivity, now)
        deviation = jax.tree.map(lambda n, m: jnp.abs(n - m), now, sensitivity)
        uncertainty = jax.tree.map(
            lambda o, n: mean(o, n, self.beta2), state.uncertainty, deviation
        )
        products = jax.tree.map(lax.mul, sensitivity, uncertainty)
        scores = {path: _score(parts) for path, parts in products.items()}
        ranked = jnp.sort(jnp.concatenate([x.reshape(-1) for x in scores.values()]))
        weights = sum(x.size // x.shape[-1] for x in scores.values())
        dropped = ranked.size - self.budget(count, ranked.size, self.target_rank * weights)
        least = jnp.where(dropped > 0, ranked[jnp.maximum(dropped - 1, 0)], -jnp.inf)
        choose = self.chooses(count)
        kept = {path: jnp.where(choose, x > least, state.kept[path]) for path, x in scores.items()}
        return AdaLoraState(state.inner, count, sensitivity, uncertainty, kept)


def _score(parts: dict[str, Array]) -> Array:
    """Add each singular value's score and the mean scores of its vectors, `(*stack, rank)`."""
    values = parts[VALUES]
    *stack, rank = values.shape
    a = parts["lora_a"].reshape(*stack, -1, rank).mean(-2)
    b = parts["lora_b"].reshape(*stack, rank, -1).mean(-1)
    return values + a + b


def _parts(tree: PyTree, target_rank: int = 0, call: str = _CALL) -> _Parts:
    """Return A, Λ and B of every node that has them; refuse a tree without such nodes."""
    found: _Parts = {}
    for path, node in leaves_with_paths(tree, is_adapted):
        if isinstance(node, LoraArray) and node.form == FORM.name:
            found[path] = {name: node.parts[name] for name in FORM.parts}
    if not found:
        raise ValueError(
            f"`{call}`: no weight has singular values that could be pruned. Attach with "
            '`LoraSpec(form="adalora")`.'
        )
    for path, parts in found.items():
        if target_rank > parts[VALUES].shape[-1]:
            raise ValueError(
                f'`{call}`: the target rank {target_rank} is above the rank of "{path}", '
                f"{parts[VALUES].shape[-1]}. The rank can only decrease: attach with a higher one."
            )
    return found


def _with_values(tree: PyTree, values: dict[str, Array]) -> PyTree:
    def put(path: str, node: PyTree) -> PyTree:
        return node.with_parts({VALUES: values[path]}) if path in values else node

    return map_with_paths(put, tree, is_adapted)


def orthogonality(params: PyTree) -> Float[Array, ""]:
    """Return the deviation of A and B from orthonormal: the mean of `‖XᵀX - I‖_F` over all of them.

    Added to the loss, with weight 0.5 in PEFT (`orth_reg_weight`), it keeps A and B close to
    singular vectors, so that a small singular value contributes little.

    Args:
        params: a tree with `LoraArray` nodes of the form "adalora".

    Returns:
        A scalar, differentiable in A and B.

    Raises:
        ValueError: no node has singular values.

    Example:
        >>> from jlora import LoraArray
        >>> a, b, values = jnp.eye(3)[:, :2], jnp.zeros((2, 4)), jnp.ones(2)
        >>> extra = {"singular_values": values}
        >>> node = LoraArray(None, a, b, None, "io", extra=extra, form="adalora")
        >>> round(float(orthogonality({"w": node})), 4)  # (0 + √2) / 2
        0.7071

    Reference: Zhang et al. 2023, arXiv:2303.10512, eq. 4. PEFT's `orth_reg_weight`.
    """
    distances = []
    for parts in _parts(params, call="jlora.optim.orthogonality(params)").values():
        stack, rank = parts[VALUES].shape[:-1], parts[VALUES].shape[-1]
        a = parts["lora_a"].reshape(*stack, -1, rank)
        b = transposed(parts["lora_b"].reshape(*stack, rank, -1))
        eye = jnp.eye(rank, dtype=a.dtype).reshape(*(1,) * len(stack), rank, rank)
        distances += [jnp.linalg.norm(gram(x) - eye, axis=(-2, -1)).reshape(-1) for x in (a, b)]
    return jnp.concatenate(distances).mean()
