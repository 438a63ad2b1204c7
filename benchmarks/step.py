"""How close is a training step to its limit, the frozen forward and the gradient of its input?

    python benchmarks/step.py [--preset smollm2] [--rounds 15] [--json FILE]

Decoder blocks of a preset's shapes (six of SmolLM2-135M's with 4 x 128 tokens in float32, or one
layer of Llama-3 8B with 1 x 2048 in bfloat16), every projection adapted. Every variant computes a
loss and its gradient with respect to what it trains and to the input (in a model there are layers
below). The variants take turns in every round, and a ratio is the median over the rounds of a
variant's time over its limit's. Expected on a CPU: `jlora` near 1.1, `naive` and `qwix` near 1.6.

`limit` trains nothing and `full` everything; `lora_fa` is `jlora` with A frozen, which keeps fewer
inputs; `naive` is x W + (x A) B s by autodiff; `merged` builds W + s A B in each step; `qwix`,
`quax` and `peft` are in benchmarks/peers.py. `peft` is measured against PyTorch's own limit, and
its temporary memory includes the gradients.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import peers
from blocks import PRESETS, Sizes, attached, loss, product, weights
from measure import ratio, surroundings, take_turns, write_json
from peers import Variant, compiled

import jlora


def naive_product(x: jax.Array, node: Any) -> jax.Array:
    a, b = (leaf.astype(x.dtype) for leaf in (node.lora_a, node.lora_b))
    return product(x, node.base) + product(product(x, a), b) * node.scaling.astype(x.dtype)


def own_variants(sizes: Sizes, params: Any, x: jax.Array) -> dict[str, Variant]:
    """The variants that need no other library."""
    base, _ = jlora.detach(params)
    plain = functools.partial(loss, head_dim=sizes.head_dim)
    naive = functools.partial(plain, mul=naive_product)

    def factors(trainable: Any) -> peers.Blocks:
        return [{n: (node.lora_a, node.lora_b) for n, node in b.items()} for b in trainable]

    def of(fn: Callable[..., jax.Array], params: Any = params) -> Variant:
        def value(t: Any, x: jax.Array, frozen: Any) -> jax.Array:
            return fn(jlora.combine(t, frozen), x)

        trainable, frozen = jlora.partition(params)
        return compiled(value, (0, 1), trainable, x, frozen, factors=factors)

    def without_a(node: Any) -> Any:
        return dataclasses.replace(node, form="lora_fa")

    is_node = lambda x: isinstance(x, jlora.LoraArray)
    b_alone = jax.tree.map(without_a, params, is_leaf=is_node)

    return {
        "limit": compiled(plain, (1,), base, x),
        "jlora": of(jlora.lora(plain, fallback="error")),
        "lora_fa": of(jlora.lora(plain, fallback="error"), b_alone),
        "naive": of(naive),
        "merged": of(lambda p, x: plain(jlora.merge(p), x)),
        "full": compiled(plain, (0, 1), base, x),
    }


def variants(sizes: Sizes, with_peers: bool = True) -> dict[str, Variant]:
    """All variants over the same weights; a library that is not installed is left out."""
    base, x = weights(sizes)
    params = attached(sizes, base)
    found = own_variants(sizes, params, x)
    for make in (peers.with_qwix, peers.with_quax, peers.with_peft) if with_peers else ():
        try:
            found |= make(sizes, params, x)
        except ModuleNotFoundError as error:
            print(f"left out: {make.__name__.removeprefix('with_')} ({error})")
    return found


def measure(found: dict[str, Variant], rounds: int) -> dict[str, dict[str, Any]]:
    """Run the variants in turn; one row for each."""
    seconds = take_turns({name: variant.run for name, variant in found.items()}, rounds)
    return {
        name: {
            "ratio": ratio(seconds[name], seconds[variant.limit]),
            "limit": variant.limit,
            "seconds": median(seconds[name]),
            "temp_bytes": variant.temp_bytes,
            "flops": variant.flops,
            "loss": float(variant.run()),
        }
        for name, variant in found.items()
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        print(
            f"{name:10} {row['ratio']:5.2f} x {row['limit']:10} {row['seconds']:7.3f} s  "
            f"temp {row['temp_bytes'] / 1e6:6.0f} MB  {row['flops'] / 1e9:7.1f} GFLOP  "
            f"loss {row['loss']:.5f}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    sizes, around = PRESETS[args.preset], surroundings()
    rows = measure(variants(sizes), args.rounds)
    print(f"{args.preset}, {args.rounds} rounds, {around}")
    show(rows)
    if args.json:
        result = {**around, "preset": args.preset, "sizes": sizes._asdict(), "rounds": args.rounds}
        write_json(args.json, {**result, "variants": rows})


if __name__ == "__main__":
    main()
