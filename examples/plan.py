"""What a step needs, from shapes alone: parameters, bytes, compiled peak memory and FLOPs.

Nothing is loaded and nothing is computed, so the model may be larger than this machine. The step is
compiled for the device that JAX finds here; another backend may use other temporary memory.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import llama
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
    config = configured(args, weights.load_config(args.model, layers_of(args), args.dtype))
    length = args.length or LENGTH
    step, given = abstract_step(args, config, length)
    trainable, opt_state, frozen, batch = given
    begun = time.perf_counter()
    memory = step.lower(*given).compile().memory_analysis()
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
    print(f"{config.layers} layers on {jax.devices()[0].device_kind}, from shapes alone")
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
            base = jlora.quantize(base, RULES[args.quantize], layouts=layouts)
        return attach(args, base)

    trainable, frozen = jlora.partition(jax.eval_shape(make))
    tx = training.make_optimizer(args.lr, args.steps, args.lora_plus)
    loss = training.make_loss(jlora.lora(make_apply(config)), chunked=config.chunk > 0)
    step = training.make_step(loss, tx, args.accumulate)
    return step, (trainable, jax.eval_shape(tx.init, trainable), frozen, batch)


def flops(args: argparse.Namespace, config: llama.Config, length: int) -> float:
    """Those of the program before XLA, which are linear in the number of layers."""

    def of(layers: int) -> float:
        # Loops are counted once, so there are none.
        smaller = dataclasses.replace(config, layers=layers, chunk=0, scan=False)
        changes = {"accumulate": 1, "batch": rows, "scan": False}
        parts = argparse.Namespace(**{**vars(args), **changes})
        step, given = abstract_step(parts, smaller, length)
        return step.lower(*given).cost_analysis()["flops"]

    rows = args.batch // args.accumulate
    one, two = of(1), of(2)
    return args.accumulate * (one + (config.layers - 1) * (two - one))


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def size(value: float) -> str:
    """Bytes for people."""
    return tqdm.format_sizeof(value, "B", divisor=1000)
