"""How much memory does a training step take on machines that are not here? The compiler says.

    python benchmarks/aot.py [--only NAME ...] [--modes MODE ...] [--json FILE]

Steps of Llama-3 8B and 70B and GPT-3 175B are compiled ahead of time for GPUs and TPUs, from shapes
alone: no weight exists and no device is needed. A step is one of

    limit      the forward pass and the gradient of the activations, W frozen
    lora       rank 16 on all weights (175B: rank 4 on q and v), Adam; A and B sharded as W
    replicate  the same, A and B replicated over fsdp, along which the batch is split
    int8, nf4  as lora, over a base in this format
    full       float32 weights and Adam

The peak is what the compiler plans for one device. `copies` are the transposes and copies in the
compiled program that have the size of a weight, and `sums` the all-reduces of activations, of which
the limit's program has so many fewer. The compilers come in optional packages; README.md has the
recipe.
"""

import argparse
import collections
import importlib.util
import math
import os
import re
import time
from pathlib import Path
from typing import Any

# Before JAX is imported: every platform that is installed, and a CUDA compiler without a driver.
os.environ["JAX_PLATFORMS"] = ""
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is opened, so none is locked
if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvcc"):
    _found = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations
    os.environ["PATH"] = os.pathsep.join([f"{_found[0]}/bin", os.environ["PATH"]])
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={_found[0]}"
    )

import aot_models as models
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import surroundings, write_json
from mesh import collectives

import jlora

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
BATCH, TENSOR, SEQUENCE = P("fsdp"), P("fsdp", None, "tp"), P("fsdp", "tp", None)
# platform, topology, model, (fsdp, tp), rows of tokens, the activations between layers
TARGETS = {
    "8B, 8 x H100": ("cuda", "1x1x8", models.LLAMA_8B, (8, 1), 8, BATCH),
    "70B, 16 x H100": ("cuda", "1x2x8", models.LLAMA_70B, (16, 1), 16, BATCH),
    "175B, 64 x H100": ("cuda", "1x8x8", models.GPT_175B, (16, 4), 16, BATCH),
    "8B, v5e 2x4": ("tpu", "v5e:2x4", models.LLAMA_8B, (8, 1), 8, BATCH),
    "175B, v5p 4x4x4": ("tpu", "v5p:4x4x4", models.GPT_175B, (16, 4), 16, BATCH),
    "175B, v5p, split stream": ("tpu", "v5p:4x4x4", models.GPT_175B, (16, 4), 16, SEQUENCE),
}
MODES = ("limit", "lora", "replicate", "int8", "nf4", "full")
LENGTH = 2048
FORMATS = ("int8", "nf4")
GIB = 2**30


def devices(platform: str, topology: str) -> Any:
    """The devices of a machine that is not here."""
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology=topology
    )
    return found.devices


def step(model: models.Model, mesh: Mesh, rows: int, stream: P, mode: str) -> tuple[Any, Any]:
    """A jitted training step and the structs of its arguments."""
    loss = models.make_loss(model, mesh, stream)
    split, everywhere = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=split)
    shift = jax.ShapeDtypeStruct((model.width,), jnp.bfloat16, sharding=everywhere)
    base = models.base(model, mesh, jnp.float32 if mode == "full" else jnp.bfloat16)
    if mode == "limit":
        return jax.jit(jax.value_and_grad(loss, argnums=2)), (base, tokens, shift)
    kept = ("fsdp",) if mode == "replicate" else ()
    if mode == "full":
        params = trained = base
        frozen = None
    else:
        base = models.stored(base, mode, mesh) if mode in FORMATS else base
        spec = jlora.LoraSpec(model.rank, layout="io")
        rules = {"layers/norm.*": None, f"layers/({model.targets})": spec}
        params = jlora.attach(base, rules, key=jax.random.key(0), replicate=kept)
        trained, frozen = jlora.partition(params)
    apply = loss if mode == "full" else jlora.lora(loss, fallback="error")
    tx = optax.adam(1e-4)
    state = jax.eval_shape(tx.init, trained)
    at = tuple(jlora.shardings(x, kept, of=params) for x in (trained, state))
    state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, at[1]
    )

    def run(trained: Any, state: Any, frozen: Any, tokens: Any, shift: Any) -> Any:
        def of(trained: Any) -> jax.Array:
            p = trained if mode == "full" else jlora.combine(trained, frozen)
            return apply(p, tokens, shift)

        value, grads = jax.value_and_grad(of)(trained)
        updates, state = tx.update(grads, state, trained)
        return jlora.apply_updates(trained, updates), state, value

    run = jax.jit(run, donate_argnums=(0, 1), out_shardings=(*at, None))
    return run, (trained, state, frozen, tokens, shift)


