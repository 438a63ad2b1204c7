"""The Llama family and its relatives as one Flax module, which a frozen `Config` describes.

RMSNorm, rotary positions, grouped-query attention and a gated MLP; by configuration also biases,
norms of queries and keys, sliding windows, soft-caps, fused projections and the norms of Gemma.

The model knows nothing about LoRA. Shapes in comments: B batch, T time, S keys (T, or the cache's
length), C width, H query heads, K key/value heads, G = H / K, D head width, V vocabulary, N asked.

One mask serves packing, padding and the cache: a query attends to the keys of its own segment at or
before its own position. Segment 0 is padding, so a real token never attends to padding on either
side or to empty slots of the cache.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from rope import BY_LENGTH, Scaling, frequencies, rotate

Cache = dict[str, Any]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}


class Kind(NamedTuple):
    """What distinguishes the attention of one layer from that of others."""

    window: int | None  # how many tokens it sees, its own among them
    theta: float | None  # of its rotary positions, if it has any
    scaling: Scaling | None


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes and options of one model; `weights` reads them from its files."""

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
    rope_scaling: Scaling | None = None
    rope_width: int | None = None  # how much of a head is rotated; None for all
    local_theta: float | None = None  # of the layers with a window, where it differs; not scaled
    window: int | None = None
    windowed: tuple[bool, ...] = (True,)  # which layers have the window; repeats
    rotated: tuple[bool, ...] = (True,)  # which layers have rotary positions; repeats
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False  # q, k and v are one kernel, and so are gate and up
    qk_norm: bool = False
    activation: str = "silu"
    gemma: bool = False  # norms multiply by 1 + scale, embeddings by the root of the width
    post_norms: bool = False  # what attention and MLP add is normalized as well
    query_scale: float | None = None  # of the scores; None for the root of the head width
    score_cap: float | None = None  # soft: cap * tanh(score / cap)
    logit_cap: float | None = None
    dtype: str = "float32"  # of the weights and the cache
    remat: bool = False  # compute a layer again in the backward pass instead of keeping its values
    chunk: int = 0  # tokens of the vocabulary at once, in the loss; 0 for all
    scan: bool = False  # weights and cache have a leading axis of layers, and one program runs all
    rows: NamedSharding | None = None  # of activations and batches, on a mesh of devices

    @property
    def kinds(self) -> list[Kind]:
        """The attention of each layer."""
        found = []
        for i in range(self.layers):
            window = self.window if self.windowed[i % len(self.windowed)] else None
            local = window is not None and self.local_theta is not None
            theta = self.local_theta if local else self.rope_theta
            if not self.rotated[i % len(self.rotated)]:
                theta = None
            scaled = theta is not None and not local
            found.append(Kind(window, theta, self.rope_scaling if scaled else None))
        return found

    @property
    def pairs(self) -> int:
        """How many pairs of a head are rotated."""
        return (self.rope_width or self.head_dim) // 2


class Turn(NamedTuple):
    """Frequencies of the rotary positions, and what cosine and sine are multiplied by."""

    freq: jax.Array  # (D/2,), or (B, T, D/2)
    amplitude: Any


class Seen(NamedTuple):
    """What the attention of a layer sees, apart from the layer's input and cache."""

    positions: jax.Array  # (B, T)
    mask: jax.Array  # (B, T, S)
    slot: Any  # where the cache is written
    length: jax.Array | None  # (B, T, 1) of each token's text, if frequencies depend on it
    turn: Turn | None = None  # if the layers of a scan differ


def turn_of(c: Config, kind: Kind, length: jax.Array | None) -> Turn | None:
    """The rotary positions of a kind of layers."""
    if kind.theta is None:
        return None
    freq = frequencies(kind.theta, c.pairs, kind.scaling, length)
    return Turn(freq, 1.0 if kind.scaling is None else kind.scaling.amplitude)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Bound x by the cap, smoothly."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def split_rows(c: Config, x: jax.Array) -> jax.Array:
    """Split the leading axis of an array over the mesh, if there is one that divides it."""
    if c.rows is None or x.shape[0] % math.prod(c.rows.mesh.shape[n] for n in c.rows.spec[0]):
        return x
    return lax.with_sharding_constraint(x, c.rows)


