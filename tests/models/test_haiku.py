"""Haiku's modules, through `hk.transform`."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from holds import holds

pytestmark = pytest.mark.usefixtures("usual_promotion")


def x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


def model(
    net: Callable[..., Any], *args: jax.Array, dtype: Any = jnp.float32, **options: Any
) -> Any:
    pure = hk.without_apply_rng(hk.transform(net))
    params = jax.eval_shape(pure.init, jax.random.key(0), *args)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    return holds(pure.apply, params, *args, **options)


def transformer(tokens: jax.Array) -> jax.Array:
    width, (_, time) = 12, tokens.shape
    table = hk.get_parameter("positions", (time, width), init=jnp.zeros)
    h = hk.Embed(23, width)(tokens) + table
    mask = jnp.tril(jnp.ones((1, 1, time, time)))
    initial = hk.initializers.VarianceScaling(1.0)
    for _ in range(2):
        n = hk.LayerNorm(-1, True, True)(h)
        h = h + hk.MultiHeadAttention(3, 5, w_init=initial, model_size=width)(n, n, n, mask=mask)
        h = h + hk.nets.MLP([17, width], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(h))
    return hk.Linear(19)(h)


def test_transformer() -> None:
    """In float64: in float32 the gradients of query and key here are half rounding."""
    with jax.enable_x64(True):
        tokens = jnp.array([[1, 5, 22, 7, 7], [0, 3, 3, 9, 11]])
        others = {".*positions": "a table that is added, row by row"}
        model(transformer, tokens, others=others, dtype=jnp.float64)


def image(h: jax.Array) -> jax.Array:
    h = jax.nn.relu(hk.Conv2D(6, 3, stride=2)(h))
    h = jax.nn.relu(hk.Conv2D(10, (2, 3), rate=(1, 2), feature_group_count=2)(h))
    h = jax.nn.relu(hk.DepthwiseConv2D(3, (3, 2))(h))
    h = hk.Conv2DTranspose(7, 3, stride=2)(h)
    return hk.nets.MLP([13, 5])(h.mean(axis=(1, 2)))


@pytest.mark.nightly
def test_image_model() -> None:
    model(image, x(2, 9, 11, 3), eager=True)


CORES = {
    "lstm": lambda: hk.LSTM(7),
    "gru": lambda: hk.GRU(7),
    "deep": lambda: hk.DeepRNN([hk.VanillaRNN(7), jax.nn.relu, hk.LSTM(9)]),
    "convolutions": lambda: hk.Conv2DLSTM((6, 5), 7, 3),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", CORES)
def test_recurrence(name: str) -> None:
    def run(sequence: jax.Array) -> Any:
        core = CORES[name]()
        return hk.dynamic_unroll(core, sequence, core.initial_state(sequence.shape[1]))

    model(run, x(5, 2, 6, 5, 3) if name == "convolutions" else x(5, 2, 11))


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers(remat: bool) -> None:
    def block(h: jax.Array) -> jax.Array:
        return h + hk.nets.MLP([17, 11])(h)

    def run(h: jax.Array) -> jax.Array:
        return hk.experimental.layer_stack(3)(hk.remat(block) if remat else block)(h)

    model(run, x(4, 11), others={".*/b": "a bias, stacked, which is added"})
