"""Which collectives does an adapter add to a training step on a mesh?

    python benchmarks/mesh.py [--json FILE]

A small Llama, unrolled, is compiled for 8 virtual CPU devices, fsdp x tp: column-parallel and
row-parallel over tp, weights and batch sharded over fsdp. Counted in the compiled program, for one
step and device: the limit (forward pass and gradient of the activations, W frozen), rank 3 on all
weights with A and B sharded as W ("inherit") or replicated over fsdp ("replicate"), and full
fine-tuning. Bytes are those of the results. Expected: "replicate" adds no gather of A or B, and
their gradients are results of one all-reduce; "inherit" adds three small gathers a weight.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mesh_model as model
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import surroundings, write_json

import jlora

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s64": 8, "u64": 8}
BYTES |= {"s8": 1, "u8": 1}
RANK = 3  # no other axis has this size


def collectives(text: str) -> list[tuple[str, list[tuple[int, ...]], int]]:
    """The kind of each collective in a compiled program, its results' shapes, and their bytes."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match is None:
            continue
        results = [
            (dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        ]
        size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in results)
        found.append((match[2], [shape for _, shape in results], size))
    return found


def compiled(mode: str, shape: tuple[int, int] = (4, 2), replicate: tuple[str, ...] = ()) -> str:
    """The program of one step's gradients: "limit", "jlora" or "full"."""
    where = model.mesh(shape, AxisType.Auto)
    # More tokens than W has rows, as in practice: otherwise the compiler gathers these, not W.
    long = np.tile(model.TOKENS, (1, 16))
    tokens = jax.device_put(long, NamedSharding(where, P("fsdp")))
    at: Any = jax.tree.map(lambda spec: NamedSharding(where, spec), model.specs(False))
    shift = jax.device_put(jnp.zeros((1, 1, model.D)), NamedSharding(where, P()))
    if mode == "jlora":
        params = model.placed(model.params(False, rank=RANK), where, False, replicate)
        trained, frozen = jlora.partition(params)
        at = jlora.shardings(trained, replicate, of=params)
    else:
        trained, frozen = jax.device_put(model.base(False), at), None
    trained, rest = (shift, trained) if mode == "limit" else (trained, (frozen, shift))

    def loss(trained: Any, rest: Any) -> Any:
        if mode == "limit":
            return model.loss(rest, tokens, AxisType.Auto, trained)[0]
        params = jlora.combine(trained, rest[0]) if mode == "jlora" else trained
        return model.loss(params, tokens, AxisType.Auto, rest[1])[0]

    at = shift.sharding if mode == "limit" else at
    run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, at))
    with jax.set_mesh(where):
        return run.lower(trained, rest).compile().as_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    modes = {
        "limit": {"mode": "limit"},
        "jlora, inherit": {"mode": "jlora"},
        "jlora, replicate": {"mode": "jlora", "replicate": ("fsdp",)},
        "full": {"mode": "full"},
    }
    rows = []
    print(f"{'mesh':6}{'step':18}" + "".join(f"{kind:>20}" for kind in KINDS))
    for shape in ((4, 2), (2, 4)):
        for name, how in modes.items():
            found = collectives(compiled(shape=shape, **how))
            row = {kind: [size for one, _, size in found if one == kind] for kind in KINDS}
            rows.append({"mesh": shape, "step": name, "bytes": row})
            cells = (f"{len(sizes):4} x {sum(sizes) / 1024:7.1f} KiB" for sizes in row.values())
            print(f"{'x'.join(map(str, shape)):6}{name:18}" + "".join(f"{c:>20}" for c in cells))
    if options.json:
        write_json(options.json, {**surroundings(), "layers": model.LAYERS, "rows": rows})


if __name__ == "__main__":
    main()
