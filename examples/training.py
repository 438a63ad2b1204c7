"""Training: the loss, a jitted step over the adapter, and the state that steps change."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jlora

Batch = dict[str, np.ndarray]


class State(NamedTuple):
    """All that training changes. The step number is also the position in the data.

    `evals` are the evaluations so far, {"step", "loss", ...}; `best` is the adapter of the one with
    the lowest held-out loss, if it is kept.
    """

    trainable: Any
    opt_state: Any
    losses: Sequence[float]
    seconds: Sequence[float]
    evals: tuple[dict[str, Any], ...] = ()
    best: Any = None

    @property
    def step(self) -> int:
        return len(self.losses)


def make_loss(apply: Callable[..., jax.Array]) -> Callable[[Any, Batch], jax.Array]:
    """The mean cross-entropy over the targets of a packed batch; only their logits are computed."""

    def loss(params: Any, batch: Batch) -> jax.Array:
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        logits = apply(params, tokens, positions, segments, None, batch["at"])  # (N, V)
        each = cross_entropy(logits, batch["target"])  # (N,)
        return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])

    return loss


@jax.custom_vjp
def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of each row: (N, V) and (N,) -> (N,).

    With a large vocabulary, the logits are by far the largest array of a step. JAX's autodiff would
    also keep their exponentials. Here the gradient is one expression of the logits, the target and
    the row's normalizer, and XLA writes it in place of the logits.
    """
    return _cross_entropy(logits, target)[0]


def _cross_entropy(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, Any]:
    total = jax.nn.logsumexp(logits, axis=1)  # (N,)
    picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]  # (N,)
    return total - picked, (logits, target, total)


def _cross_entropy_gradient(kept: Any, g: jax.Array) -> tuple[jax.Array, None]:
    logits, target, total = kept
    prob = jnp.exp(logits - total[:, None])  # (N, V), fused away
    vocab = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]  # (1, V)
    return jnp.where(vocab == target[:, None], prob - 1.0, prob) * g[:, None], None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def make_schedule(lr: float, steps: int) -> optax.Schedule:
    """Linear warm-up over the first tenth (at least one step), then cosine decay to 2 %."""
    warm = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, lr, warm, max(steps, warm + 1), lr * 0.02)


def make_optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    """AdamW with `make_schedule`'s learning rate and gradient clipping."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(make_schedule(lr, steps)))


def make_step(
    loss: Callable[[Any, Batch], jax.Array], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """(trainable, opt_state, frozen, batch) -> (trainable, opt_state, loss), jitted and donating.

    Only the adapter is differentiated: frozen weights have no gradient and no optimizer state.
    """

    def step(
        trainable: Any, opt_state: Any, frozen: Any, batch: Batch
    ) -> tuple[Any, Any, jax.Array]:
        def of(part: Any) -> jax.Array:
            return loss(jlora.combine(part, frozen), batch)

        value, grads = jax.value_and_grad(of)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def advance(
    step: Callable[..., tuple[Any, Any, jax.Array]], state: State, frozen: Any, batch: Batch
) -> State:
    """Take one step. It donates the arrays of `state`, so only the new state can be used."""
    start = time.perf_counter()
    trainable, opt_state, value = step(state.trainable, state.opt_state, frozen, batch)
    loss = float(value)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of step {state.step + 1} is {loss}. Lower the learning rate."
        )
    losses = [*state.losses, loss]
    seconds = [*state.seconds, time.perf_counter() - start]
    return state._replace(trainable=trainable, opt_state=opt_state, losses=losses, seconds=seconds)


def scored(state: State, score: dict[str, Any], keep_best: bool) -> State:
    """Add an evaluation; with `keep_best`, keep the adapter if no other has a lower loss."""
    state = state._replace(evals=(*state.evals, {"step": state.step, **score}))
    if keep_best and state.step > 0 and best(state) is state.evals[-1]:
        return state._replace(best=jax.tree.map(jnp.copy, state.trainable))  # steps donate theirs
    return state


def best(state: State) -> dict[str, Any]:
    """The first evaluation with the lowest held-out loss after training began."""
    return min(state.evals[1:], key=lambda score: score["loss"])


def stale(state: State) -> int:
    """How many evaluations there have been since the best one."""
    return len(state.evals) - 1 - state.evals.index(best(state)) if state.evals[1:] else 0


def fit(
    step: Callable[..., tuple[Any, Any, jax.Array]],
    state: State,
    frozen: Any,
    batches: Sequence[Batch],
) -> State:
    """Train from `state` to the last batch, and do nothing else meanwhile."""
    for batch in tqdm(batches[state.step :], desc="train", unit="step"):
        state = advance(step, state, frozen, batch)
    return state
