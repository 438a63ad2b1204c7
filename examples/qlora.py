"""QLoRA: train an adapter over 4-bit weights, and merge it; the memory at each step.

    python examples/qlora.py                          # SmolLM2-135M, from its GGUF file
    python examples/qlora.py --layers 2 --steps 4     # to try the path

Projections are stored as NF4 with quantized scales, 4.13 bits a weight, the embedding as int8, each
as it is read, so the base never exists in float32. `finetune.py --quantize` has more ways.
"""

import argparse
import resource
from collections.abc import Sequence
from typing import Any

import data
import jax
import weights
from evaluation import make_apply
from formats import storing
from training import make_loss, make_optimizer, make_step

import jlora

FORMATS = {r".*_proj/kernel": "nf4", r".*embedding": "int8"}


def report(what: str, params: Any) -> None:
    """Print the size of the parameters and the largest memory of the process so far, on Linux."""
    size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{what:28}{size:8.1f} MB of parameters, {peak:6.0f} MB peak of the process")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model"), parser.add_argument("--data", nargs="+")
    parser.add_argument("--layers", type=int), parser.add_argument("--steps", type=int, default=60)
    args, store = parser.parse_args(argv), storing(FORMATS, "qlora.py")
    config, base, tokenizer, stop = weights.load(args.model, args.layers, store=store)
    report("read, quantized", base)
    rules = {r".*_proj/kernel": jlora.LoraSpec(rank=8, alpha=16)}
    params = jlora.attach(base, rules, key=jax.random.key(0))
    report("with an adapter", params)
    dataset = data.load(args.data, tokenizer, stop, config.context)
    trainable, frozen = jlora.partition(params)
    tx = make_optimizer(2e-3, args.steps)
    step, state = make_step(make_loss(jlora.lora(make_apply(config))), tx), tx.init(trainable)
    for n, batch in enumerate(data.training_batches(dataset, args.steps, 4)):
        trainable, state, loss = step(trainable, state, frozen, batch)
        if n % 10 == 0 or n == args.steps - 1:
            print(f"step {n}: loss {float(loss):.3f}")
    report("trained", params := jlora.combine(trainable, frozen))
    print(jlora.summary(params))
    report("merged, float32", jlora.merge(params))


if __name__ == "__main__":
    main()
