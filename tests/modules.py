"""Random modules by the names of real models, and how files and modules are compared."""

from zlib import crc32

import jax.numpy as jnp
import numpy as np
import safetensors

from jlora import _tensor_file
from jlora._modules import Module

# Of config.json, what the bridges ask.
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def module(name, out=6, ins=4, rank=2, alpha=3.0, dtype=np.float32, dora=False, window=None):
    """A module with random A and B; `window` makes a convolution."""
    rng = np.random.default_rng(crc32(name.encode()))
    drawn = lambda *shape: rng.normal(size=shape).astype(dtype)
    m = drawn(out) if dora else None
    if window is None:
        return Module(name, drawn(rank, ins), drawn(out, rank), alpha / rank, magnitude=m)
    a, b = drawn(rank, ins, window, window), drawn(out, rank, 1, 1)
    return Module(name, a, b, alpha / rank, "conv", m)


def equal(ours, theirs):
    """Whether modules are the same, bit for bit, in any order."""
    ours, theirs = ({x.name: x for x in modules} for modules in (ours, theirs))
    assert list(sorted(ours)) == list(sorted(theirs))
    for name, x in ours.items():
        y = theirs[name]
        assert (x.kind, x.scaling) == (y.kind, y.scaling), name
        for part in ("a", "b", "magnitude"):
            p, q = getattr(x, part), getattr(y, part)
            assert (p is None) == (q is None), name
            if p is not None:
                assert p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes()
    return True


def tensors_of(file):
    """Every tensor of a safetensors file as dtype, shape and bytes."""
    return {
        name: (x["dtype"], tuple(x["shape"]), bytes(x["data"]))
        for name, x in safetensors.deserialize(file.read_bytes())
    }


def contents(file):
    """Its tensors and metadata; the order of metadata is the writer's own."""
    return tensors_of(file), _tensor_file.read_all(file, "read")[1]