def copies(text: str, model: models.Model, mesh: Mesh) -> collections.Counter[str]:
    """Transposes and copies of the size of a weight, or of the stack of its shards."""
    sizes = set()
    for (inputs, outputs), _ in model.weights().values():
        one = inputs * outputs // mesh.shape["tp"]
        sizes |= {one, model.layers * one // mesh.shape["fsdp"]}
    found: collections.Counter[str] = collections.Counter()
    for dtype, dims, kind in re.findall(r"= (\w+)\[([\d,]+)\]\S* (transpose|copy)\(", text):
        if math.prod(map(int, dims.split(","))) in sizes:
            found[f"{kind} {dtype}[{dims}]"] += 1
    return found


def sums(text: str, model: models.Model, mesh: Mesh, rows: int) -> int:
    """All-reduces of what a device has of the activations between layers."""
    size = rows // mesh.shape["fsdp"] * LENGTH * model.width // mesh.shape["tp"]
    reduced = (shapes for kind, shapes, _ in collectives(text) if kind == "all-reduce")
    return sum(any(math.prod(shape) >= size for shape in shapes) for shapes in reduced)


def compiled(name: str, mode: str) -> dict[str, Any]:
    platform, topology, model, shape, rows, stream = TARGETS[name]
    mesh = Mesh(np.array(devices(platform, topology)).reshape(shape), ("fsdp", "tp"))
    run, given = step(model, mesh, rows, stream, mode)
    begun = time.process_time()
    program = run.lower(*given).compile()
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "seconds": time.process_time() - begun,
        "copies": copies(text, model, mesh),
        "sums": sums(text, model, mesh, rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    columns = ("arguments", "temporary", "peak", "/ limit", "CPU-s", "copies", "sums")
    print(f"{'GiB a device':26}{'':10}" + "".join(f"{c:>11}" for c in columns), flush=True)
    for name in options.only:
        limit: dict[str, Any] = {}
        for mode in options.modes:
            try:
                row = compiled(name, mode)
            except jax.errors.JaxRuntimeError as error:
                print(f"{name:26}{mode:10}  {str(error).splitlines()[0]}", flush=True)
                rows.append({"target": name, "mode": mode, "error": str(error).splitlines()[0]})
                continue
            limit = row if mode == "limit" else limit
            more_copies = row["copies"] - limit.get("copies", collections.Counter())
            more_sums = row["sums"] - limit.get("sums", 0)
            sizes = "".join(f"{row[k] / GIB:11.2f}" for k in columns[:3])
            ratio = row["peak"] / limit["peak"] if limit else math.nan
            print(
                f"{name:26}{mode:10}{sizes}{ratio:11.3f}{row['seconds']:11.1f}{more_copies.total():11}"
                f"{more_sums:11}",
                flush=True,
            )
            more = {"more_copies": more_copies, "more_sums": more_sums}
            rows.append({"target": name, "mode": mode, **row, **more})
    if options.json:
        write_json(options.json, {**surroundings(), "length": LENGTH, "rows": rows})


if __name__ == "__main__":
    main()
