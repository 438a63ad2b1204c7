"""How many weights does a quantized model build at once on a TPU, or on a GPU?

    PYTHONPATH=compilers python benchmarks/quant_tpu.py [--topology v5e:2x2 | h100] [--json FILE]

A training step of layers of two weights is compiled ahead of time for a machine that need not be
there: the compilers are in the packages that `aot.py` needs. The weights are as large as those of
Llama-3 8B, for smaller ones are built in the memory of the TPU's core, which is not counted. A is
memory that XLA allocates besides arguments and results, in the step over the stored weights and in
the same step over bfloat16 ones; B is their difference over the bytes of one layer's weights in
bfloat16. Expected: at most 1, scanned and unrolled. The exit status is 1 if it is more.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aot  # first: it tells JAX about compilers without devices
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measure import surroundings, write_json

import jlora
from jlora import quant

FORMATS: dict[str, Any] = {
    **{"int8": quant.Int8(), "int4": quant.Int4(), "nf4": quant.NF4()},
    **{"q4_1": quant.Q4_1, "q8_0": quant.Q8_0},
}
LAYERS, WIDTH, HIDDEN, TOKENS = 4, 4096, 14336, 2048
SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
LAYER = 2 * 2 * WIDTH * HIDDEN  # bytes in bfloat16


def layer(x: jax.Array, p: Any) -> jax.Array:
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(jax.checkpoint(lambda x, p: (layer(x, p), None)), x, p)[0]


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for one in p:
        x = jax.checkpoint(layer)(x, one)
    return x


def stored(format: Any, stack: tuple[int, ...], shape: tuple[int, int]) -> Any:
    """One weight, or a stack of them, in a format; None for bfloat16."""
    if format is None:
        return jnp.zeros((*stack, *shape), jnp.bfloat16)
    if not isinstance(format, quant.Ggml):
        w = jnp.zeros((*stack, *shape), jnp.bfloat16)
        return jlora.quantize({"w": w}, {"w": format}, layouts={"w": "io"})["w"]
    inputs, out = shape  # those are packed on the host, so not under `jax.eval_shape`
    blocks = inputs // format.block
    parts = {x: jnp.zeros((*stack, out, blocks * n), kind) for x, kind, n in format.fields}
    return quant.QuantArray(parts, format, "io", shape, "bfloat16")


def weights(fn: Callable[..., Any], format: Any) -> Any:
    """The adapted parameters as shapes."""

    def make() -> Any:
        stack = (LAYERS,) if fn is scanned else ()
        one = {name: stored(format, stack, shape) for name, shape in SHAPES.items()}
        params = one if fn is scanned else [one] * LAYERS
        rules = {".*": jlora.LoraSpec(8, layout="io")}
        return jlora.attach(params, rules, key=jax.random.key(0))

    return jax.eval_shape(make)


def temporary(fn: Callable[..., Any], format: Any, at: NamedSharding) -> int:
    """The temporary memory of a training step."""

    def step(trainable: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(t: Any) -> jax.Array:
            y = jlora.lora(fn)(jlora.combine(t, frozen), x)
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        return jax.value_and_grad(loss)(trainable)

    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    args = (*jlora.partition(weights(fn, format)), x)
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), args)
    return jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    on_gpu = args.topology == "h100"
    devices = aot.devices("cuda", "1x1x1") if on_gpu else aot.devices("tpu", args.topology)
    at = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    found: dict[str, Any] = {}
    for fn in (scanned, unrolled):
        dense = temporary(fn, None, at)
        print(f"{fn.__name__:9} bfloat16 {dense / 1e6:7.1f} MB", flush=True)
        for name, format in FORMATS.items():
            temp = temporary(fn, format, at)
            layers = (temp - dense) / LAYER
            found[f"{fn.__name__}, {name}"] = {"temp_bytes": temp, "layers": layers}
            print(
                f"{fn.__name__:9} {name:8} {temp / 1e6:7.1f} MB, {layers:5.2f} layers", flush=True
            )
    if args.json:
        write_json(args.json, {**surroundings(), "topology": args.topology, "cases": found})
    return int(max(case["layers"] for case in found.values()) > 1)


if __name__ == "__main__":
    raise SystemExit(main())
