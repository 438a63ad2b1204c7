"""`--mesh fsdp=4,tp=2`: where weights, adapter, optimizer and batches are, on several devices.

`dp` and `fsdp` split the batch, `fsdp` the weights as well, and `tp` the heads and the width of the
MLP. A and B are split as their weight is along `tp`, and are whole along the other axes. In a
program of several processes, each runs the same code on the same files, and process 0 writes.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from llama import Config, split_rows

import jlora
from jlora.quant import QuantArray

AXES = ("dp", "fsdp", "tp")
SPLIT = ("dp", "fsdp")  # the axes that the batch is split along
# The last axes of a leaf, by its path; the first match wins. An axis that does not divide is whole.
RULES = {
    r"embed/embedding|.*(o|down)_proj/kernel": ("tp", "fsdp"),
    r".*kernel": ("fsdp", "tp"),
    r".*(o|down)_proj/bias|.*scale": (),
    r".*bias": ("tp",),
}


# ----------------------------------------------------------------------------------------- the mesh


def join_processes(args: argparse.Namespace) -> None:
    """Join the other processes of --distributed, before JAX looks for devices."""
    if args.distributed is None:
        return
    own = () if args.distributed == "auto" else args.distributed
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the job
    try:
        jax.distributed.initialize(*own)  # without arguments, the cluster tells who is who
    except (ValueError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"`--distributed`: the processes did not find each other ({why}). Outside of a cluster "
            "that JAX knows, give the address of process 0, the number of processes and the index "
            "of each, as in --distributed 10.0.0.1:12355,2,0."
        ) from error


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh of the flags."""
    if args.mesh is None:
        return None
    return make_mesh(tuple(args.mesh.get(name, 1) for name in AXES), args.plan)


@functools.cache
def make_mesh(shape: tuple[int, ...], plan: bool) -> Mesh:
    found, count = jax.devices(), math.prod(shape)
    sizes = ",".join(f"{name}={n}" for name, n in zip(AXES, shape, strict=True) if n > 1)
    if count > len(found) or (count < len(found) and not plan):
        others = f"Give {len(found)} in all, as --mesh fsdp={len(found)}"
        if found[0].platform == "cpu":
            others += f", or set JAX_NUM_CPU_DEVICES={count} to have as many virtual ones"
        raise ValueError(
            f"`--mesh {sizes or 'tp=1'}`: it has {count} devices, and JAX has {len(found)} "
            f"({found[0].device_kind}). {others}."
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=found[:count])


def virtual_devices(args: argparse.Namespace) -> None:
    """Let JAX have as many CPU devices as the mesh of a plan, unless it has started."""
    if args.mesh is not None:
        try:
            jax.config.update("jax_num_cpu_devices", math.prod(args.mesh.values()))
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError:  # it has started: `make_mesh` says if its devices are too few
            pass


def replicate(args: argparse.Namespace) -> tuple[str, ...]:
    """The axes along which A and B are whole, for `jlora.attach` and those that restore."""
    return () if args.mesh is None else SPLIT


def rows(args: argparse.Namespace) -> NamedSharding | None:
    """Where the rows of a batch and of the activations are; for `llama.Config`."""
    mesh = mesh_of(args)
    return None if mesh is None else NamedSharding(mesh, P(SPLIT))


# --------------------------------------------------------------------------------- where leaves are


def names_of(path: str, ndim: int) -> tuple[str | None, ...]:
    """The axis of the mesh for each axis of a weight."""
    found = next((names for key, names in RULES.items() if re.fullmatch(key, path)), ())
    return (*(None,) * (ndim - len(found)), *found)


