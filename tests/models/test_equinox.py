"""Equinox's modules: the model itself is the pytree of parameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from holds import holds

pytestmark = pytest.mark.usefixtures("usual_promotion")

KEY = jax.random.key(0)


def x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


def split(make: Callable[[], eqx.Module]) -> tuple[Any, Any]:
    """The arrays of a model, as shapes for `holds` to fill, and the rest of it."""
    shapes = eqx.filter_eval_shape(make)
    return eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


def model(make: Callable[[], eqx.Module], *args: jax.Array, **options: Any) -> Any:
    """Run a model of one example over a batch, as Equinox's own examples do."""
    params, static = split(make)

    def run(params: Any, *args: jax.Array) -> Any:
        return jax.vmap(eqx.combine(params, static))(*args)

    return holds(run, params, *args, **options)


class Image(eqx.Module):
    """Convolutions, a pool, and a perceptron."""

    conv: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    mlp: eqx.nn.MLP

    def __init__(self) -> None:
        keys = jax.random.split(KEY, 4)
        self.conv = eqx.nn.Conv2d(3, 6, 3, stride=2, key=keys[0])
        self.grouped = eqx.nn.Conv2d(6, 10, (2, 3), groups=2, dilation=(1, 2), key=keys[1])
        self.up = eqx.nn.ConvTranspose2d(10, 7, 3, stride=2, key=keys[2])
        self.mlp = eqx.nn.MLP(7, 5, width_size=13, depth=2, key=keys[3])

    def __call__(self, image: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.grouped(jax.nn.relu(self.conv(image))))
        return self.mlp(jax.nn.relu(self.up(h)).mean(axis=(1, 2)))


@pytest.mark.nightly
def test_image_model() -> None:
    others = {".*/bias": "a bias (channels, 1, 1) of a convolution, which is added"}
    model(Image, x(2, 3, 12, 17), others=others, eager=True)


class Transformer(eqx.Module):
    """Two blocks over tokens, with learned positions; `vmap` maps the layers over time."""

    embed: eqx.nn.Embedding
    positions: jax.Array
    attentions: list[eqx.nn.MultiheadAttention]
    mlps: list[eqx.nn.MLP]
    norms: list[eqx.nn.LayerNorm]
    head: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(KEY, 6)
        self.embed = eqx.nn.Embedding(23, 12, key=keys[0])
        self.positions = jnp.zeros((5, 12))
        attention = eqx.nn.MultiheadAttention
        self.attentions = [attention(3, 12, key=k) for k in keys[1:3]]
        self.mlps = [eqx.nn.MLP(12, 12, 17, 1, activation=jax.nn.gelu, key=k) for k in keys[3:5]]
        self.norms = [eqx.nn.LayerNorm(12) for _ in range(2)]
        self.head = eqx.nn.Linear(12, 19, key=keys[5])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        h = jax.vmap(self.embed)(tokens) + self.positions
        mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        for attention, mlp, norm in zip(self.attentions, self.mlps, self.norms, strict=True):
            h = h + attention(h, h, h, mask=mask)
            h = h + jax.vmap(mlp)(jax.vmap(norm)(h))
        return jax.vmap(self.head)(h)


def test_transformer() -> None:
    tokens = jnp.array([[1, 5, 22, 7, 7], [0, 3, 3, 9, 11]])
    model(Transformer, tokens, others={"positions": "a table that is added, row by row"})


class Recurrent(eqx.Module):
    """A cell that `lax.scan` runs over time."""

    cell: eqx.nn.LSTMCell | eqx.nn.GRUCell

    def __call__(self, sequence: jax.Array) -> jax.Array:
        zero = jnp.zeros(self.cell.hidden_size)
        pair = isinstance(self.cell, eqx.nn.LSTMCell)

        def step(state: Any, inputs: jax.Array) -> tuple[Any, None]:
            return self.cell(inputs, state), None

        return jax.tree.leaves(jax.lax.scan(step, (zero, zero) if pair else zero, sequence)[0])[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("cell", [eqx.nn.LSTMCell, eqx.nn.GRUCell])
def test_recurrence(cell: Any) -> None:
    model(lambda: Recurrent(cell(11, 7, key=KEY)), x(2, 5, 11))


@pytest.mark.nightly
def test_blocks_stacked_by_filter_vmap() -> None:
    """Three layers made at once, and scanned over, as Equinox's documentation stacks them."""
    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(11, 11, 17, 1, key=key))
    params, static = split(lambda: make(jax.random.split(KEY, 3)))

    def run(params: Any, h: jax.Array) -> jax.Array:
        def step(h: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return h + jax.vmap(eqx.combine(layer, static))(h), None

        return jax.lax.scan(step, h, params)[0]

    others = {".*bias": "a bias, stacked, which is added"}
    holds(run, params, x(4, 11), others=others)
