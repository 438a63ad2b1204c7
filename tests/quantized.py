"""Weights in every storage format, and a program that uses weights of every layout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora
from jlora import LoraSpec, quant
from jlora.quant._formats import FORMATS
from jlora.quant.ggml import fields_of

NAMES = tuple(FORMATS)
LAYOUTS = {
    "embedding": "oi",
    "up/kernel": "io",
    "torch/weight": "oi",
    "q/kernel": "ioo",
    "o/kernel": "iio",
    "conv/kernel": "iiio",
    "layers/kernel": "io",
}
SHAPES = {
    "embedding": (24, 256),
    "up/kernel": (256, 8),
    "torch/weight": (12, 256),
    "q/kernel": (256, 2, 4),
    "o/kernel": (2, 128, 8),
    "conv/kernel": (1, 4, 64, 6),
    "layers/kernel": (3, 256, 256),
}
TOKENS = jnp.array([[1, 5, 23, 0, 7], [0, 3, 3, 2, 1]])
RULES = {
    "embedding|q/kernel|conv/kernel": LoraSpec(2),
    "layers/kernel": LoraSpec(2, dora=True),
    "torch/weight": LoraSpec(2, dora=True),
}


def model(p: Any, tokens: Any) -> Any:
    """A lookup, a scan under remat, attention kernels, a convolution and a tied head."""
    x = p["embedding"][tokens]  # (b, t, 256)
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    x = lax.scan(layer, x, p["layers"]["kernel"])[0]
    heads = jnp.einsum("bti,ihd->bthd", x, p["q"]["kernel"])
    out = jnp.einsum("bthd,hdo->bto", x.reshape(*x.shape[:2], 2, 128), p["o"]["kernel"])
    image = x.reshape(2, 5, 4, 64)
    numbers = ("NHWC", "HWIO", "NHWC")
    seen = lax.conv_general_dilated(
        image, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
    )
    logits = x @ p["embedding"].T
    return x @ p["up"]["kernel"] + out, x @ p["torch"]["weight"].T, heads, seen, logits


def dense() -> Any:
    """The weights as arrays."""
    rng = np.random.default_rng(3)
    tree: Any = {}
    for path, shape in SHAPES.items():
        *parent, name = path.split("/")
        values = jnp.asarray((rng.normal(size=shape) / 16).astype(np.float32))
        (tree.setdefault(parent[0], {}) if parent else tree)[name] = values
    return tree


def stored(name: str) -> Any:
    """The weights in a format; one that is only read gets random blocks."""
    format = FORMATS[name]
    if getattr(format, "write", format) is not None:
        return jlora.quantize(dense(), {".*": name}, layouts=LAYOUTS)
    like = jlora.quantize(dense(), {".*": "q8_0"}, layouts=LAYOUTS)
    return jax.tree.map(lambda x: blocks(format, x), like, is_leaf=is_quant)


def one(name: str) -> quant.QuantArray:
    """One weight in a format, (12, 256) with the layout "oi"."""
    format = FORMATS[name]
    written = getattr(format, "write", format) is not None
    w = dense()["torch"]["weight"]
    made = jlora.quantize({"w": w}, {"w": name if written else "q8_0"}, layouts={"w": "oi"})["w"]
    return made if written else blocks(format, made)


def blocks(format: Any, like: quant.QuantArray) -> quant.QuantArray:
    """Random blocks in place of a weight; their float16 scales are small and finite."""
    rng = np.random.default_rng(4)
    rows = like.parts["qs"].shape[:-1]
    size = like.parts["qs"].shape[-1] // format.block * format.record
    parts = fields_of(format, rng.integers(0, 256, (*rows, size), dtype=np.uint8))
    for field, kind, _ in format.fields:
        if kind == "<f2":
            small = rng.uniform(0.2, 1, parts[field].shape) / 2**14
            parts[field] = jnp.asarray(small.astype(np.float16))
    return quant.QuantArray(parts, format, like.layout, like.dims, like.kind)


def is_quant(x: Any) -> bool:
    return isinstance(x, quant.QuantArray)
