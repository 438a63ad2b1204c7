"""What a step needs, from shapes alone: parameters, bytes, compiled peak memory and FLOPs.

Nothing is loaded and nothing is computed, so the model may be larger than this machine. The step is
compiled for the device that JAX finds here; another backend may use other temporary memory. With
--mesh it is compiled for as many virtual CPU devices, and the bytes are those of one device.
"""

import argparse
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import llama
import placing
import training
import weights
from begin import attach, configured, layers_of
from data import LENGTH
from evaluation import make_apply
from formats import RULES, count
from param_tree import stacked_layouts
from tqdm import tqdm

import jlora


def show_plan(args: argparse.Namespace) -> None:
    """Print the plan of the flags' step."""
    placing.virtual_devices(args)
    config = configured(args, weights.load_config(args.model, layers_of(args), args.dtype))
    length = args.length or LENGTH
    step, given = abstract_step(args, config, length)
    trainable, opt_state, frozen, batch = given
    begun = time.perf_counter()
    memory = placing.lower(step, *given, kept=2).compile().memory_analysis()
    seconds = time.perf_counter() - begun
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    tokens, operations = args.batch * length, flops(args, config, length)
    rows = {
        "tracing, compiling": f"{seconds:.1f} s",
        "parameters": f"{count(frozen):,} frozen, {count(trainable):,} trainable",
        "base weights": size(nbytes(frozen)),
        "adapter": size(nbytes(trainable)),
        "optimizer": size(nbytes(opt_state)),
        "batch": f"{args.batch} rows of {length} tokens, {size(nbytes(batch))}",
        "temporary": size(memory.temp_size_in_bytes),
        "peak of a step": size(peak),
        "FLOPs of a step": f"{operations:.3g}, {operations / tokens:.3g} a token",
    }
    where = jax.devices()[0].device_kind
    if args.mesh is not None:
        where = f"{math.prod(args.mesh.values())} devices, of which the bytes are those of one"
    print(f"{config.layers} layers on {where}, from shapes alone")
    placing.say_undivided(jlora.combine(trainable, frozen))
    for name, value in rows.items():
        print(f"  {name:20}{value}")


def abstract_step(
    args: argparse.Namespace, config: llama.Config, length: int
) -> tuple[Any, tuple[Any, Any, Any, dict[str, Any]]]:
    """The jitted step, and the shapes of its arguments; every token is a target."""
    rows = args.batch // args.accumulate
    lead = (args.accumulate,) if args.accumulate > 1 else ()
    shapes = dict.fromkeys(("tokens", "positions", "segments"), (rows, length))
    shapes |= dict.fromkeys(("at", "target", "weight"), (rows * length,))
    kind = lambda name: jnp.float32 if name == "weight" else jnp.int32
    batch = {k: jax.ShapeDtypeStruct((*lead, *s), kind(k)) for k, s in shapes.items()}
    model = llama.Llama(config)

    def make() -> Any:
        base = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        base = jax.tree.map(lambda x: x.astype(config.dtype), base)
        if args.quantize is not None:
            layouts = stacked_layouts(base) if args.scan else None
            try:
                base = jlora.quantize(base, RULES[args.quantize], layouts=layouts)
            except ValueError as error:
                raise ValueError(f"`--plan --quantize {args.quantize}`: {error}") from error
        return base

    base = placing.place_all(placing.mesh_of(args), jax.eval_shape(make))
    params = attach(args, base) if args.mesh else jax.eval_shape(lambda b: attach(args, b), base)
    trainable, frozen = jlora.partition(params)
    tx = training.make_optimizer(args.lr, args.steps, args.lora_plus)
    loss = training.make_loss(jlora.lora(make_apply(config)), chunked=config.chunk > 0)
    step = training.make_step(placing.split(loss, config), tx, args.accumulate)
    return step, (trainable, placing.initial(tx, params), frozen, batch)


def flops(args: argparse.Namespace, config: llama.Config, length: int) -> float:
    """Those of the program before XLA, which are linear in the number of layers."""

    def of(layers: int) -> float:
        # Loops are counted once, so there are none.
        smaller = dataclasses.replace(config, layers=layers, chunk=0, scan=False, rows=None)
        changes = {"accumulate": 1, "batch": rows, "scan": False, "mesh": None}
        parts = argparse.Namespace(**{**vars(args), **changes})
        step, given = abstract_step(parts, smaller, length)
        return step.lower(*given).cost_analysis()["flops"]

    rows = args.batch // args.accumulate
    one, two = of(1), of(2)
    return args.accumulate * (one + (config.layers - 1) * (two - one))


def nbytes(tree: Any) -> int:
    """The bytes of a tree; of those on a mesh, the bytes of one device."""

    def one(x: Any) -> int:
        at = getattr(x, "sharding", None)
        return math.prod(x.shape if at is None else at.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def size(value: float) -> str:
    """Bytes for people."""
    return tqdm.format_sizeof(value, "B", divisor=1000)
