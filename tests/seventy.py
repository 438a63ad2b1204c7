"""Plans for Llama-3 70B on 16 devices, from shapes: prints the compiler's memory, in GiB, as JSON.

Run by `test_seventy.py`, in a process of its own with 16 virtual devices.
"""

import dataclasses
import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, _begin, initializers
from jlora._placed import at_base

D, HIDDEN, KV, VOCAB, LAYERS = 8192, 28672, 1024, 128256, 80
SHAPES = {"q": (D, D), "k": (D, KV), "v": (D, KV), "o": (D, D)}
SHAPES |= {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}
INITIALIZERS = {
    name: getattr(initializers, name)
    for name in ("kaiming", "gaussian", "orthogonal", "uniform", "olora", "milora", "pissa")
} | {"pissa_niter": functools.partial(initializers.pissa, niter=16)}


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


def initialize(name, weight):
    """The program with which `attach` makes the parts of one weight."""
    w = base()["layers"][weight]
    spec = LoraSpec(16, layout="io", init=INITIALIZERS[name])
    key = jax.eval_shape(lambda: jax.random.key(0))
    node = _begin._begun.eval_shape(key, jax.ShapeDtypeStruct(w.shape, w.dtype), spec, "io")
    at = at_base(node, w.shape, w.sharding, (), "")
    at = dataclasses.replace(at, base=w.sharding if node.residual else None)
    places, structure = jax.tree.flatten(at)
    found = memory(_begin._begun_at(spec, "io", False, structure, *places).lower(key, w))
    return {**found, "layer": 4 * math.prod(SHAPES[weight]) / 2**30}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 16)
    plans = {"merge": merge()} if "merge" in sys.argv[1:] else {}
    for asked in sys.argv[1:]:
        if asked != "merge":
            plans[asked] = initialize(*asked.split("/"))
    print(json.dumps(plans))
