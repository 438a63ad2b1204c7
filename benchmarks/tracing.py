"""What does the transform cost before anything runs? Tracing and lowering, against the base model.

    python benchmarks/tracing.py [--rounds 5] [--json FILE]

Two decoders of 30 unrolled layers, every matrix adapted: the examples' Llama in Flax, and those
of benchmarks/blocks.py in plain JAX, which trace faster and so show more of the walk. For each,
the forward pass and a training gradient: with respect to all weights for the base, to A and B for
jlora. Nothing is compiled or run. Base and adapted are interleaved, and a ratio is the median over
the rounds. The function is traced once more for jlora, so 1 is out of reach. On 2 cores, JAX
0.10.2: flax forward 1.30, flax gradient 1.31, plain forward 1.80, plain gradient 1.64.
"""

import argparse
import functools
import gc
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
import blocks
import llama
from measure import surroundings, write_json

LAYERS = 30


def flax_decoder():
    sizes = {"vocab": 512, "width": 64, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 16}
    model = llama.Llama(llama.Config(**sizes, layers=LAYERS, context=64))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), tokens), tokens


def plain_decoder():
    sizes = blocks.PRESETS["smollm2"]._replace(blocks=LAYERS)
    base, x = jax.eval_shape(functools.partial(blocks.weights, sizes))
    return functools.partial(blocks.loss, head_dim=sizes.head_dim), base, x


def programs(fn, base, x):
    """Return, per question, the base's program and the adapted one, each with its parameters."""

    def attach(base):
        rules = {r".*(kernel|embedding)|\d+/\w+": jlora.LoraSpec(rank=4)}
        return jlora.attach(base, rules, key=jax.random.key(1))

    params, adapted = jax.eval_shape(attach, base), jlora.lora(fn, fallback="error")

    def gradient(params, x):
        return jax.grad(lambda p: fn(p, x).sum())(params)

    def adapter_gradient(params, x):
        trainable, frozen = jlora.partition(params)
        return jax.grad(lambda t: adapted(jlora.combine(t, frozen), x).sum())(trainable)

    return {
        "forward": ((fn, base), (adapted, params)),
        "gradient": ((gradient, base), (adapter_gradient, params)),
    }


def seconds(fn, params, x):
    jax.clear_caches()
    gc.collect()
    gc.disable()  # as timeit does: a collection in one of the two would dominate the difference
    start = time.perf_counter()
    jax.jit(lambda params, x: fn(params, x)).lower(params, x)
    spent = time.perf_counter() - start
    gc.enable()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for decoder, make in (("flax", flax_decoder), ("plain", plain_decoder)):
        fn, base, x = make()
        for question, (plain, adapted) in programs(fn, base, x).items():
            pairs = [(seconds(*plain, x), seconds(*adapted, x)) for _ in range(args.rounds + 1)][
                1:
            ]  # the first round warms up
            rows[f"{decoder} {question}"] = {
                "ratio": statistics.median(mine / its for its, mine in pairs),
                "base_seconds": statistics.median(its for its, _ in pairs),
                "jlora_seconds": statistics.median(mine for _, mine in pairs),
            }
    print(f"jax {jax.__version__}, {LAYERS} layers, {args.rounds} rounds")
    for name, row in rows.items():
        print(
            f"{name:15} {row['ratio']:5.2f} x base   "
            f"{row['base_seconds']:6.2f} s -> {row['jlora_seconds']:6.2f} s"
        )
    if args.json:
        write_json(args.json, {**surroundings(), "rounds": args.rounds, "programs": rows})


if __name__ == "__main__":
    main()
