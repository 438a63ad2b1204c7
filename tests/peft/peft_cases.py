"""Adapters for the tests of `jlora.peft`: one of every shape, and a small one as files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from helpers import bits

import jlora
from jlora import LoraSpec, peft

KEY = jax.random.key(0)


def drawn(key, weight, rank, scaling=1.0, dtype=jnp.float32):
    """An initializer that makes both A and B other than zero, and compiles fast."""
    d_in, d_out = weight.shape
    seed = weight.astype(jnp.float32).sum()
    a = jnp.sin(1.7 * jnp.arange(d_in * rank, dtype=jnp.float32) + seed)
    b = jnp.cos(0.9 * jnp.arange(rank * d_out, dtype=jnp.float32) + seed)
    return a.reshape(d_in, rank).astype(dtype), b.reshape(rank, d_out).astype(dtype)


def spec(rank=2, alpha=5, **more):
    return LoraSpec(rank, alpha, init=drawn, **more)


@functools.cache
def model():
    """A weight of every shape that a name can unroll."""
    rng = np.random.default_rng(0)
    w = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    return {
        "dense": {"kernel": w(5, 7), "bias": w(7)},
        "torch": w(7, 5).astype(jnp.bfloat16),
        "query": {"kernel": w(6, 2, 3), "bias": w(2, 3)},
        "out": {"kernel": w(2, 3, 6)},
        "gemma": w(2, 6, 3),
        "conv": {"kernel": w(3, 3, 4, 8), "oihw": w(8, 4, 3, 3)},
        "embed": {"embedding": w(11, 6)},
        "layers": {"kernel": w(3, 5, 4)},
        "experts": {"up": w(4, 5, 6), "down": w(4, 6, 5)},
        "deep": w(3, 4, 5, 6),
        "norm": {"scale": w(6)},
        "head": {"kernel": w(6, 11)},
    }


NAMES = {
    "dense/kernel": "m.dense.weight",
    "dense/bias": "m.dense.bias",
    "torch": "m.torch.weight",
    "query/kernel": "m.q_proj.weight",
    "query/bias": "m.q_proj.bias",
    "out/kernel": "m.o_proj.weight",
    "gemma": "m.k_proj.weight",
    "conv/kernel": "m.conv.weight",
    "conv/oihw": "m.oihw.weight",
    "embed/embedding": "m.embed.weight",
    "layers/kernel": "m.layers.{}.fc.weight",
    "experts/up": "m.experts.up",
    "experts/down": "m.experts.down",
    "deep": "m.blocks.{}.experts.w",
    "norm/scale": "m.norm.weight",
    "head/kernel": "m.head.weight",
}
LAYOUTS = {
    "query/kernel": "ioo",
    "out/kernel": "iio",
    "gemma": "oio",
    "torch": "oi",
    "conv/oihw": "oiii",
}
RULES = {
    "dense/kernel": spec(3),
    "torch": spec(dtype=jnp.bfloat16, layout="oi"),
    "query/kernel": spec(dtype=jnp.float16),
    "(layers|experts|deep).*": spec(alpha=1, layout="io"),
    "(dense|query)/bias": "full",
    "norm/scale|head/kernel": "full",
    ".*": spec(),
}
ORDER = {"declared": ["experts.up", "experts.down"]}


@functools.cache
def adapted():
    return jlora.attach(model(), RULES, key=KEY, layouts=LAYOUTS)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), x in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert bits(g) == bits(x), path


def keys(folder):
    return safetensors.deserialize((folder / "adapter_model.safetensors").read_bytes())


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


SMALL_NAMES = {
    "q/kernel": "m.q_proj.weight",
    "k/kernel": "m.k_proj.weight",
    "q/bias": "m.q_proj.bias",
}
PREFIX = "base_model.model."


def base():
    return {
        "q": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)},
        "k": {"kernel": jnp.ones((5, 3))},
    }


def tensors(**changes):
    found = {
        "m.q_proj.lora_A.weight": np.ones((2, 5), np.float32),
        "m.q_proj.lora_B.weight": np.full((4, 2), 2, np.float32),
        "m.k_proj.lora_A.weight": np.full((2, 5), 3, np.float32),
        "m.k_proj.lora_B.weight": np.full((3, 2), 4, np.float32),
    }
    found |= {k.replace("__", "."): x for k, x in changes.items()}
    return {PREFIX + k: x for k, x in found.items() if x is not None}


def entries(**changes):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **changes}


def write(folder, tensors, entries):
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "adapter_config.json").write_text(text)
    return folder


def load(folder, names=SMALL_NAMES, **kw):
    return peft.load(folder, base(), names=names, **kw)


def zeros(*shape):
    return np.zeros(shape, np.float32)
