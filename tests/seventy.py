"""Merge Llama-3 70B on 16 devices, from shapes: prints the compiler's memory, in GiB, as JSON.

Run by `test_seventy.py`, in a process of its own with 16 virtual devices.
"""

import json
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec

D, HIDDEN, KV, VOCAB, LAYERS = 8192, 28672, 1024, 128256, 80
SHAPES = {"q": (D, D), "k": (D, KV), "v": (D, KV), "o": (D, D)}
SHAPES |= {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}


def mesh():
    return jax.make_mesh((16,), ("fsdp",), axis_types=(AxisType.Auto,))


def base():
    def struct(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh(), spec))

    layers = {name: struct((LAYERS, *s), P(None, "fsdp")) for name, s in SHAPES.items()}
    return {
        "embed": struct((VOCAB, D), P("fsdp")),
        "head": struct((D, VOCAB), P("fsdp")),
        "layers": layers,
    }


def attached(**how):
    rules = {"layers/.*": LoraSpec(16, layout="io", **how)}
    return jlora.attach(base(), rules, key=jax.random.key(0))


def memory(program):
    found = program.compile().memory_analysis()
    names = {"arguments": "argument", "temporary": "temp", "outputs": "output", "aliased": "alias"}
    return {k: getattr(found, f"{v}_size_in_bytes") / 2**30 for k, v in names.items()}


def merge():
    """`jlora.merge`, donated."""
    at = jax.tree.map(lambda x: x.sharding, base())
    run = jax.jit(jlora.merge, donate_argnums=0, out_shardings=at)
    found = memory(run.lower(attached()))
    weights = sum(2 * math.prod(x.shape) for x in jax.tree.leaves(base())) / 16 / 2**30
    return {**found, "base": weights}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 16)
    print(json.dumps(merge()))
