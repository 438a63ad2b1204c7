"""The decoder blocks that the benchmarks measure, in plain JAX, and their sizes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jlora


class Sizes(NamedTuple):
    blocks: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    time: int
    rank: int
    dtype: str

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a block's seven projections."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            **{"q": (self.width, q), "k": (self.width, kv), "v": (self.width, kv)},
            **{"o": (q, self.width), "gate": (self.width, self.mlp)},
            **{"up": (self.width, self.mlp), "down": (self.mlp, self.width)},
        }

    @property
    def input_bytes(self) -> int:
        """Bytes that A's gradient requires: each adapted layer's input, once."""
        inputs = {"qkv": self.width, "o": self.shapes["o"][0], "gate, up": self.width}
        inputs["down"] = self.mlp
        tokens = self.blocks * self.batch * self.time
        return tokens * sum(inputs.values()) * jnp.dtype(self.dtype).itemsize


PRESETS = {
    "smollm2": Sizes(6, 576, 1536, 9, 3, 64, 4, 128, 8, "float32"),
    "llama3-8b-layer": Sizes(1, 4096, 14336, 32, 8, 128, 1, 2048, 16, "bfloat16"),
}


def product(x: jax.Array, w: Any) -> jax.Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def block(p: Any, x: jax.Array, head_dim: int, mul: Callable[..., jax.Array]) -> jax.Array:
    """One decoder block: causal attention with shared key heads, then a SwiGLU MLP."""
    batch, time, _ = x.shape
    h = norm(x)
    q, k, v = (mul(h, p[n]) for n in "qkv")
    k, v = (y.reshape(batch, time, -1, head_dim) for y in (k, v))
    q = q.reshape(batch, time, k.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k).astype(jnp.float32) * head_dim**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((1, 1, 1, time, time), bool)), scores, -1e30)
    mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores).astype(x.dtype), v)
    x = x + mul(mixed.reshape(batch, time, -1), p["o"])
    h = norm(x)
    return x + mul(jax.nn.silu(mul(h, p["gate"])) * mul(h, p["up"]), p["down"])


def loss(
    params: Any,
    x: jax.Array,
    *,
    head_dim: int,
    mul: Callable[..., jax.Array] = product,
    remat: bool = False,
) -> jax.Array:
    """A scalar function of the output; with `remat`, blocks are recomputed in the backward pass."""

    def run(p: Any, x: jax.Array) -> jax.Array:
        return block(p, x, head_dim, mul)

    for p in params:
        x = (jax.checkpoint(run) if remat else run)(p, x)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def weights(sizes: Sizes) -> tuple[Any, jax.Array]:
    """Random base weights, one dict per block, and the input."""
    keys = iter(jax.random.split(jax.random.key(0), sizes.blocks * len(sizes.shapes) + 1))
    base = [
        {
            n: jax.random.normal(next(keys), s, sizes.dtype) * s[0] ** -0.5
            for n, s in sizes.shapes.items()
        }
        for _ in range(sizes.blocks)
    ]
    x = jax.random.normal(next(keys), (sizes.batch, sizes.time, sizes.width), sizes.dtype)
    return base, x


def attached(sizes: Sizes, base: Any) -> Any:
    """Adapt every projection; B is random too, so that an error in a variant is visible."""
    spec = jlora.LoraSpec(sizes.rank, alpha=sizes.rank)
    params = jlora.attach(base, {".*": spec}, key=jax.random.key(1))
    trainable, frozen = jlora.partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    draw = lambda key, leaf: 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
    drawn = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return jlora.combine(jax.tree.unflatten(treedef, drawn), frozen)
