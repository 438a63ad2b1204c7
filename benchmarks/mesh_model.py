"""A small language model with all the weights of a Llama, whose products say how they are sharded.

The seven weights of a layer are column-parallel or row-parallel over "tp" and sharded over "fsdp",
along which the batch is split. On a mesh every product has its output sharding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec

D, HEADS, HEAD, WIDE, VOCAB, LAYERS, BATCH, LENGTH = 16, 4, 4, 24, 32, 4, 8, 4
WEIGHTS = {
    "q": ((D, HEADS, HEAD), P("fsdp", "tp"), "ioo"),
    "k": ((D, HEADS, HEAD), P("fsdp", "tp"), "ioo"),
    "v": ((D, HEADS, HEAD), P("fsdp", "tp"), "ioo"),
    "o": ((HEADS, HEAD, D), P("tp", None, "fsdp"), "iio"),
    "gate": ((D, WIDE), P("fsdp", "tp"), "io"),
    "up": ((D, WIDE), P("fsdp", "tp"), "io"),
    "down": ((WIDE, D), P("tp", "fsdp"), "io"),
}
ENDS = {"embed": ((VOCAB, D), P("tp", "fsdp")), "head": ((D, VOCAB), P("fsdp", "tp"))}
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH))
STREAM = P("fsdp", None, None)


def mesh(shape, kind):
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(kind,) * 2)


def base(scanned):
    """The weights, of which those of the layers are stacked if they are scanned."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32) / 4)

    layers = {name: draw(LAYERS, *shape) for name, (shape, *_) in WEIGHTS.items()}
    ends = {name: draw(*shape) for name, (shape, _) in ENDS.items()}
    if scanned:
        return {**ends, "layers": layers}
    return ends | {f"layer_{n}": {k: x[n] for k, x in layers.items()} for n in range(LAYERS)}


def specs(scanned):
    ends = {name: spec for name, (_, spec) in ENDS.items()}
    layer = {name: spec for name, (_, spec, _) in WEIGHTS.items()}
    if scanned:
        return {**ends, "layers": {name: P(None, *spec) for name, spec in layer.items()}}
    return ends | {f"layer_{n}": layer for n in range(LAYERS)}


def rules(rank=2, **how):
    layer = {
        rf".*/{name}": LoraSpec(rank, 2, layout=layout, **how)
        for name, (*_, layout) in WEIGHTS.items()
    }
    return {**layer, "embed|head": LoraSpec(rank, 2, layout="io", **how)}


def params(scanned, **how):
    """An adapted model on one device, with B different from zero."""
    made = jlora.attach(base(scanned), rules(**how), key=jax.random.key(0))
    trained, frozen = jlora.partition(made)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(trained)))
    leaves, structure = jax.tree.flatten(trained)
    moved = [x + jax.random.normal(k, x.shape) / 8 for x, k in zip(leaves, keys, strict=True)]
    return jlora.combine(structure.unflatten(moved), frozen)


def placed(tree, where, scanned, replicate):
    """The same model on a mesh."""
    at = jax.tree.map(
        lambda spec: NamedSharding(where, spec), jlora.specs(tree, specs(scanned), replicate)
    )
    return jax.device_put(tree, at)


def forward(p, tokens, kind=None, shift=None):
    """Logits; `kind` is the type of the mesh's axes, and `shift` is added to the embeddings."""

    def placed(y, spec):
        return y if kind is None else jax.lax.with_sharding_constraint(y, spec)

    def dot(formula, x, w, out):
        if kind == AxisType.Explicit:
            return jnp.einsum(formula, x, w, out_sharding=out)
        return placed(jnp.einsum(formula, x, w), out)

    def layer(x, w):
        heads = P("fsdp", None, "tp", None)
        q, k, v = (dot("btd,dhk->bthk", x, w[name], heads) for name in "qkv")
        scores = jax.nn.softmax(dot("bthk,bshk->bhts", q, k, P("fsdp", "tp", None, None)))
        mixed = dot("bhts,bshk->bthk", scores, v, heads)
        x = x + dot("bthk,hkd->btd", mixed, w["o"], STREAM)
        wide = P("fsdp", None, "tp")
        gate, up = (dot("btd,df->btf", x, w[name], wide) for name in ("gate", "up"))
        return x + dot("btf,fd->btd", jax.nn.silu(gate) * up, w["down"], STREAM)

    at = p["embed"].at[tokens]
    x = at.get(out_sharding=STREAM) if kind == AxisType.Explicit else placed(at.get(), STREAM)
    x = x if shift is None else x + shift
    if "layers" in p:
        step = jax.checkpoint(lambda x, w: (layer(x, w), None))
        x = jax.lax.scan(step, x, p["layers"])[0]
    else:
        for n in range(LAYERS):
            x = layer(x, p[f"layer_{n}"])
    return dot("btd,dv->btv", x, p["head"], P("fsdp", None, "tp"))


def loss(p, tokens, kind=None, shift=None):
    run = functools.partial(forward, kind=kind, shift=shift)
    apply = jlora.lora(run, fallback="error")
    logits = apply(p, tokens)
    return jnp.mean(jnp.square(jax.nn.log_softmax(logits))), logits
