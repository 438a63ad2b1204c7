"""Decoders in plain JAX for `aot.py`: shapes, shardings and a step, without an array.

Layers are stacked, scanned and recomputed in the backward pass; products run in bfloat16. On the
mesh fsdp x tp weights are sharded over both, column-parallel or row-parallel over tp, and the batch
over fsdp. `stream` says how the activations between layers are sharded.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

PARTS = 8  # of the tokens, whose logits are computed one after the other, twice
HEAD = 128  # the width of an attention head, in all of these models
COLUMN, ROW = P("fsdp", "tp"), P("tp", "fsdp")


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a decoder. With `gated` it is a Llama, otherwise a GPT without biases."""

    width: int
    hidden: int
    layers: int
    kv_heads: int
    vocab: int
    targets: str  # a regular expression for the weights that are adapted
    rank: int
    gated: bool = True

    def weights(self) -> dict[str, tuple[tuple[int, int], P]]:
        d, kv = self.width, self.kv_heads * HEAD
        found = {"q": ((d, d), COLUMN), "k": ((d, kv), COLUMN), "v": ((d, kv), COLUMN)}
        found |= {"o": ((d, d), ROW), "up": ((d, self.hidden), COLUMN)}
        found |= {"gate": ((d, self.hidden), COLUMN)} if self.gated else {}
        return found | {"down": ((self.hidden, d), ROW)}


LLAMA_8B = Model(4096, 14336, 32, 8, 128256, ".*", 16)
LLAMA_70B = Model(8192, 28672, 80, 8, 128256, ".*", 16)
GPT_175B = Model(12288, 4 * 12288, 96, 96, 50257 + 47, "[qv]", 4, gated=False)


def base(model: Model, mesh: Mesh, dtype: Any) -> dict[str, Any]:
    """The weights as structs; the vocabulary is padded to a multiple of the devices."""

    def struct(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    d, n = model.width, model.layers
    vocab = -(-model.vocab // mesh.size) * mesh.size
    layers = {k: struct((n, *s), P(None, *spec)) for k, (s, spec) in model.weights().items()}
    layers |= {f"norm_{k}": struct((n, d), P()) for k in (1, 2)}
    ends = {"embed": struct((vocab, d), ROW), "head": struct((d, vocab), COLUMN)}
    return {**ends, "norm": struct((d,), P()), "layers": layers}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


def make_loss(model: Model, mesh: Mesh, stream: P) -> Callable[[Any, Any, Any], jax.Array]:
    """Return the loss of `(params, tokens, shift)`; `shift` is added to the embeddings."""

    def at(x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def dot(x: jax.Array, w: jax.Array, spec: P) -> jax.Array:
        return at(x @ w.astype(x.dtype), spec)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, length, _ = q.shape
        heads, kv = model.width // HEAD, model.kv_heads
        q = q.reshape(batch, length, kv, heads // kv, HEAD)
        k, v = (x.reshape(batch, length, kv, HEAD) for x in (k, v))
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k).astype(jnp.float32) * HEAD**-0.5
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -1e30)
        shares = jax.nn.softmax(scores).astype(q.dtype)
        return jnp.einsum("bkgts,bskd->btkgd", shares, v).reshape(batch, length, -1)

    wide = P("fsdp", None, "tp")

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        h = norm(x, w["norm_1"])
        mixed = attend(*(dot(h, w[name], wide) for name in "qkv"))
        x = x + dot(mixed, w["o"], stream)
        h = norm(x, w["norm_2"])
        up = dot(h, w["up"], wide)
        hidden = jax.nn.silu(dot(h, w["gate"], wide)) * up if model.gated else jax.nn.gelu(up)
        return x + dot(hidden, w["down"], stream), None

    def loss(p: Any, tokens: jax.Array, shift: jax.Array) -> jax.Array:
        x = p["embed"].astype(jnp.bfloat16)[tokens] + shift
        x, _ = jax.lax.scan(jax.checkpoint(layer), at(x, stream), p["layers"])
        parts = [split(a) for a in (at(norm(x, p["norm"]), P("fsdp")), jnp.roll(tokens, -1, 1))]

        @jax.checkpoint
        def part(total: jax.Array, given: list[jax.Array]) -> tuple[jax.Array, None]:
            x, targets = given
            logits = dot(x, p["head"], wide).astype(jnp.float32)
            picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
            return total + jnp.sum(jax.nn.logsumexp(logits, -1) - picked), None

        return jax.lax.scan(part, jnp.float32(0), parts)[0] / tokens.size

    def split(x: jax.Array) -> jax.Array:
        """The tokens of every row in parts, one after the other."""
        rows, length, *rest = x.shape
        return jnp.moveaxis(x.reshape(rows, PARTS, length // PARTS, *rest), 1, 0)

    return loss


def stored(params: Any, form: str, mesh: Mesh) -> Any:
    """Structs of the layers' weights in a format; rows are outputs.

    Over fsdp the rows are split, and not what is in them: what is gathered is then contiguous.
    """
    weights = params["layers"]
    layouts = {name: "io" for name in weights if not name.startswith("norm")}
    made = jax.eval_shape(
        lambda tree: jlora.quantize(tree, {"norm.*": None, ".*": form}, layouts=layouts), weights
    )

    def place(path: Any, x: Any) -> Any:
        if len(path) == 1:  # of a norm
            return weights[path[0].key]
        *_, inputs, outputs = weights[path[0].key].sharding.spec
        rows = (None, (outputs, "fsdp"), None) if inputs == "fsdp" else (None, outputs, inputs)
        names = rows[: x.ndim]
        sizes = [math.prod(mesh.shape[k] for k in jax.tree.leaves(n)) for n in names]
        fits = all(n % k == 0 for n, k in zip(x.shape, sizes, strict=True))
        sharding = NamedSharding(mesh, P(*names) if fits else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return {**params, "layers": jax.tree_util.tree_map_with_path(place, made)}
