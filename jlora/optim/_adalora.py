"""AdaLoRA: the ranks are spread over the weights by how much the loss hangs on each."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from jlora._arrays import LoraArray, is_adapted
from jlora._paths import leaves_with_paths, map_with_paths
from jlora.forms.adalora import FORM, VALUES
from jlora.optim._factors import given, gram, turned

_CALL = "jlora.optim.adalora(tx, ...)"
_Parts = dict[str, dict[str, Array]]


class AdaLoraState(NamedTuple):
    """What `adalora` remembers.

    Attributes:
        inner: the state of the optimizer.
        count: the steps that are done.
        sensitivity: the running mean of |w · ∇w|, by path and part.
        uncertainty: the running mean of how far it strays from that.
        kept: by path, which singular values are not held at zero, `(*stack, rank)`.
    """

    inner: Any
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
    """Hold at zero the singular values that the loss hangs on least, ever more of them.

    `S_i = s(λ_i) + mean_j s(A_ji) + mean_j s(B_ij)`, `s(w) = Ī · Ū`: the running means of
    `I = |w · ∇w|` and of `|I - Ī|`. After `warmup_steps` the budget, all singular values at first,
    falls as a cube to `target_rank` a weight, over all weights together; in the last `final_steps`
    the choice stands. The shapes stay as they are, so nothing is compiled again; see
    `jlora.optim.orthogonality` for the penalty that belongs to it.

    Args:
        tx: the optimizer of all that trains.
        target_rank: how many singular values a weight keeps on average.
        total_steps: of the training.
        warmup_steps: in which all are kept. PEFT's `tinit`.
        final_steps: in which the choice stands. PEFT's `tfinal`.
        every: how many steps lie between choices. PEFT's `deltaT`.
        beta1: of the sensitivity's running mean.
        beta2: of the uncertainty's.

    Returns:
        A transformation over any tree with `LoraArray` nodes of the form "adalora"; its `update`
        needs the parameters.

    Raises:
        ValueError: `target_rank` below 1 or above the weights' ranks, phases longer than the
            training, `every` below 1, a rate outside (0, 1), a tree without singular values (on
            `init`); `update` is not given the parameters.

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
    phases = (warmup_steps, final_steps, total_steps - warmup_steps - final_steps)
    if (
        target_rank < 1
        or every < 1
        or min(phases) < 0
        or not 0 < min(beta1, beta2, 1 - max(beta1, beta2))
    ):
        raise ValueError(
            f"`jlora.optim.adalora(target_rank={target_rank}, total_steps={total_steps}, "
            f"warmup_steps={warmup_steps}, final_steps={final_steps}, every={every}, "
            f"beta1={beta1}, beta2={beta2})`: ranks and `every` are at least 1, the phases fit "
            "into the training, and the rates lie between 0 and 1."
        )
    plan = _Plan(target_rank, warmup_steps, total_steps - final_steps, every, beta1, beta2)
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> AdaLoraState:
        parts = _parts(params, target_rank)
        # Each array its own: under donation one buffer must not be given away twice.
        felt, unsure = (jax.tree.map(jnp.zeros_like, parts) for _ in range(2))
        kept = {path: jnp.ones(x[VALUES].shape, bool) for path, x in parts.items()}
        return AdaLoraState(tx.init(params), jnp.zeros((), jnp.int32), felt, unsure, kept)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AdaLoraState]:
        gradients, before = _parts(updates), _parts(given(params, _CALL))
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
    """Which steps choose, among how many, and how the importance is averaged."""

    target_rank: int
    warmup: int
    end: int
    every: int
    beta1: float
    beta2: float

    def chooses(self, count: Array) -> Array:
        """Whether this step chooses anew."""
        falling = (count > self.warmup) & (count < self.end) & (count % self.every == 0)
        return falling | (count == self.end)

    def holds(self, count: Array) -> Array:
        """Whether this step holds at zero what is not kept."""
        return self.chooses(count) | (count > self.end)

    def budget(self, count: Array, most: int, least: int) -> Array:
        """Return how many singular values are kept; a table, so that it is rounded exactly."""
        span = max(1, self.end - self.warmup)
        falls = [int((most - least) * (1 - k / span) ** 3 + least) for k in range(span + 1)]
        return jnp.asarray(falls)[jnp.clip(count - self.warmup, 0, span)]

    def follow(self, state: AdaLoraState, after: _Parts, gradients: _Parts) -> AdaLoraState:
        """Average the importance of what the step has made, and choose."""
        count = state.count + 1

        def mean(old: Array, new: Array, beta: float) -> Array:
            return jnp.where(count < self.end, beta * old + (1 - beta) * new, old)

        def felt_now(old: Array, w: Array, g: Array) -> Array:
            # A NaN that the inner transformation passes over would stay in the mean for ever.
            now = jnp.abs(w * g.astype(w.dtype))
            return jnp.where(jnp.isfinite(now), now, old)

        now = jax.tree.map(felt_now, state.sensitivity, after, gradients)
        felt = jax.tree.map(lambda o, n: mean(o, n, self.beta1), state.sensitivity, now)
        strays = jax.tree.map(lambda n, m: jnp.abs(n - m), now, felt)
        unsure = jax.tree.map(lambda o, n: mean(o, n, self.beta2), state.uncertainty, strays)
        scores = {path: _score(jax.tree.map(lax.mul, felt[path], unsure[path])) for path in felt}
        ranked = jnp.sort(jnp.concatenate([x.reshape(-1) for x in scores.values()]))
        weights = sum(x.size // x.shape[-1] for x in scores.values())
        dropped = ranked.size - self.budget(count, ranked.size, self.target_rank * weights)
        least = jnp.where(dropped > 0, ranked[jnp.maximum(dropped - 1, 0)], -jnp.inf)
        choose = self.chooses(count)
        kept = {path: jnp.where(choose, x > least, state.kept[path]) for path, x in scores.items()}
        return AdaLoraState(state.inner, count, felt, unsure, kept)


def _score(parts: dict[str, Array]) -> Array:
    """Return a singular value's importance and its vectors' mean ones, `(*stack, rank)`."""
    values = parts[VALUES]
    *stack, rank = values.shape
    a = parts["lora_a"].reshape(*stack, -1, rank).mean(-2)
    b = parts["lora_b"].reshape(*stack, rank, -1).mean(-1)
    return values + a + b


def _parts(tree: PyTree, target_rank: int = 0, call: str = _CALL) -> _Parts:
    """Return A, Λ and B of every node that has them; refuse a tree that has none."""
    found: _Parts = {}
    for path, node in leaves_with_paths(tree, is_adapted):
        if isinstance(node, LoraArray) and node.form == FORM.name:
            found[path] = {name: node.parts[name] for name in FORM.parts}
    if not found:
        raise ValueError(
            f"`{call}`: no weight has singular values that could be zero. Attach with "
            '`LoraSpec(form="adalora")`.'
        )
    for path, parts in found.items():
        if target_rank > parts[VALUES].shape[-1]:
            raise ValueError(
                f'`{call}`: the target rank {target_rank} is above the rank of "{path}", '
                f"{parts[VALUES].shape[-1]}, which it can only fall from. Attach with more."
            )
    return found


def _with_values(tree: PyTree, values: dict[str, Array]) -> PyTree:
    def put(path: str, node: Any) -> Any:
        return node.with_parts({VALUES: values[path]}) if path in values else node

    return map_with_paths(put, tree, is_adapted)


def orthogonality(params: PyTree) -> Float[Array, ""]:
    """Return how far A and B are from orthonormal: `mean over all A and B of ‖XᵀX - I‖_F`.

    Added to the loss, times 0.5 in PEFT (`orth_reg_weight`), it keeps the singular values of
    AdaLoRA what their name says, so that a small one matters little.

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
        b = turned(parts["lora_b"].reshape(*stack, rank, -1))
        eye = jnp.eye(rank, dtype=a.dtype).reshape(*(1,) * len(stack), rank, rank)
        distances += [jnp.linalg.norm(gram(x) - eye, axis=(-2, -1)).reshape(-1) for x in (a, b)]
    return jnp.concatenate(distances).mean()
