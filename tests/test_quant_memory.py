"""What quantized models hold: resident bytes, and what a train step allocates besides."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from quantized import one

import jlora
from jlora import LoraSpec, quant
from jlora._paths import leaves_with_paths

LAYERS, WIDTH, HIDDEN, TOKENS = 4, 256, 512, 16
SIZES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
LAYER = 4 * 2 * WIDTH * HIDDEN  # the bytes of a layer's weights
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


def layer(x: Any, p: Any) -> Any:
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def unrolled(p: Any, x: Any) -> Any:
    for n in range(LAYERS):
        x = layer(x, p[f"layers_{n}"])
    return x


def scanned(p: Any, x: Any) -> Any:
    step = jax.checkpoint(lambda x, p: (layer(x, p), None))
    return jax.lax.scan(step, x, p)[0]


def weights(fn: Callable[..., Any]) -> Any:
    """The parameters of a model, as shapes."""
    stack = (LAYERS,) if fn is scanned else ()
    one = {k: jax.ShapeDtypeStruct((*stack, *v), jnp.float32) for k, v in SIZES.items()}
    return one if fn is scanned else {f"layers_{n}": one for n in range(LAYERS)}


def temporary(fn: Callable[..., Any], format: str | None) -> int:
    """The bytes that one train step allocates, besides its arguments and results."""

    def prepared(params: Any) -> Any:
        layouts = {path: "io" for path, _ in leaves_with_paths(params)}
        if format is not None:
            params = jlora.quantize(params, {".*": format}, layouts=layouts)
        spec = LoraSpec(4, layout="io")
        return jlora.partition(jlora.attach(params, {".*": spec}, key=jax.random.key(0)))

    def step(trainable: Any, frozen: Any, x: Any) -> Any:
        loss = lambda t: (jlora.lora(fn)(jlora.combine(t, frozen), x) ** 2).sum()
        return jax.value_and_grad(loss)(trainable)

    args = jax.eval_shape(prepared, weights(fn))
    return jax.jit(step).lower(*args, X).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("fn", [scanned, unrolled])
def test_a_step_builds_no_more_than_one_layer(fn):
    dense = temporary(fn, None)
    for name in ("nf4", "int8"):
        assert temporary(fn, name) <= dense + LAYER, name


@pytest.mark.nightly
def test_a_deep_unrolled_step_builds_one_weight_at_a_time(monkeypatch):
    """Twelve layers of SmolLM2's shapes and 128 tokens: less than two weights over float32."""
    size = {"LAYERS": 12, "WIDTH": 576, "HIDDEN": 1536}
    size |= {"SIZES": {"up": (576, 1536), "down": (1536, 576)}}
    size |= {"X": jax.ShapeDtypeStruct((128, 576), jnp.float32)}
    for name, value in size.items():
        monkeypatch.setitem(globals(), name, value)
    dense = temporary(unrolled, None)
    for name in ("nf4", "int8"):
        assert temporary(unrolled, name) <= dense + 2 * 4 * 576 * 1536, name


def test_resident_bytes():
    """Against float32: Q4_1 has 5 bits a weight, NF4 with quantized scales a little over 4."""
    for name, most in (("q4_1", 0.17), ("q4_0", 0.15), ("q6_k", 0.21), ("int8", 0.26)):
        assert one(name).nbytes <= most * 4 * one(name).size, name
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    nf4 = jax.eval_shape(lambda w: jlora.quantize({"w": w}, {"w": quant.NF4()}), w)["w"]
    assert nf4.nbytes <= 0.133 * 4 * nf4.size
    assert (
        nf4.nbytes
        < 0.95
        * jax.eval_shape(lambda w: jlora.quantize({"w": w}, {"w": quant.NF4(double=False)}), w)[
            "w"
        ].nbytes
    )
