"""Keras 3 on its JAX backend, through `stateless_call`."""

import os

# Keras reads both once, as it is imported: nobody's own settings count, and none are written.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = os.devnull

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from holds import holds
from keras import layers

import jlora

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(autouse=True)
def no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """`holds` draws every value; a random initializer would be compiled for each shape first."""
    for kind in ("VarianceScaling", "RandomUniform", "Orthogonal"):
        initializer = getattr(keras.initializers, kind)
        monkeypatch.setattr(initializer, "__call__", lambda self, shape, **_: jnp.zeros(shape))


def x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


def model(net: keras.Model, *args: jax.Array, **options: Any) -> Any:
    """Run on the trainable variables, named by their paths."""
    params = {v.path: v.value for v in net.trainable_variables}
    paths = [v.path for v in net.trainable_variables]
    state = [v.value for v in net.non_trainable_variables]

    def run(params: dict[str, Any], *args: jax.Array) -> Any:
        return net.stateless_call([params[p] for p in paths], state, *args)[0]

    return holds(run, params, *args, **options)


def sequential(shape: tuple[int, ...], *stack: Any) -> keras.Model:
    return keras.Sequential([keras.Input(shape), *stack])


def test_perceptron() -> None:
    stack = [layers.Dense(13, "relu"), layers.BatchNormalization(), layers.Dense(5)]
    model(sequential((11,), *stack), x(4, 11), eager=True)


@pytest.mark.nightly
def test_image_model() -> None:
    net = sequential(
        (9, 11, 4),
        layers.Conv2D(6, 3, strides=2, activation="relu"),
        layers.Conv2D(9, (2, 3), groups=3, padding="same"),
        layers.DepthwiseConv2D(2, depth_multiplier=3),
        layers.SeparableConv2D(7, 2, padding="same"),
        layers.Conv2DTranspose(5, 3, strides=2),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3),
    )
    model(net, x(2, 9, 11, 4))


@pytest.mark.sample(3)
@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU, layers.SimpleRNN])
def test_recurrence(layer: Any) -> None:
    others = {".*/gru_cell/bias": "two biases in one array"} if layer is layers.GRU else {}
    model(sequential((5, 11), layer(7, return_sequences=True)), x(2, 5, 11), others=others)


def transformer() -> keras.Model:
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(23, 12)(tokens)
    h = h + layers.MultiHeadAttention(3, 5)(h, h, use_causal_mask=True)
    h = layers.LayerNormalization()(h)
    h = h + layers.GroupQueryAttention(5, 4, 2)(h, h)
    up = layers.EinsumDense("btc,chd->bthd", (None, 3, 7), bias_axes="hd", activation="gelu")
    h = h + layers.EinsumDense("bthd,hdc->btc", (None, 12))(up(h))
    return keras.Model(tokens, layers.Dense(19)(h))


@pytest.fixture
def float64() -> Iterator[None]:
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    with jax.enable_x64(True):
        yield
    keras.config.set_floatx(before)


@pytest.mark.usefixtures("float64")
def test_transformer() -> None:
    """In float64: in float32 the gradients of query and key here are half rounding."""
    tokens = jnp.array([[1, 5, 22, 7, 7], [0, 3, 3, 9, 11]])
    model(transformer(), tokens, others={".*bias": "a bias of two dimensions, which is added"})


@pytest.mark.nightly
def test_the_lists_of_a_stateless_call() -> None:
    """Trainable values as a list, whose paths are numbers; what a step changes is returned."""
    net = sequential((11,), layers.Dense(13), layers.BatchNormalization(), layers.Dense(5))
    values = [v.value for v in net.trainable_variables]
    state = [v.value for v in net.non_trainable_variables]
    rules = {"0|4": jlora.LoraSpec(2)}
    params = jlora.attach(values, rules, key=jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    run = jlora.lora(net.stateless_call, fallback="error")
    got = run(params, state, x(4, 11), training=True)
    want = net.stateless_call(jlora.merge(params), state, x(4, 11), training=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(got[1][0], state[0]), "no statistic moved"
    for rule in ("full", jlora.LoraSpec(2)):
        with pytest.raises(TypeError, match=r'"0" .* is a variable .*\[v.value for v in'):
            jlora.attach(net.trainable_variables, {"0": rule}, key=jax.random.key(0))
