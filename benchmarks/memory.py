"""How much memory does LoRA save? The paper's promise by abstract evaluation, and one real process.

    python benchmarks/memory.py [--json FILE]

1. GPT-3 175B and Llama-3 8B and 70B with LoRA rank 4 on q and v, two bytes for every number as in
   the paper (arXiv:2106.09685, section 4.2). attach, partition and the optimizer's init run on
   shapes under `jax.eval_shape`, so no weight is ever in memory. Activations are not counted.
2. SmolLM2-135M trains for a few steps, fully and with rank 8 on all seven projections, each in its
   own process, and the operating system reports the peak memory of the process.
"""

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measure import surroundings, write_json

import jlora

sys.path.append(str(Path(__file__).parents[1] / "examples"))

RANK, STEPS = 4, 3
PAPER = "the paper: 1.2 TB -> 350 GB to train, 350 GB -> 35 MB a checkpoint (10,000x)"
COMMENT = """\
  350 GB is the float16 weights alone. Weights and Adam's two moments are 6 bytes a parameter,
  {six:.0f} GB, and LoRA drops two thirds of these, as the paper says; with the gradients of all
  parameters at once it is 8 bytes, {eight:.0f} GB ({tib:.2f} TiB). The paper's 1.2 TB lies between
  and does not say what it counts; activations, in neither figure here, may be part of it.
  35 MB is {mib:.1f} MiB, {count:,} numbers of 2 bytes."""


def gpt3() -> dict[str, Any]:
    """Shapes of GPT-3 175B, its layers stacked: 96 of width 12288, MLP 4 x as wide."""
    layers, d, vocab, context = 96, 12288, 50257, 2048
    dense = {"query": (d, d), "key": (d, d), "value": (d, d), "out": (d, d)}
    dense |= {"up": (d, 4 * d), "down": (4 * d, d)}
    stack = {name: {"kernel": (layers, *s), "bias": (layers, s[1])} for name, s in dense.items()}
    stack |= {name: {"scale": (layers, d), "bias": (layers, d)} for name in ("norm_1", "norm_2")}
    norm = {"scale": (d,), "bias": (d,)}
    return {"embed": (vocab, d), "position": (context, d), "layers": stack, "norm": norm}


def llama3(layers: int, d: int, mlp: int, heads: int) -> dict[str, Any]:
    """Shapes of a Llama 3: heads of 128, 8 of them for keys and values, an untied head."""
    vocab, q, kv = 128256, heads * 128, 8 * 128
    dense = {"query": (d, q), "key": (d, kv), "value": (d, kv), "out": (q, d)}
    dense |= {"gate": (d, mlp), "up": (d, mlp), "down": (mlp, d)}
    stack = {name: {"kernel": (layers, *s)} for name, s in dense.items()}
    stack |= {name: {"scale": (layers, d)} for name in ("norm_1", "norm_2")}
    return {"embed": (vocab, d), "layers": stack, "norm": {"scale": (d,)}, "head": (d, vocab)}


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "GPT-3 175B": gpt3,
    "Llama-3 8B": lambda: llama3(32, 4096, 14336, 32),
    "Llama-3 70B": lambda: llama3(80, 8192, 28672, 64),
}


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size(count: int) -> str:
    return f"{count / 1e9:9.1f} GB" if count >= 1e9 else f"{count / 1e6:9.1f} MB"


def account(shapes: dict[str, Any]) -> dict[str, Any]:
    """Bytes of full fine-tuning and of LoRA, from running jlora and optax on shapes."""
    base = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float16), shapes, is_leaf=lambda s: type(s) is tuple
    )
    spec = jlora.LoraSpec(RANK, layout="io", dtype=jnp.float16)
    rules = {r"layers/(query|value)/kernel": spec}
    params = jax.eval_shape(lambda p: jlora.attach(p, rules, key=jax.random.key(0)), base)
    trainable, _ = jlora.partition(params)
    weights, adapter = (nbytes(tree) for tree in jlora.detach(params))
    adam = optax.adam(1e-4)

    def row(trained: Any, state: Any, adapter: int, checkpoint: int) -> dict[str, int]:
        row = {"weights": weights, "adapter": adapter, "gradients": nbytes(trained)}
        row["adam"] = nbytes(state)
        return {**row, "total": sum(row.values()), "checkpoint": checkpoint}

    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(base)),
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        "full": row(base, jax.eval_shape(adam.init, base), 0, weights),
        "lora": row(trainable, jax.eval_shape(jlora.freeze(adam).init, params), adapter, adapter),
    }


def show(name: str, found: dict[str, Any]) -> None:
    full, lora = found["full"], found["lora"]
    print(
        f"\n{name}: {found['parameters']:,} parameters, 2 bytes each; "
        f"rank {RANK} on q and v: {found['trainable']:,}"
    )
    for part in full:
        print(f"  {part:10} {size(full[part])} -> {size(lora[part])}")
    fewer = full["checkpoint"] / lora["checkpoint"]
    print(f"  total / {full['total'] / lora['total']:.2f}, checkpoint / {fewer:,.0f}")
    if name.startswith("GPT-3"):
        six, eight = (full["total"] - full["gradients"]) / 1e9, full["total"] / 1e9
        tib, mib = full["total"] / 2**40, lora["checkpoint"] / 2**20
        print(f"  {PAPER}")
        print(COMMENT.format(six=six, eight=eight, tib=tib, mib=mib, count=found["trainable"]))


# ------------------------------------------------------------------------------- a real process


def train(kind: str, model: str | None) -> dict[str, float]:
    """Train a few steps of the examples' job, and return the peak memory after each phase."""
    import training
    from begin import prepare
    from evaluation import make_apply
    from flags import parse

    peaks = {}

    def note(phase: str) -> None:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks[phase] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    flags = ["--steps", str(STEPS), *(["--model", model] if model else [])]
    job = prepare(parse(flags))
    config, batches, params = job.config, job.batches, job.params
    trainable, frozen = jlora.partition(params)
    if kind == "full":  # all plain weights train
        trainable, frozen = jlora.detach(params)[0], jax.tree.map(lambda _: None, params)
    del job, params
    note("loaded")
    tx = training.make_optimizer(1e-4, STEPS)
    state = tx.init(trainable)
    loss = training.make_loss(jlora.lora(make_apply(config)))
    step = training.make_step(loss, tx).lower(trainable, state, frozen, batches[0]).compile()
    note("compiled")
    for batch in batches:
        trainable, state, value = jax.block_until_ready(step(trainable, state, frozen, batch))
    note("trained")
    return {**peaks, "loss": float(value), "temp": step.memory_analysis().temp_size_in_bytes}


def peak_rss(kind: str, model: str | None = None) -> dict[str, float]:
    """Run `train` in a fresh process: a peak never falls, so each kind needs its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, kind, model).result()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    around = surroundings()
    accounts = {name: account(make()) for name, make in MODELS.items()}
    for name, found in accounts.items():
        show(name, found)
    measured = {kind: peak_rss(kind) for kind in ("full", "lora")}
    print(f"\nSmolLM2-135M, float32, {STEPS} real steps of examples/finetune.py; {around}")
    for kind, row in measured.items():
        print(
            f"  {kind:5} peak RSS {row['trained'] / 1e9:5.2f} GB  (when loaded "
            f"{row['loaded'] / 1e9:5.2f}, compiled {row['compiled'] / 1e9:5.2f}; "
            f"the step's temporary memory {row['temp'] / 1e9:5.2f})"
        )
    if args.json:
        write_json(args.json, {**around, "accounts": accounts, "peak_rss": measured})


if __name__ == "__main__":
    main()
