"""The Llama family as one Flax module: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The model knows nothing about LoRA. Shapes in comments: B batch, T time, S keys (T, or the cache's
length), C width, H query heads, K key/value heads, G = H / K, D head width, V vocabulary, N asked.

One mask serves packing, padding and the cache: a query attends to the keys of its own segment at or
before its own position. Segment 0 is padding, so a real token never attends to padding on either
side or to empty slots of the cache.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of one model; `weights` reads them from a GGUF file or a config.json."""

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    rope_llama3: tuple[float, float, float, float] | None = None  # factor, low, high, old context
    dtype: str = "float32"  # of the weights and the cache
    remat: bool = False  # compute a layer again in the backward pass instead of keeping its values
    chunk: int = 0  # rows of logits at once, in the loss; 0 for all
    scan: bool = False  # weights and cache have a leading axis of layers, and one program runs all


def frequencies(c: Config) -> jax.Array:
    """theta^(-2i/D), with Llama 3's scaling: low frequencies are reduced, high ones kept."""
    half = c.head_dim // 2
    freq = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(c.rope_theta) / half))  # (D/2,)
    if c.rope_llama3 is None:
        return freq
    factor, low, high, context = c.rope_llama3
    turns = context / (2 * math.pi) * freq  # rotations of a pair within the old context
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return freq * (keep + (1.0 - keep) / factor)


def rope(x: jax.Array, positions: jax.Array, freq: jax.Array) -> jax.Array:
    """Rotate each pair (i, i + D/2) of a head by position * freq[i], as Hugging Face does."""
    half = x.shape[-1] // 2
    angle = positions.astype(jnp.float32)[:, :, None] * freq[None, None, :]  # (B, T, D/2)
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]  # (B, T, 1, D/2)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)  # (B, T, H, D/2)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)  # (B, T, H, D)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None, slot: Any
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        (B, T, _), K, G, D = x.shape, c.kv_heads, c.heads // c.kv_heads, c.head_dim
        q = nn.Dense(c.heads * D, use_bias=False, name="q_proj")(x)  # (B, T, H*D)
        k = nn.Dense(K * D, use_bias=False, name="k_proj")(x)  # (B, T, K*D)
        v = nn.Dense(K * D, use_bias=False, name="v_proj")(x).reshape(B, T, K, D)
        freq = frequencies(c)
        q = rope(q.reshape(B, T, c.heads, D), positions, freq)  # (B, T, H, D)
        k = rope(k.reshape(B, T, K, D), positions, freq)  # (B, T, K, D)
        if cache is not None:
            k = lax.dynamic_update_slice(cache["k"], k, (0, slot, 0, 0))  # (B, S, K, D)
            v = lax.dynamic_update_slice(cache["v"], v, (0, slot, 0, 0))
            cache = {"k": k, "v": v}
        # Query heads share a key head in runs of G: head h = k * G + g.
        score = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, G, D), k) * D**-0.5
        score = jnp.where(mask[:, None, None], score.astype(jnp.float32), -1e30)  # (B, K, G, T, S)
        prob = jax.nn.softmax(score, axis=-1).astype(x.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", prob, v).reshape(B, T, c.heads * D)
        return nn.Dense(c.width, use_bias=False, name="o_proj")(out), cache  # (B, T, C)


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = nn.Dense(c.hidden, use_bias=False, name="gate_proj")(x)  # (B, T, 4C or so)
        up = nn.Dense(c.hidden, use_bias=False, name="up_proj")(x)
        return nn.Dense(c.width, use_bias=False, name="down_proj")(nn.silu(gate) * up)  # (B, T, C)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None, slot: Any
    ) -> tuple[jax.Array, Cache | None]:
        eps = self.config.norm_eps
        h = nn.RMSNorm(epsilon=eps, name="attn_norm")(x)
        h, cache = Attention(self.config, name="attn")(h, positions, mask, cache, slot)
        x = x + h
        return x + MLP(self.config, name="mlp")(nn.RMSNorm(epsilon=eps, name="mlp_norm")(x)), cache


class Llama(nn.Module):
    """tokens (B, T) -> logits (B, T, V); see `__call__` for packing, the cache and `at`."""

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        at: jax.Array | None = None,
        target: jax.Array | None = None,
    ) -> Any:
        """Run the decoder.

        Args:
            tokens: (B, T) token ids.
            positions: (B, T), counted within each segment; 0, 1, 2, ... if None.
            segments: (B, T), 0 for padding; a token attends to its own segment. All 1 if None.
            cache: from `init_cache` or an earlier call.
            at: (N,) indices into the flattened (B*T) tokens; the head, by far the largest matmul,
                is then computed for these only.
            target: (N,) the tokens that follow those at `at`, for their loss in place of logits;
                `config.chunk` rows of logits exist at a time.

        Returns:
            Logits in float32, (B, T, V), or (N, V) with `at`; with a cache, (logits, cache). With
            `target`, losses, (N,).
        """
        c, (B, T) = self.config, tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        if segments is None:
            segments = jnp.ones((B, T), jnp.int32)
        slot, key_positions, key_segments = 0, positions, segments
        if cache is not None:
            slot = cache["slot"]
            key_positions = lax.dynamic_update_slice(cache["positions"], positions, (0, slot))
            key_segments = lax.dynamic_update_slice(cache["segments"], segments, (0, slot))
        mask = segments[:, :, None] == key_segments[:, None, :]  # (B, T, S)
        mask &= key_positions[:, None, :] <= positions[:, :, None]

        embed = nn.Embed(c.vocab, c.width, name="embed")
        x: jax.Array = embed(tokens)  # (B, T, C)
        kv = None if cache is None else cache["layers"]
        x, layers = run_layers(c, x, positions, mask, kv, slot)
        if at is not None:
            x = x.reshape(B * T, c.width)[at]  # (N, C)
        x = nn.RMSNorm(epsilon=c.norm_eps, name="final_norm")(x)
        if target is not None:
            variables = self.variables["params"]
            kernel = embed.embedding.T if c.tied else variables["lm_head"]["kernel"]  # (C, V)
            return chunked_loss(x, kernel, target, c.chunk)
        head = embed.attend if c.tied else nn.Dense(c.vocab, use_bias=False, name="lm_head")
        logits = head(x).astype(jnp.float32)  # (B, T, V) or (N, V)
        if cache is None:
            return logits
        return logits, {
            "layers": layers,
            "positions": key_positions,
            "segments": key_segments,
            "slot": slot + T,
        }


