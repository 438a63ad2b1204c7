"""What does a quantized base cost in a training step, and for one token?

    python benchmarks/quant.py [--preset smollm2] [--rounds 9] [--json FILE]

Decoder blocks of a preset's shapes, every projection adapted and every block under remat, over
float32 weights and over the same weights in each format. `step` is the loss and the gradients of A,
B and the input, with 1 x 128 and 1 x 512 tokens; `token` is the forward pass of one token, without
remat. qwix, and PEFT with bitsandbytes, take part if they are installed, both without remat. The
variants take turns in every round, and a ratio is the median over the rounds of a variant's time
over that of float32.

Temporary memory is what XLA allocates besides arguments and results; PyTorch's is not measured.
Expected: int8 at most 1.05, 4 bits at most 1.15 at 512 tokens and 1.3 at 128, since building a
weight takes a fixed time.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
from blocks import PRESETS, Sizes, attached, loss, weights
from measure import ratio, surroundings, take_turns, write_json
from quant_peers import PEERS

import jlora
from jlora import quant

FORMATS: dict[str, Any] = {
    "float32": None,
    "int8": quant.Int8(),
    "nf4": quant.NF4(),
    "q4_1": quant.Q4_1,
    "q8_0": quant.Q8_0,
}
TOKENS = (128, 512)


def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Compile; return a run, and the bytes of its temporary memory."""
    made = jax.jit(fn).lower(*args).compile()
    run = lambda: jax.block_until_ready(made(*args))
    return run, made.memory_analysis().temp_size_in_bytes


def cases(sizes: Sizes, tokens: int, grad: bool) -> dict[str, tuple[Any, int, int]]:
    """The variants: a run, its temporary memory, and the bytes of the base."""
    base, x = weights(sizes._replace(batch=1, time=tokens))
    plain = functools.partial(loss, head_dim=sizes.head_dim, remat=grad)
    found = {}
    for name, format in FORMATS.items():
        stored = base if format is None else jlora.quantize(base, {".*": format})
        trainable, frozen = jlora.partition(attached(sizes, stored))

        def value(t: Any, x: jax.Array, f: Any) -> jax.Array:
            return jlora.lora(plain)(jlora.combine(t, f), x)

        fn = jax.value_and_grad(value, (0, 1)) if grad else value
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
        found[name] = (*compiled(fn, trainable, x, frozen), held)
    for library, build in PEERS.items():
        try:
            found |= build(sizes._replace(batch=1, time=tokens), x, grad)
        except ImportError:
            print(f"{library} is not installed")
    return found


def measure(found: dict[str, tuple[Any, int, int]], rounds: int) -> dict[str, dict[str, float]]:
    seconds = take_turns({name: run for name, (run, _, _) in found.items()}, rounds)
    return {
        name: {
            "ratio": ratio(seconds[name], seconds["float32"]),
            "seconds": median(seconds[name]),
            "temp_bytes": temp,
            "base_bytes": held,
        }
        for name, (_, temp, held) in found.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smollm2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    sizes, around, result = PRESETS[args.preset], surroundings(), {}
    for what, tokens, grad in [
        *((f"step, {n} tokens", n, True) for n in TOKENS),
        ("token", 1, False),
    ]:
        result[what] = measure(cases(sizes, tokens, grad), args.rounds)
        print(what)
        for name, row in result[what].items():
            print(
                f"  {name:20} {row['ratio']:5.2f} x float32  {1e3 * row['seconds']:8.1f} ms  "
                f"temp {row['temp_bytes'] / 1e6:6.1f} MB  base {row['base_bytes'] / 1e6:6.1f} MB"
            )
    print(around)
    if args.json:
        write_json(args.json, {**around, "sizes": sizes._asdict(), "cases": result})


if __name__ == "__main__":
    main()
