"""Plan Llama-3 70B on 16 devices from shapes: print the compiler's memory, in GiB, as JSON.

Run by `test_seventy.py`, in a process of its own with 16 virtual devices:

    python tests/seventy.py PLAN ...
"""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, Moments, initializers
from jlora.initializers import corda, eva, loftq, lora_ga

D, HIDDEN, KV, VOCAB, LAYERS, RANK = 8192, 28672, 1024, 128256, 80, 16
SHAPES = {"q": (D, D), "k": (D, KV), "v": (D, KV), "o": (D, D)}
SHAPES |= {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}
LARGEST = ("gate", "down")  # in both orders of the sides


def struct(shape, dtype, *spec):
    mesh = jax.make_mesh((16,), ("fsdp",), axis_types=(AxisType.Auto,))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def base(*names, dtype=jnp.bfloat16):
    """The layers' weights with these names; all of the model by default."""
    layers = {k: struct((LAYERS, *SHAPES[k]), dtype, None, "fsdp") for k in names or SHAPES}
    if names:
        return {"layers": layers}
    ends = {"embed": struct((VOCAB, D), dtype, "fsdp"), "head": struct((D, VOCAB), dtype, "fsdp")}
    return {**ends, "layers": layers}


def attached(weights, **how):
    rules = {"layers/.*": LoraSpec(RANK, layout="io", **how)}
    return jlora.attach(weights, rules, key=jax.random.key(0))


def memory(fn, given, *others, at=None):
    """What `fn(given, *others)` adds to its arguments, of which the first is donated."""
    made = jax.tree.structure(jax.eval_shape(fn, given, *others))
    at = made.unflatten([x.sharding for x in jax.tree.leaves(given if at is None else at)])
    run = jax.jit(fn, donate_argnums=0, out_shardings=at)
    found = run.lower(given, *others).compile().memory_analysis()
    names = {"arguments": "argument", "temporary": "temp", "outputs": "output", "aliased": "alias"}
    sizes = {k: getattr(found, f"{v}_size_in_bytes") / 2**30 for k, v in names.items()}
    return {**sizes, "more": sizes["temporary"] + sizes["outputs"] - sizes["aliased"]}


def shard(x):
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def merge():
    """Over the base alone: the adapter, which is donated too, is counted."""
    found = memory(jlora.merge, attached(base()), at=base())
    alone = sum(map(shard, jax.tree.leaves(base())))
    return {**found, "more": found["more"] + found["arguments"] - alone / 2**30}


def attach(*names, **how):
    run = functools.partial(attached, **how)
    return memory(run, base(*names), at=run(base(*names)))


def from_gradients():
    return memory(lora_ga, attached(base(*LARGEST)), base(*LARGEST))


def from_moments(init):
    given = attached(base("q"))
    moments = Moments(
        second=struct((LAYERS, D, D), jnp.float32, None, "fsdp"),
        total=struct((LAYERS, D), jnp.float32),
        count=struct((LAYERS,), jnp.float32),
    )
    return memory(init, given, {"layers": {"q": moments}})


def from_errors():
    weights = base(*LARGEST)
    how = {"layouts": {f"layers/{k}": "io" for k in LARGEST}}
    codes = jax.eval_shape(lambda p: jlora.quantize(p, {".*": "int8"}, **how), weights)
    codes = jax.tree.map(lambda x: struct(x.shape, x.dtype, *(None, None, "fsdp")[: x.ndim]), codes)
    return memory(loftq, attached(codes), weights)


PLANS = {
    "merge": merge,
    "attach": attach,
    "lora_ga": from_gradients,
    "corda": lambda: from_moments(corda),
    "loftq": from_errors,
    "eva": lambda: from_moments(eva),
    "randomized": lambda: attach(*LARGEST, init=functools.partial(initializers.pissa, niter=16)),
    **{form: functools.partial(attach, *LARGEST, form=form) for form in ("lora_xs", "mica")},
}
for _name in ("pissa", "milora", "olora", "orthogonal"):
    PLANS[_name] = functools.partial(attach, *LARGEST, init=getattr(initializers, _name))

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 16)
    for name in sys.argv[1:]:
        print(json.dumps({name: PLANS[name]()}), flush=True)