def run_layers(
    c: Config, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None, slot: Any
) -> tuple[jax.Array, Cache | None]:
    """All layers, (B, T, C) -> (B, T, C), and their caches."""
    block = nn.remat(Block, prevent_cse=not c.scan) if c.remat and cache is None else Block
    if c.scan:
        axes = (nn.broadcast, nn.broadcast, 0, nn.broadcast)  # of positions, mask, cache, slot
        split: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        block = nn.scan(block, in_axes=axes, length=c.layers, **split)
        return block(c, name="layers")(x, positions, mask, cache, slot)
    layers: Cache = {}
    for i in range(c.layers):
        name = f"layers_{i}"
        kv = None if cache is None else cache[name]
        x, layers[name] = block(c, name=name)(x, positions, mask, kv, slot)
    return x, layers


@jax.custom_vjp
def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of each row: (N, V) and (N,) -> (N,).

    With a large vocabulary, the logits are by far the largest array of a step. JAX's autodiff would
    also keep their exponentials. Here the gradient is one expression of the logits, the target and
    the row's normalizer, and XLA writes it in place of the logits.
    """
    return _cross_entropy(logits, target)[0]


def _cross_entropy(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, Any]:
    total = jax.nn.logsumexp(logits, axis=1)  # (N,)
    picked = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]  # (N,)
    return total - picked, (logits, target, total)


def _cross_entropy_gradient(kept: Any, g: jax.Array) -> tuple[jax.Array, None]:
    logits, target, total = kept
    prob = jnp.exp(logits - total[:, None])  # (N, V), fused away
    vocab = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]  # (1, V)
    return jnp.where(vocab == target[:, None], prob - 1.0, prob) * g[:, None], None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def chunked_loss(x: jax.Array, kernel: jax.Array, target: jax.Array, chunk: int) -> jax.Array:
    """cross_entropy(x @ kernel, target): (N, C), (C, V) and (N,) -> (N,).

    Only `chunk` rows of logits exist at a time; the backward pass computes them again.
    """
    N, C = x.shape
    fill = -N % chunk
    rows = jnp.pad(x, ((0, fill), (0, 0))).reshape(-1, chunk, C)
    targets = jnp.pad(target, (0, fill)).reshape(-1, chunk)

    @jax.checkpoint
    def loss(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return cross_entropy((part[0] @ kernel).astype(jnp.float32), part[1])

    return lax.map(loss, (rows, targets)).reshape(-1)[:N]


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots; a slot is padding until it is written."""
    c, kv = config, (batch, length, config.kv_heads, config.head_dim)
    one = lambda *shape: {name: jnp.zeros(shape, c.dtype) for name in ("k", "v")}
    every = {f"layers_{i}": one(*kv) for i in range(c.layers)}
    return {
        "layers": one(c.layers, *kv) if c.scan else every,
        "positions": jnp.zeros((batch, length), jnp.int32),
        "segments": jnp.zeros((batch, length), jnp.int32),
        "slot": jnp.zeros((), jnp.int32),
    }


def generate(
    apply: Callable[..., Any],
    config: Config,
    params: Any,
    tokens: jax.Array,
    segments: jax.Array,
    *,
    steps: int,
    stop: int,
) -> jax.Array:
    """Continue each prompt greedily by up to `steps` tokens, with a cache. Pure: wrap it in jit.

    Args:
        apply: `apply(params, tokens, positions, segments, cache, at)`, plain or adapted by jlora.
        config: The model's sizes.
        params: What `apply` takes.
        tokens: (B, T) prompts, padded on the left or on the right.
        segments: (B, T), 1 for a token of the prompt and 0 for padding.
        steps: How many tokens to add at most.
        stop: The token that ends a row; the rest of the row is filled with it.

    Returns:
        (B, steps) token ids.
    """
    B, T = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)  # (B, T)
    last = T - 1 - jnp.argmax(segments[:, ::-1], axis=1)  # (B,) the last real token of each row
    at = jnp.arange(B) * T + last
    cache = init_cache(config, B, T + steps)
    logits, cache = apply(params, tokens, positions, segments, cache, at)  # (B, V)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (B,)
    out = jnp.full((B, steps), stop, jnp.int32).at[:, 0].set(first)
    length, one = jnp.sum(segments, axis=1, keepdims=True), jnp.ones((B, 1), jnp.int32)  # (B, 1)

    def unfinished(state: Any) -> jax.Array:
        i, token, _, _ = state
        return (i < steps) & jnp.any(token != stop)

    def advance(state: Any) -> Any:
        i, token, out, cache = state
        logits, cache = apply(params, token[:, None], length + i - 1, one, cache, jnp.arange(B))
        new = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # (B,)
        new = jnp.where(token == stop, stop, new)
        return i + 1, new, out.at[:, i].set(new), cache

    return lax.while_loop(unfinished, advance, (jnp.int32(1), first, out, cache))[2]
