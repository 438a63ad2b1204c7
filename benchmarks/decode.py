"""What is the per-token cost of an unmerged adapter? One decoded token, against the base model.

    python benchmarks/decode.py [--rounds 40] [--json FILE]

The examples' decoder at SmolLM2-135M's sizes with random weights, every projection adapted with
rank 8, batch 1, 128 tokens in the cache. `base` runs the plain model, `jlora` the adapted one,
`merged` the plain model on merged weights: the same program as `base`, so it must cost the same.
Runs are interleaved, and a ratio is the median over the rounds. Expected: `jlora` below 1.15,
`merged` 1.0.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from measure import ratio, surroundings, take_turns, write_json

import jlora

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import llama

SMOLLM2 = llama.Config(49152, 576, 1536, 30, 9, 3, 64, 2048, rope_theta=100000.0)
CACHE, RANK = 128, 8


def programs(config: llama.Config) -> dict[str, Callable[[], Any]]:
    """For each variant, a function that runs one compiled decoding step."""
    model = llama.Llama(config)
    apply = lambda params, *args: model.apply({"params": params}, *args)
    token = jnp.ones((1, 1), jnp.int32)
    base = jax.jit(model.init)(jax.random.key(0), token)["params"]
    rules = {r".*_proj/kernel": jlora.LoraSpec(RANK)}
    params = jlora.attach(base, rules, key=jax.random.key(1))
    cache = llama.init_cache(config, 1, CACHE)
    # Full except for the slot that is written, so that a query attends to every key.
    cache["segments"] = cache["segments"] + 1
    cache["slot"] = cache["slot"] + CACHE - 1
    position = jnp.full((1, 1), CACHE - 1, jnp.int32)

    def of(apply: Callable[..., Any], params: Any) -> Callable[[], Any]:
        inputs = (params, token, position, token, cache, jnp.zeros((1,), jnp.int32))
        step = jax.jit(apply).lower(*inputs).compile()
        return lambda: jax.block_until_ready(step(*inputs))

    return {
        "base": of(apply, base),
        "jlora": of(jlora.lora(apply, fallback="error"), params),
        "merged": of(apply, jlora.merge(params)),
    }


def measure(config: llama.Config, rounds: int) -> dict[str, dict[str, float]]:
    seconds = take_turns(programs(config), rounds)
    return {
        name: {"ratio": ratio(mine, seconds["base"]), "seconds": median(mine)}
        for name, mine in seconds.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    around = surroundings()
    rows = measure(SMOLLM2, args.rounds)
    print(f"{args.rounds} rounds, {around}")
    for name, row in rows.items():
        print(f"{name:8} {row['ratio']:5.2f} x base  {row['seconds'] * 1e3:7.2f} ms a token")
    if args.json:
        write_json(args.json, {**around, "rounds": args.rounds, "variants": rows})


if __name__ == "__main__":
    main()
