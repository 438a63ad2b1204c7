"""Flax's own NNX modules that tests/cases.py has not: caches, tied heads, stacks, recurrences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from holds import holds

pytestmark = pytest.mark.usefixtures("usual_promotion")


def x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


# In an attention of heads, or in a stack of layers.
ADDED = {".*bias": "a bias of two dimensions, which is added"}


def split(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any, Any]:
    """The graph, the parameters as shapes for `holds` to fill, and the rest: counts, keys."""
    graph, params, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    return graph, params, jax.jit(lambda: nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)[2])()


def model(make: Callable[[nnx.Rngs], nnx.Module], *args: jax.Array, **options: Any) -> Any:
    graph, params, rest = split(make)
    run = lambda p, *args: nnx.merge(graph, p, rest, copy=True)(*args)
    return holds(run, params, *args, **options)


CONVS = {
    "strided": (lambda rngs: nnx.Conv(5, 7, (3, 2), strides=(2, 1), rngs=rngs), (2, 9, 8, 5)),
    "dilated": (lambda rngs: nnx.Conv(5, 7, (3,), kernel_dilation=2, rngs=rngs), (2, 9, 5)),
    "grouped": (
        lambda rngs: nnx.Conv(6, 9, (3, 3), feature_group_count=3, rngs=rngs),
        (2, 9, 8, 6),
    ),
    "transposed": (
        lambda rngs: nnx.ConvTranspose(4, 7, (3, 2), strides=(2, 1), rngs=rngs),
        (2, 6, 5, 4),
    ),
    "transposed_kernel": (
        lambda rngs: nnx.ConvTranspose(
            4, 7, (3, 2), strides=(2, 2), transpose_kernel=True, rngs=rngs
        ),
        (2, 6, 5, 4),
    ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str) -> None:
    make, shape = CONVS[name]
    model(make, x(*shape))


CELLS = {
    "lstm": nnx.LSTMCell,
    "optimized_lstm": nnx.OptimizedLSTMCell,
    "gru": nnx.GRUCell,
    "simple": nnx.SimpleCell,
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", CELLS)
def test_recurrence(name: str) -> None:
    model(lambda rngs: nnx.RNN(CELLS[name](11, 7, rngs=rngs)), x(2, 5, 11))


def test_general_linear() -> None:
    model(
        lambda rngs: nnx.LinearGeneral((4, 11), (3, 5), axis=(-2, -1), rngs=rngs),
        x(2, 4, 11),
        others=ADDED,
    )


def test_general_linear_of_a_batch_axis() -> None:
    model(
        lambda rngs: nnx.LinearGeneral(11, 5, axis=-1, batch_axis={0: 3}, rngs=rngs),
        x(3, 4, 11),
        others=ADDED,
    )


def test_einsum() -> None:
    make = lambda rngs: nnx.Einsum("bti,ihd->bthd", (11, 3, 5), (3, 5), rngs=rngs)
    model(make, x(2, 4, 11), others=ADDED)


class Tied(nnx.Module):
    """Looked up, mixed, and multiplied by the same table."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(23, 11, rngs=rngs)
        self.mix = nnx.Linear(11, 11, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(nnx.gelu(self.mix(self.embed(tokens))))


def test_tied_embedding() -> None:
    report = model(Tied, jnp.array([[1, 5, 22], [0, 3, 3]]), eager=True)
    primitives = [use.primitive for use in report.uses if "embed" in use.name]
    assert primitives == ["gather", "dot_general"]


def test_attention_over_another_sequence() -> None:
    model(
        lambda rngs: nnx.MultiHeadAttention(
            2, 11, 10, 13, in_kv_features=17, normalize_qk=True, decode=False, rngs=rngs
        ),
        x(2, 3, 11),
        x(2, 5, 17),
        others=ADDED,
    )


def test_attention_steps_from_a_cache() -> None:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        attention = nnx.MultiHeadAttention(2, 11, 10, decode=True, rngs=rngs)
        attention.init_cache((2, 6, 11))
        return attention

    graph, params, cache = split(make)

    def decode(params: Any, token: Any, cache: Any) -> Any:
        attention = nnx.merge(graph, params, cache, copy=True)
        first = attention(token)
        return first, attention(first), nnx.state(attention, nnx.Cache)

    holds(decode, params, x(2, 1, 11), cache, others=ADDED)


class Block(nnx.Module):
    """A pre-norm block."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(11, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 11, 10, decode=False, rngs=rngs)
        self.up = nnx.Linear(11, 17, rngs=rngs)
        self.down = nnx.Linear(17, 11, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        h = h + self.attention(self.norms[0](h))
        return h + self.down(nnx.gelu(self.up(self.norms[1](h))))


class Stack(nnx.Module):
    """Three blocks in one, made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, remat: bool, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.vmap(Block, axis_size=3)(rngs.split(3))
        self.remat = remat

    def __call__(self, h: jax.Array) -> jax.Array:
        def step(h: jax.Array, block: Block) -> jax.Array:
            return block(h)

        step = nnx.remat(step) if self.remat else step
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(h, self.blocks)


@pytest.mark.nightly
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_blocks(remat: bool) -> None:
    others = ADDED | {".*scale": "of a norm, stacked, which scales each channel"}
    model(lambda rngs: Stack(remat, rngs), x(2, 4, 11), others=others)


@pytest.mark.nightly
def test_mapped_models() -> None:
    """An ensemble: three models in one, each with its own A and B."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 5, (3,), rngs=rngs)
            self.out = nnx.Linear(5, 7, rngs=rngs)

        def __call__(self, h: jax.Array) -> jax.Array:
            return self.out(nnx.relu(self.conv(h)))

    graph, params, _ = split(lambda rngs: nnx.vmap(Net, axis_size=4)(rngs.split(4)))

    def run(params: Any, h: jax.Array) -> jax.Array:
        return nnx.vmap(lambda net, h: net(h), in_axes=(0, None))(nnx.merge(graph, params), h)

    holds(run, params, x(2, 9, 3), others=ADDED)
