"""The same blocks over quantized weights in other libraries: qwix, and PEFT with bitsandbytes.

Each is used as its documentation shows. A library is imported only when its variant is built.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from blocks import Sizes, loss
from measure import cores
from peers import torch_decoder

Run = tuple[Callable[[], Any], int, int]  # a run, its temporary memory, the bytes of the base


def with_qwix(sizes: Sizes, x: jax.Array, grad: bool) -> dict[str, Run]:
    """Qwix's QLoRA, int8 with a scale per output and NF4 in blocks of 64, without remat."""
    import qwix
    from flax import nnx

    class Decoder(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.blocks = nnx.List(
                nnx.Dict({n: nnx.Linear(*s, use_bias=False, rngs=rngs) for n, s in shapes.items()})
                for _ in range(sizes.blocks)
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            return loss(self.blocks, x, head_dim=sizes.head_dim, mul=mul)

    shapes, mul = sizes.shapes, lambda x, linear: linear(x)
    found = {}
    for name, tile in (("int8", None), ("nf4", 64)):
        provider = qwix.LoraProvider(
            module_path=".*",
            rank=sizes.rank,
            alpha=sizes.rank,
            weight_qtype=name,
            tile_size=tile,
        )
        model = qwix.apply_lora_to_model(Decoder(), provider, x, rngs=nnx.Rngs(0))
        graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)

        def value(trainable: Any, x: jax.Array, frozen: Any, graph: Any = graph) -> jax.Array:
            return nnx.merge(graph, trainable, frozen)(x)

        fn = jax.value_and_grad(value, (0, 1)) if grad else value
        made = jax.jit(fn).lower(trainable, x, frozen).compile()
        run = lambda made=made, args=(trainable, x, frozen): jax.block_until_ready(made(*args))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
        found[f"qwix, {name}"] = (run, made.memory_analysis().temp_size_in_bytes, held)
    return found


def with_peft(sizes: Sizes, x: jax.Array, grad: bool) -> dict[str, Run]:
    """PEFT over bitsandbytes's Linear4bit in NF4 with quantized scales, on a CPU."""
    import bitsandbytes as bnb
    import peft
    import torch

    torch.set_num_threads(cores())
    model = torch_decoder(sizes)
    kind: Any = bnb.nn.Linear4bit
    for p in model.blocks:
        for name, shape in sizes.shapes.items():
            p[name] = kind(*shape, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model.is_loaded_in_4bit = True
    model = model.to("cpu")  # quantizes
    held = sum(t.nbytes for t in model.state_dict().values())
    config = peft.LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=list(sizes.shapes))
    adapted = peft.get_peft_model(model, config)
    inputs = torch.from_numpy(np.array(x)).requires_grad_(grad)

    def run() -> float:
        with torch.set_grad_enabled(grad):
            value = adapted(inputs)
            if grad:
                value.backward()
        return value.item()

    return {"PEFT + bitsandbytes": (run, 0, held)}


PEERS = {"qwix": with_qwix, "bitsandbytes": with_peft}
