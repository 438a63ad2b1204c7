"""The same blocks, weights and adapters in other libraries: qwix, quax, and PEFT in PyTorch.

Each is used as its own documentation shows, with its defaults. A library is imported only when its
variant is built.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from blocks import Sizes, loss
from measure import cores

Blocks = list[dict[str, tuple[Any, Any]]]  # for each projection of each block its A and B


class Variant(NamedTuple):
    """`run` computes loss and gradients once, waits for them, and returns the loss.

    `gradients`, of a variant that trains A and B, returns those of every A and B, and the input's.
    """

    run: Callable[[], Any]
    limit: str
    temp_bytes: int
    flops: float
    gradients: Callable[[], list[Any]] | None = None


def compiled(
    fn: Callable[..., jax.Array],
    argnums: tuple[int, ...],
    *args: Any,
    factors: Callable[[Any], Blocks] | None = None,
) -> Variant:
    """The variant that differentiates a JAX function, compiled for these arguments.

    `factors` finds A's and B's gradients in that of the first argument.
    """
    program = jax.jit(jax.value_and_grad(fn, argnums)).lower(*args).compile()

    def gradients() -> list[Any]:
        trained, x = program(*args)[1]
        return in_order(factors(trained), x)

    return Variant(
        run=lambda: jax.block_until_ready(program(*args))[0],
        limit="limit",
        temp_bytes=program.memory_analysis().temp_size_in_bytes,
        flops=program.cost_analysis()["flops"],
        gradients=gradients if factors else None,
    )


def in_order(blocks: Blocks, x: Any) -> list[Any]:
    """Each A and B of each block, by the projections' names, then the input."""
    factors = (pair for block in blocks for _, pair in sorted(block.items()))
    return [*(np.asarray(factor) for pair in factors for factor in pair), np.asarray(x)]


def with_quax(sizes: Sizes, params: Any, x: jax.Array) -> dict[str, Variant]:
    """Quax's LoRA, each weight of the blocks a LoraArray of its own."""
    import equinox as eqx
    import quax
    from quax.examples.lora import LoraArray

    def fill(node: Any, a: jax.Array, b: jax.Array) -> Any:
        return eqx.tree_at(lambda n: (n.a, n.b), node, (a, b))

    key = jax.random.key(0)
    nodes = [
        {n: LoraArray(node.base, rank=sizes.rank, key=key) for n, node in block.items()}
        for block in params
    ]
    trainable = [{n: (node.lora_a, node.lora_b) for n, node in block.items()} for block in params]
    adapted = quax.quaxify(functools.partial(loss, head_dim=sizes.head_dim))

    def value(trainable: Any, x: jax.Array, nodes: Any) -> jax.Array:
        pairs = zip(nodes, trainable, strict=True)
        return adapted([{n: fill(block[n], *new[n]) for n in block} for block, new in pairs], x)

    return {"quax": compiled(value, (0, 1), trainable, x, nodes, factors=list)}


