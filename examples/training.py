"""Training: the loss, a jitted step over the adapter, and the state that steps change."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from llama import cross_entropy
from tqdm import tqdm

import jlora

Batch = dict[str, np.ndarray]


class State(NamedTuple):
    """All that training changes.

    `evals` are the evaluations so far, {"step", "loss", ...}; `best` is the adapter of the one with
    the lowest held-out loss, if it is kept. `tokens` are those of each step, without padding.
    `position` is where streamed data continue; other data need no more than the step's number.
    """

    trainable: Any
    opt_state: Any
    losses: Sequence[float]
    seconds: Sequence[float]
    evals: tuple[dict[str, Any], ...] = ()
    best: Any = None
    tokens: Sequence[int] = ()
    position: Any = None

    @property
    def step(self) -> int:
        return len(self.losses)


def make_loss(
    apply: Callable[..., jax.Array], chunked: bool = False
) -> Callable[[Any, Batch], jax.Array]:
    """The mean cross-entropy over the targets of a packed batch; only their logits are computed.

    `chunked`: the model computes the losses itself, a part of the vocabulary at a time.
    """

    def loss(params: Any, batch: Batch) -> jax.Array:
        tokens, positions, segments = batch["tokens"], batch["positions"], batch["segments"]
        inputs = (tokens, positions, segments, None, batch["at"])
        if chunked:
            each = apply(params, *inputs, batch["target"])  # (N,)
        else:
            each = cross_entropy(apply(params, *inputs), batch["target"])  # (N,), from (N, V)
        return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])

    return loss


def make_schedule(lr: float, steps: int) -> optax.Schedule:
    """Linear warm-up over the first tenth (at least one step), then cosine decay to 2 %."""
    warm = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, lr, warm, max(steps, warm + 1), lr * 0.02)


def make_optimizer(
    lr: float, steps: int, lora_plus: float | None = None
) -> optax.GradientTransformation:
    """AdamW with `make_schedule`'s learning rate and gradient clipping.

    `lora_plus` is how many times higher the learning rate of B is.
    """
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(make_schedule(lr, steps)))
    return tx if lora_plus is None else optax.chain(tx, jlora.optim.lora_plus(lora_plus))


def make_step(
    loss: Callable[[Any, Batch], jax.Array], tx: optax.GradientTransformation, accumulate: int = 1
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """(trainable, opt_state, frozen, batch) -> (trainable, opt_state, loss), jitted and donating.

    Only the adapter is differentiated: frozen weights have no gradient and no optimizer state. With
    `accumulate`, the arrays of the batch have a leading axis of as many parts; the gradient is that
    of the mean over the targets of all parts, as if they were one batch.
    """

    def gradient(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Any]:
        def of(part: Any) -> jax.Array:
            return loss(jlora.combine(part, frozen), batch)

        return jax.value_and_grad(of)(trainable)

    def accumulated(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Any]:
        share = batch["weight"].sum(axis=1) / batch["weight"].sum()  # of the targets, (parts,)

        def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            found = gradient(trainable, frozen, part[1])
            return jax.tree.map(lambda a, b: a + part[0] * b, total, found), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trainable))
        return jax.lax.scan(add, zero, (share, batch))[0]

    def step(
        trainable: Any, opt_state: Any, frozen: Any, batch: Batch
    ) -> tuple[Any, Any, jax.Array]:
        compute = gradient if accumulate == 1 else accumulated
        value, grads = compute(trainable, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def advance(
    step: Callable[..., tuple[Any, Any, jax.Array]],
    state: State,
    frozen: Any,
    batch: Batch,
    position: Any = None,
) -> State:
    """Take one step. It donates the arrays of `state`, so only the new state can be used.

    `position` is that of the batch after this one.
    """
    start = time.perf_counter()
    trainable, opt_state, value = step(state.trainable, state.opt_state, frozen, batch)
    loss = float(value)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of step {state.step + 1} is {loss}. Lower the learning rate."
        )
    losses = [*state.losses, loss]
    seconds = [*state.seconds, time.perf_counter() - start]
    tokens = [*state.tokens, int((batch["segments"] > 0).sum())]
    state = state._replace(tokens=tokens, position=position)
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
    for n in tqdm(range(state.step, len(batches)), desc="train", unit="step"):
        state = advance(step, state, frozen, batches[n])
    return state
