"""Sweep the learning rate: one adapter per rate, all trained in one program over one base.

    python examples/sweep.py                              # seven rates, SmolLM2's first 4 layers
    python examples/sweep.py --rates 1e-3 4e-3 --steps 20
    python examples/finetune.py --sweep lr=1e-3,2e-3      # the same of the main job

The first two are `finetune.py --smoke`. A bank holds the adapters; `jlora.bank.per_slot` gives each
its own optimizer, which injects the rate, so every slot trains as it would in a run of its own. The
output directory gets sweep.png, sweep.json and the best adapter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import training
import weights
from begin import remove_run
from evaluation import Job, make_apply
from flags import above_zero, positive
from matplotlib.figure import Figure
from tqdm import tqdm

import jlora
from jlora import checkpoint

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def train(
    job: Job, rates: Sequence[float], lora_plus: float | None = None
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Train one adapter per rate.

    Returns the losses, (steps, K), the held-out losses, (K,), and the bank.
    """
    base, adapter = jlora.detach(job.params)
    bank = jlora.bank.stack([adapter] * len(rates))
    loss = training.make_loss(make_apply(job.config), chunked=job.config.chunk > 0)
    slots = jnp.arange(len(rates))
    rate = optax.inject_hyperparams(optax.scale)(step_size=1.0)
    tx = training.make_optimizer(1.0, len(job.batches), lora_plus)
    tx = jlora.bank.per_slot(optax.chain(tx, rate))
    state = tx.init(bank)
    state = (*state[:-1], state[-1]._replace(hyperparams={"step_size": jnp.asarray(rates)}))

    @jax.jit
    def losses_of(bank: Any, base: Any, batch: training.Batch) -> jax.Array:
        return jlora.bank.each(loss, base, bank, slots, batch, in_axes=None)  # (K,)

    @jax.jit
    def step(bank: Any, state: Any, base: Any, batch: training.Batch) -> Any:
        # The sum: the gradient of each slot is that of its own loss.
        losses, pull = jax.vjp(lambda bank: losses_of(bank, base, batch), bank)
        updates, state = tx.update(pull(jnp.ones_like(losses))[0], state, bank)
        return optax.apply_updates(bank, updates), state, losses

    history = []
    for batch in tqdm(job.batches, desc=f"train {len(rates)} adapters", unit="step"):
        bank, state, losses = step(bank, state, base, batch)
        history.append(np.asarray(losses))
    total = sum(losses_of(bank, base, b) * b["weight"].sum() for b in job.held_out)
    held_out = np.asarray(total / sum(b["weight"].sum() for b in job.held_out))
    return np.stack(history), held_out, bank


def sweep(args: argparse.Namespace, job: Job) -> int:
    """Train with every rate of --sweep, say which was best, and save its adapter."""
    if args.overwrite:
        remove_run(args.out)
    history, held_out, bank = train(job, args.sweep, args.lora_plus)
    for rate, last, loss in zip(args.sweep, history[-1], held_out, strict=True):
        print(f"learning rate {rate:8.2g}: last training loss {last:.3f}, held-out loss {loss:.3f}")
    best = int(np.nanargmin(held_out))  # a rate that diverged may give NaN
    print(f"best: --lr {args.sweep[best]:g}, held-out loss {held_out[best]:.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {"rates": [*args.sweep], "losses": history.tolist()}
    rows["held_out"] = held_out.tolist()
    rows |= {"best": args.sweep[best], "settings": report.every_flag(args)}
    rows["base_sha256"] = report.files_fingerprint(weights.path_of(args.model))
    (args.out / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(args.out / "sweep.png", args.sweep, held_out)
    base, _ = jlora.detach(job.params)
    checkpoint.save(args.out / "adapter", jlora.bind(base, jlora.bank.pick(bank, best)))
    print(f"written to {args.out / 'sweep.png'}")
    return 0


def plot(path: Path, rates: Sequence[float], held_out: np.ndarray) -> None:
    """Draw the held-out loss against the rate."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, held_out, "o-")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats per token)")
    figure.savefig(path, format="png", dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetune.py --smoke --sweep`. Returns its exit status."""
    from finetune import main as run  # which imports this file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=above_zero, nargs="+", default=RATES, help=f"{RATES}")
    parser.add_argument("--steps", type=positive, default=60, help="%(default)s")
    parser.add_argument("--model", help="as in finetune.py")
    parser.add_argument("--data", nargs="+", help="as in finetune.py")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="%(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    args = parser.parse_args(argv)
    flags = ["--smoke", "--steps", str(args.steps), "--out", str(args.out)]
    flags += ["--sweep", f"lr={','.join(map(str, args.rates))}"]
    flags += ["--model", args.model] if args.model else []
    flags += ["--data", *args.data] if args.data else []
    flags += ["--overwrite"] if args.overwrite else []
    return run(flags)


if __name__ == "__main__":
    sys.exit(main())