class RMSNorm(nn.Module):
    """Gemma's: in float32, times 1 + scale."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(scale.astype(jnp.float32), [*range(x.ndim - 1)])
        return (y * (1.0 + scale)).astype(x.dtype)


def norm(c: Config, name: str) -> Callable[[jax.Array], jax.Array]:
    """A norm over the last axis."""
    return (RMSNorm if c.gemma else nn.RMSNorm)(epsilon=c.norm_eps, name=name)


class Attention(nn.Module):
    config: Config
    kind: Kind

    @nn.compact
    def __call__(
        self, x: jax.Array, seen: Seen, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        (B, T, _), K, G, D = x.shape, c.kv_heads, c.heads // c.kv_heads, c.head_dim
        dense = lambda size, name: nn.Dense(size, use_bias=c.qkv_bias, name=name)
        if c.fused:
            every = dense((c.heads + 2 * K) * D, "qkv_proj")(x)  # (B, T, H*D + 2*K*D)
            q, k, v = jnp.split(every, [c.heads * D, (c.heads + K) * D], axis=-1)
            v = v.reshape(B, T, K, D)
        else:
            q = dense(c.heads * D, "q_proj")(x)  # (B, T, H*D)
            k = dense(K * D, "k_proj")(x)  # (B, T, K*D)
            v = dense(K * D, "v_proj")(x).reshape(B, T, K, D)
        turn = seen.turn or turn_of(c, self.kind, seen.length)

        def placed(x: jax.Array, name: str) -> jax.Array:
            x = norm(c, name)(x) if c.qk_norm else x
            return x if turn is None else rotate(x, seen.positions, *turn)

        q = placed(q.reshape(B, T, c.heads, D), "q_norm")  # (B, T, H, D)
        k = placed(k.reshape(B, T, K, D), "k_norm")  # (B, T, K, D)
        if cache is not None:
            k = lax.dynamic_update_slice(cache["k"], k, (0, seen.slot, 0, 0))  # (B, S, K, D)
            v = lax.dynamic_update_slice(cache["v"], v, (0, seen.slot, 0, 0))
            cache = {"k": k, "v": v}
        # Query heads share a key head in runs of G: head h = k * G + g.
        scale = D**-0.5 if c.query_scale is None else c.query_scale
        score = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, G, D), k) * scale
        score = soft_cap(score, c.score_cap).astype(jnp.float32)  # (B, K, G, T, S)
        score = jnp.where(seen.mask[:, None, None], score, -1e30)
        prob = jax.nn.softmax(score, axis=-1).astype(x.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", prob, v).reshape(B, T, c.heads * D)
        return nn.Dense(c.width, use_bias=c.out_bias, name="o_proj")(out), cache  # (B, T, C)


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = lambda size, name: nn.Dense(size, use_bias=c.mlp_bias, name=name)
        if c.fused:
            gate, up = jnp.split(dense(2 * c.hidden, "gate_up_proj")(x), 2, axis=-1)
        else:
            gate = dense(c.hidden, "gate_proj")(x)  # (B, T, 4C or so)
            up = dense(c.hidden, "up_proj")(x)
        return dense(c.width, "down_proj")(ACTIVATIONS[c.activation](gate) * up)  # (B, T, C)


class Block(nn.Module):
    config: Config
    kind: Kind

    @nn.compact
    def __call__(
        self, x: jax.Array, seen: Seen, cache: Cache | None, which: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        if which is not None:  # of the kinds of layers, which are stacked in a scan
            mask, turn = jax.tree.map(lambda a: a[which], (seen.mask, seen.turn))
            seen = seen._replace(mask=mask, turn=turn)
        x = split_rows(c, x)
        h = norm(c, "attn_norm")(x)
        h, cache = Attention(c, self.kind, name="attn")(h, seen, cache)
        x = x + (norm(c, "attn_post_norm")(h) if c.post_norms else h)
        if not c.post_norms:
            return x + MLP(c, name="mlp")(norm(c, "mlp_norm")(x)), cache
        h = MLP(c, name="mlp")(norm(c, "mlp_pre_norm")(x))
        return x + norm(c, "mlp_post_norm")(h), cache


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
                logits of `config.chunk` tokens of the vocabulary exist at a time.

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
        length = None
        if isinstance(c.rope_scaling, BY_LENGTH):
            length = lengths(mask, key_positions, cache is not None)
        ahead = key_positions[:, None, :] - positions[:, :, None] if c.window else None
        mask = mask & (key_positions[:, None, :] <= positions[:, :, None])

        embed = nn.Embed(c.vocab, c.width, name="embed")
        x: jax.Array = embed(tokens)  # (B, T, C)
        x = x * jnp.asarray(c.width**0.5, x.dtype) if c.gemma else x
        kv = None if cache is None else cache["layers"]
        x, layers = run_layers(c, x, Seen(positions, mask, slot, length), ahead, kv)
        if at is not None:
            x = x.reshape(B * T, c.width)[at]  # (N, C)
        x = norm(c, "final_norm")(x)
        if target is not None:
            variables = self.variables["params"]
            kernel = embed.embedding.T if c.tied else variables["lm_head"]["kernel"]  # (C, V)
            return chunked_loss(x, kernel, target, c.chunk, c.logit_cap)
        head = embed.attend if c.tied else nn.Dense(c.vocab, use_bias=False, name="lm_head")
        logits = soft_cap(head(x).astype(jnp.float32), c.logit_cap)  # (B, T, V) or (N, V)
        if cache is None:
            return logits
        return logits, {
            "layers": layers,
            "positions": key_positions,
            "segments": key_segments,
            "slot": slot + T,
        }


def lengths(same: jax.Array, key_positions: jax.Array, cached: bool) -> jax.Array:
    """How long the text of each token is, (B, T, 1), from the mask of equal segments, (B, T, S).

    With a cache, how long it may become: keys that are stored have been rotated already.
    """
    if cached:
        return jnp.full((*same.shape[:2], 1), same.shape[2], jnp.int32)
    last = jnp.where(same, key_positions[:, None, :], 0)  # (B, T, S)
    return jnp.max(last, axis=-1, keepdims=True) + 1


def run_layers(
    c: Config, x: jax.Array, seen: Seen, ahead: jax.Array | None, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """All layers, (B, T, C) -> (B, T, C), and their caches.

    `ahead` is how far each key is ahead of the query, (B, T, S), if some layers have a window.
    """
    block = nn.remat(Block, prevent_cse=not c.scan) if c.remat and cache is None else Block
    several = list(dict.fromkeys(c.kinds))
    masks = [
        seen.mask if kind.window is None or ahead is None else seen.mask & (ahead > -kind.window)
        for kind in several
    ]
    which = [several.index(kind) for kind in c.kinds]
    if c.scan:
        split: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        block = nn.scan(block, in_axes=(nn.broadcast, 0, 0), length=c.layers, **split)
        seen, index = seen._replace(mask=masks[0]), None
        if len(several) > 1:
            turn = stacked_turns(c, several, seen.length)
            seen, index = seen._replace(mask=jnp.stack(masks), turn=turn), jnp.asarray(which)
        return block(c, several[0], name="layers")(x, seen, cache, index)
    layers: Cache = {}
    for i, n in enumerate(which):
        name = f"layers_{i}"
        kv = None if cache is None else cache[name]
        layer = block(c, several[n], name=name)
        x, layers[name] = layer(x, seen._replace(mask=masks[n]), kv)
    return x, layers


def stacked_turns(c: Config, kinds: list[Kind], length: jax.Array | None) -> Turn:
    """The rotary positions of several kinds; a layer without any rotates by zero."""
    none = Turn(jnp.zeros(c.pairs, jnp.float32), 1.0)
    turns = [turn_of(c, kind, length) or none for kind in kinds]
    shape = jnp.broadcast_shapes(*(turn.freq.shape for turn in turns))
    freq = [jnp.broadcast_to(turn.freq, shape) for turn in turns]
    return Turn(jnp.stack(freq), jnp.asarray([turn.amplitude for turn in turns], jnp.float32))


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


def chunked_loss(
    x: jax.Array, kernel: jax.Array, target: jax.Array, chunk: int, cap: float | None = None
) -> jax.Array:
    """cross_entropy(soft_cap(x @ kernel), target): (N, C), (C, V) and (N,) -> (N,).

    Logits of `chunk` tokens of the vocabulary exist at a time, (N, chunk), and the sum of their
    exponentials goes on from part to part; the backward pass computes them again.
    """
    N, V = x.shape[0], kernel.shape[1]
    chunk = min(chunk, V)

    def add(sums: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[Any, None]:
        start = jnp.minimum(first, V - chunk)  # the last part begins within the one before it
        part = lax.dynamic_slice_in_dim(kernel, start, chunk, axis=1)  # (C, chunk)
        logits = soft_cap((x @ part).astype(jnp.float32), cap)  # (N, chunk)
        token = start + jnp.arange(chunk, dtype=jnp.int32)[None]  # (1, chunk)
        new = jax.nn.logsumexp(jnp.where(token < first, -jnp.inf, logits), axis=1)  # (N,)
        hit = (token == target[:, None]) & (token >= first)
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=1)  # (N,)
        return (jnp.logaddexp(sums[0], new), sums[1] + picked), None

    zero = jnp.full(N, -jnp.inf, jnp.float32), jnp.zeros(N, jnp.float32)
    parts = jnp.arange(0, V, chunk, dtype=jnp.int32)
    total, picked = lax.scan(jax.checkpoint(add, prevent_cse=False), zero, parts)[0]
    return total - picked


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