def fitting(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """A sharding along the axes that divide."""
    pairs = zip(names, shape, strict=False)
    return NamedSharding(
        mesh, P(*(n if n and size % mesh.shape[n] == 0 else None for n, size in pairs))
    )


def arrays_of(path: str, weight: Any) -> dict[str, tuple[Any, tuple[str | None, ...]]]:
    """The arrays of a weight by name, each with the axes of the mesh for its own axes.

    The codes and scales of a stored weight are rows of outputs, which are split along the inputs.
    """
    names = names_of(path, len(weight.shape))
    if not isinstance(weight, QuantArray):
        return {"": (weight, names)}
    *stack, first, second = names
    rows = (*stack, *((second, first) if weight.layout == "io" else (first, second)))
    outputs, at = weight.dims[weight.layout.index("o")], len(stack)
    has_rows = lambda part: part.shape[at : at + 1] == (outputs,)
    return {k: (x, rows if has_rows(x) else (*stack,)) for k, x in weight.parts.items()}


def place(mesh: Mesh | None, path: str, weight: Any) -> Any:
    """Put a weight, or the shapes of one, on the mesh."""
    if mesh is None:
        return weight
    found = {
        name: put(x, fitting(mesh, names, x.shape))
        for name, (x, names) in arrays_of(path, weight).items()
    }
    return found[""] if "" in found else dataclasses.replace(weight, parts=found)


def place_all(mesh: Mesh | None, params: Any) -> Any:
    """`place` every weight of a tree."""
    is_stored = lambda x: isinstance(x, QuantArray)
    leaves = [place(mesh, path, x) for path, x in weights_of(params)]
    return jax.tree.structure(params, is_leaf=is_stored).unflatten(leaves)


def put(x: Any, at: NamedSharding) -> Any:
    """Put an array that every process has, or one of all of them, where `at` says."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    if at.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, at)
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, at, lambda index: own[index])


def like(x: np.ndarray, other: jax.Array) -> jax.Array:
    """An array of the host where `other` is, if that is on a mesh."""
    at = other.sharding
    return put(x, at) if isinstance(at, NamedSharding) else jnp.asarray(x)


def initial(tx: Any, params: Any) -> Any:
    """The state of the optimizer of what is trained in `params`, or the shapes of it."""
    trainable, _ = jlora.partition(params)
    shapes = jax.eval_shape(tx.init, trainable)
    planned = isinstance(jax.tree.leaves(trainable)[0], jax.ShapeDtypeStruct)
    if mesh_at(trainable) is None:
        return shapes if planned else tx.init(trainable)
    at = jlora.shardings(shapes, SPLIT, of=params)
    if planned:
        return jax.tree.map(put, shapes, at)
    return jax.jit(tx.init, out_shardings=at)(trainable)


def mesh_at(tree: Any) -> Mesh | None:
    """The mesh that the arrays, or the shapes, of a tree are on."""
    found = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    return next((at.mesh for at in found if isinstance(at, NamedSharding)), None)


def place_adapter(params: Any) -> Any:
    """Put A and B of adapted weights that are on a mesh where `jlora.attach` does."""
    if mesh_at(params) is None:
        return params
    return jax.tree.map(put, params, jlora.shardings(params, SPLIT))


def say_undivided(params: Any) -> None:
    """Print which axes are whole on every device since the mesh does not divide them."""
    mesh, found = mesh_at(params), dict[str, list[str]]()
    if mesh is None:
        return
    for path, weight in weights_of(jlora.detach(params)[0]):
        x, names = max(arrays_of(path, weight).values(), key=lambda pair: pair[0].size)
        for name, size in zip(names, x.shape, strict=False):
            if name is not None and size % mesh.shape[name]:
                why = f"{name}={mesh.shape[name]} does not divide {size}"
                found.setdefault(why, []).append(path)
    for why, paths in found.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        print(f"--mesh {why}: each device has all of this axis of {paths[0]}{more}")


def weights_of(params: Any) -> list[tuple[str, Any]]:
    """The weights of a tree without adapter, stored ones in one piece, with their paths."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, QuantArray))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in found]


# ------------------------------------------------------------------------------- programs on a mesh


def lower(function: Callable[..., Any], *given: Any, kept: int = 0) -> Any:
    """Lower a function for arguments like `given`.

    On a mesh, the first `kept` arguments are donated and returned where they were; what else is
    returned is whole on every device, as are arguments that are not on the mesh yet.
    """
    mesh = mesh_at(given)
    if mesh is None:
        return (function if hasattr(function, "lower") else jax.jit(function)).lower(*given)
    everywhere = NamedSharding(mesh, P())

    def where(x: Any) -> NamedSharding:
        at = getattr(x, "sharding", None)
        return at if isinstance(at, NamedSharding) else everywhere

    at = jax.tree.map(where, given)
    out = (*at[:kept], everywhere) if kept else everywhere
    donated = tuple(range(kept))
    jitted = jax.jit(function, in_shardings=at, out_shardings=out, donate_argnums=donated)
    return jitted.lower(*given)


def split(loss: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """A function of (params, batch) that splits the rows of the batch over the mesh, if any."""
    if config.rows is None:
        return loss
    of = functools.partial(split_rows, config)
    return lambda params, batch: loss(params, jax.tree.map(of, batch))


# -------------------------------------------------------------------------------- several processes


def is_first() -> bool:
    """Whether this process writes files."""
    return jax.process_index() == 0


def agreed(flag: bool) -> bool:
    """Whether the flag is set in any process, since all of them must do the same."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def end_alone(status: int) -> int:
    """The exit status after an error; of several processes, this one ends here.

    The others may be waiting for it, and it would wait for them: as it ends, JAX ends them.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def host(x: Any) -> np.ndarray:
    """A copy on the host of an array, of which other processes may have parts."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.array(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
