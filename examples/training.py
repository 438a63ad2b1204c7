"""Training: the loss, a jitted step over the adapter, an interruptible loop, a resumable state."""

import contextlib
import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

import jlora

Batch = dict[str, np.ndarray]


class State(NamedTuple):
    """All that training changes. The step number is also the position in the data."""

    trainable: Any
    opt_state: Any
    losses: list[float]
    seconds: list[float]

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


def fit(
    step: Callable[..., tuple[Any, Any, jax.Array]],
    state: State,
    frozen: Any,
    batches: Sequence[Batch],
) -> State:
    """Train from `state` to the last batch or the first Ctrl-C; see the step of the result."""
    trainable, opt_state, losses, seconds = state
    losses, seconds = [*losses], [*seconds]
    with interruptible() as asked, tqdm(total=len(batches), desc="train", unit="step") as bar:
        bar.update(len(losses))
        for batch in batches[len(losses) :]:
            start = time.perf_counter()
            trainable, opt_state, loss = step(trainable, opt_state, frozen, batch)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - start)
            speed = int((batch["segments"] > 0).sum() / seconds[-1])
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed} tokens/s")
            bar.update()
            if asked.is_set():
                break
    return State(trainable, opt_state, losses, seconds)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Make the first Ctrl-C a request: a step that donates its inputs must run to its end."""
    asked = threading.Event()

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)  # the second Ctrl-C interrupts as usual

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def save_state(folder: Path, state: State, notes: dict[str, Any]) -> None:
    """Save under `folder` with Orbax, which renames it into place; the state before it is kept."""
    leaves = jax.tree.leaves((state.trainable, state.opt_state))
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}
    notes = {**notes, "losses": state.losses, "seconds": state.seconds}
    notes["sha256"] = checksum(notes, arrays)  # Orbax has none
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
        for step in manager.all_steps():
            if step >= state.step:  # damaged: training has begun from one before it
                manager.delete(step)
        arguments = {"arrays": ocp.args.StandardSave(arrays), "notes": ocp.args.JsonSave(notes)}
        manager.save(state.step, args=ocp.args.Composite(**arguments))


def checksum(notes: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """The SHA-256 of the notes and the arrays of a state."""
    content = {name: value for name, value in notes.items() if name != "sha256"}
    code = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        code.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return code.hexdigest()


def load_notes(folder: Path) -> dict[str, Any] | None:
    """The notes of the last state that has readable ones, or None if nothing was saved.

    Raises ValueError if none of the states has.
    """
    steps = saved_steps(folder)
    for step in steps:
        with contextlib.suppress(Exception):
            return read_notes(folder / str(step))
    if steps:
        raise ValueError(
            f"`--resume`: no state in {folder} can be read: their notes are damaged. Start again "
            "without --resume."
        )
    return None


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes of one state; raises if they are not notes."""
    notes = json.loads((folder / "notes" / "metadata").read_text(encoding="utf-8"))
    if not isinstance(notes, dict) or not isinstance(notes.get("settings"), dict):
        raise ValueError("its notes are not those of a state")
    return notes


def load_state(folder: Path, like: State) -> tuple[State, dict[str, Any]] | None:
    """The last intact state that `save_state` wrote, in the structure of `like`, and its notes.

    None if nothing was saved. Says so if it passes over a damaged state; raises ValueError if all
    of them are.
    """
    leaves, treedef = jax.tree.flatten((like.trainable, like.opt_state))
    shapes = {str(i): jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(leaves)}
    damaged = {}
    for step in saved_steps(folder):
        try:
            arrays, notes = read_state(folder / str(step), shapes)
        except Exception as error:  # Orbax and tensorstore raise many types for damaged files
            damaged[step] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        for other, why in damaged.items():
            print(f"the state of step {other} is damaged ({why}); using that of step {step}")
        trainable, opt_state = jax.tree.unflatten(treedef, [jnp.asarray(x) for x in arrays])
        return State(trainable, opt_state, notes["losses"], notes["seconds"]), notes
    if damaged:
        step, why = next(iter(damaged.items()))
        raise ValueError(
            f"`--resume`: no state in {folder} can be read; that of step {step} is damaged: {why}. "
            "Start again without --resume."
        )
    return None


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a folder, the last one first; folders with other names are not states."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name)), reverse=True)


def read_state(folder: Path, shapes: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The arrays and notes of one state, verified."""
    notes = read_notes(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        arrays = checkpointer.restore(folder.resolve() / "arrays", target)
    code = checksum(notes, arrays)
    # States written before there were checksums have none.
    if notes.get("sha256", code) != code or len(notes["losses"]) != int(folder.name):
        raise ValueError("its checksum differs")
    return [arrays[name] for name in shapes], notes