def with_qwix(sizes: Sizes, params: Any, x: jax.Array) -> dict[str, Variant]:
    """Qwix's LoRA, on the blocks with a Flax NNX Linear for each product."""
    import qwix
    from flax import nnx

    class Decoder(nnx.Module):
        def __init__(self) -> None:
            make = functools.partial(
                nnx.Linear, use_bias=False, dtype=sizes.dtype, param_dtype=sizes.dtype
            )
            rngs = nnx.Rngs(0)
            self.blocks = nnx.List(
                nnx.Dict({n: make(*s, rngs=rngs) for n, s in sizes.shapes.items()})
                for _ in range(sizes.blocks)
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            return loss(self.blocks, x, head_dim=sizes.head_dim, mul=lambda x, linear: linear(x))

    provider = qwix.LoraProvider(module_path=".*", rank=sizes.rank, alpha=sizes.rank)
    model = qwix.apply_lora_to_model(Decoder(), provider, x, rngs=nnx.Rngs(0))
    for block, nodes in zip(model.blocks, params, strict=True):
        for name, node in nodes.items():
            block[name].kernel.set_value(node.base)
            block[name].kernel_lora_a.set_value(node.lora_a)
            block[name].kernel_lora_b.set_value(node.lora_b)
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def value(trainable: Any, x: jax.Array, frozen: Any) -> jax.Array:
        return nnx.merge(graph, trainable, frozen)(x)

    def factors(state: Any) -> Blocks:
        blocks = [state["blocks"][n] for n in range(sizes.blocks)]
        sides = ("kernel_lora_a", "kernel_lora_b")
        return [{n: tuple(b[n][side][...] for side in sides) for n in sizes.shapes} for b in blocks]

    return {"qwix": compiled(value, (0, 1), trainable, x, frozen, factors=factors)}


def with_peft(sizes: Sizes, params: Any, x: jax.Array) -> dict[str, Variant]:
    """PEFT's LoRA on the blocks in PyTorch, and PyTorch's own limit."""
    import peft
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(cores())
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = getattr(torch, sizes.dtype)

    def tensor(array: jax.Array) -> Any:
        return torch.from_numpy(np.array(array, np.float32)).to(device)

    model = torch_decoder(sizes).to(device=device, dtype=dtype).requires_grad_(False)
    inputs = tensor(x).to(dtype).requires_grad_()

    def variant(model: Any, gradients: Callable[[], list[Any]] | None = None) -> Variant:
        trained = [*(p for p in model.parameters() if p.requires_grad), inputs]

        def run() -> float:
            for leaf in trained:
                leaf.grad = None
            value = model(inputs)
            value.backward()
            if on_gpu:
                torch.cuda.synchronize()
            return value.item()

        with FlopCounterMode(display=False) as counter, live_bytes() as live:
            run()
        return Variant(run, "peft_limit", max(live), counter.get_total_flops(), gradients)

    with torch.no_grad():
        for block, nodes in zip(model.blocks, params, strict=True):
            for name, node in nodes.items():
                block[name].weight.copy_(tensor(node.base).T)
    limit = variant(model)
    # A copy: PEFT puts its layers into the model that it is given.
    config = peft.LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules=list(sizes.shapes))
    adapted = peft.get_peft_model(torch_decoder(sizes).to(device=device, dtype=dtype), config)
    inner = adapted.get_base_model()
    with torch.no_grad():
        for block, nodes, plain in zip(inner.blocks, params, model.blocks, strict=True):
            for name, node in nodes.items():
                block[name].base_layer.weight = plain[name].weight
                block[name].lora_A["default"].weight.copy_(tensor(node.lora_a).T)
                block[name].lora_B["default"].weight.copy_(tensor(node.lora_b).T)

    def gradients() -> list[Any]:
        """Those of the last run."""
        pairs = [
            {n: (block[n].lora_A["default"], block[n].lora_B["default"]) for n in sizes.shapes}
            for block in inner.blocks
        ]
        blocks = [{n: tuple(f.weight.grad.T for f in pair) for n, pair in b.items()} for b in pairs]
        return in_order(blocks, inputs.grad)

    return {"peft": variant(adapted, gradients), "peft_limit": limit}


def torch_decoder(sizes: Sizes) -> Any:
    """blocks.py in PyTorch, with its own fused attention."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def norm(x: Any) -> Any:
        return F.rms_norm(x, (x.shape[-1],), eps=1e-5)

    def block(p: Any, x: Any) -> Any:
        h = norm(x)
        q, k, v = (p[n](h).unflatten(-1, (-1, sizes.head_dim)).transpose(1, 2) for n in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + p["o"](mixed.transpose(1, 2).flatten(2))
        h = norm(x)
        return x + p["down"](F.silu(p["gate"](h)) * p["up"](h))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.shapes.items()})
                for _ in range(sizes.blocks)
            )

        def forward(self, x: Any) -> Any:
            for p in self.blocks:
                x = block(p, x)
            return x.to(torch.float32).square().mean()

    return Decoder()


@contextlib.contextmanager
def live_bytes() -> Iterator[list[int]]:
    """Yield a list that gets, after each PyTorch operation, the bytes of tensors made and alive.

    PyTorch's allocator keeps no count on a CPU. What an operation uses inside is not seen.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    history, alive = [0], {}

    def note(tree: Any, made: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in alive:
                    alive[id(storage)] = storage.nbytes() if made else 0
                    weakref.finalize(storage, alive.pop, id(storage))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            note((args, kwargs), made=False)
            out = func(*args, **(kwargs or {}))
            note(out, made=True)
            history.append(sum(alive.values()))
            return out

    with Watch():
        yield history
