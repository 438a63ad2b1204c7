"""Flax's own Linen modules that tests/cases.py has not: caches, tied heads, stacks, recurrences."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from holds import holds

pytestmark = pytest.mark.usefixtures("usual_promotion")


def x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


def shapes(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The variables that a module makes, as shapes."""
    init = lambda key, *args: module.init(key, *args, **kwargs)
    return jax.eval_shape(init, jax.random.key(0), *args)


# In an attention of heads, in a stack of layers, or one for each place.
ADDED = {".*bias": "a bias of two dimensions, which is added"}


def linen(module: nn.Module, *args: Any, **options: Any) -> Any:
    return holds(module.apply, shapes(module, *args), *args, **options)


CONVS = {
    "strided": (nn.Conv(7, (3, 2), strides=(2, 1)), (2, 9, 8, 5)),
    "dilated": (nn.Conv(7, (3, 3), kernel_dilation=(2, 1)), (2, 9, 8, 5)),
    "causal": (nn.Conv(7, (3,), padding="CAUSAL"), (2, 9, 5)),
    "circular": (nn.Conv(7, (3, 3), padding="CIRCULAR"), (2, 9, 8, 5)),
    "depthwise": (nn.Conv(15, (3, 3), feature_group_count=5), (2, 9, 8, 5)),
    "volume": (nn.Conv(7, (2, 3, 2)), (2, 4, 5, 6, 5)),
    "no_batch": (nn.Conv(7, (3, 3)), (9, 8, 5)),
    "many_batches": (nn.Conv(7, (3, 3)), (2, 3, 9, 8, 5)),
    "transposed": (nn.ConvTranspose(7, (3, 2), strides=(2, 1)), (2, 6, 5, 4)),
    "transposed_kernel": (
        nn.ConvTranspose(7, (3, 2), strides=(2, 2), transpose_kernel=True),
        (2, 6, 5, 4),
    ),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str) -> None:
    module, shape = CONVS[name]
    linen(module, x(*shape))


def test_conv_of_its_own_at_each_place() -> None:
    linen(nn.ConvLocal(7, (3,), padding="VALID"), x(2, 9, 5), others=ADDED)


CELLS = {
    "gru": nn.GRUCell(7),
    "mgu": nn.MGUCell(7),
    "simple": nn.SimpleCell(7),
    "optimized_lstm": nn.OptimizedLSTMCell(7),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", CELLS)
def test_recurrence(name: str) -> None:
    linen(nn.RNN(CELLS[name]), x(2, 5, 11))


@pytest.mark.nightly
def test_recurrence_both_ways() -> None:
    linen(nn.Bidirectional(nn.RNN(nn.LSTMCell(7)), nn.RNN(nn.LSTMCell(7))), x(2, 5, 11))


@pytest.mark.nightly
def test_recurrence_of_convolutions() -> None:
    linen(nn.RNN(nn.ConvLSTMCell(7, (3, 3))), x(2, 4, 6, 5, 3))


@pytest.mark.nightly
def test_attention_over_another_sequence() -> None:
    module = nn.MultiHeadDotProductAttention(
        num_heads=2, qkv_features=10, out_features=13, normalize_qk=True
    )
    linen(module, x(2, 3, 11), x(2, 5, 17), others=ADDED)


def test_attention_step_from_a_cache() -> None:
    module = nn.MultiHeadAttention(num_heads=2, qkv_features=10, decode=True)
    variables = shapes(module, x(2, 6, 11))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["cache"])

    def decode(params: Any, token: Any, cache: Any) -> Any:
        outs = []
        for _ in range(2):
            variables = {"params": params, "cache": cache}
            out, cache = module.apply(variables, token, mutable=["cache"])
            outs.append(out)
            cache, token = cache["cache"], out
        return outs, cache

    holds(decode, variables["params"], x(2, 1, 11), cache, others=ADDED)


class Tied(nn.Module):
    """Looked up, mixed, and multiplied by the same table."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(23, 11)
        return embed.attend(nn.gelu(nn.Dense(11)(embed(tokens))))


def test_tied_embedding() -> None:
    report = linen(Tied(), jnp.array([[1, 5, 22], [0, 3, 3]]), eager=True)
    assert [use.primitive for use in report.uses if "Embed" in use.name] == [
        "gather",
        "dot_general",
    ]


class Block(nn.Module):
    """A pre-norm block, in the form that `nn.scan` takes."""

    @nn.compact
    def __call__(self, h: jax.Array, _: Any) -> tuple[jax.Array, None]:
        n = nn.LayerNorm()(h)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10)(n)
        return h + nn.Dense(11)(nn.gelu(nn.Dense(17)(nn.LayerNorm()(h)))), None


class Stack(nn.Module):
    """Three blocks in one, their parameters stacked along `axis`."""

    remat: bool = False
    axis: int = 0

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scanned = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return scanned()(h, None)[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_blocks(remat: bool) -> None:
    others = ADDED | {".*scale": "of a norm, stacked, which scales each channel"}
    linen(Stack(remat), x(2, 4, 11), others=others)
