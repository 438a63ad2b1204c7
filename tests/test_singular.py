"""The singular vectors of a long matrix, read by blocks, and what initializers need for a stack."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, initializers
from jlora.forms._singular import singular

INITIAL = {
    "pissa": {"init": initializers.pissa},
    "milora": {"init": initializers.milora},
    "olora": {"init": initializers.olora},
    "lora_xs": {"form": "lora_xs"},
    "mica": {"form": "mica"},
}
LAYERS, LONG, SHORT = 40, 256, 64


def conditioned(rows, columns, decades):
    """A matrix whose singular values fall by so many powers of ten."""
    rng, few = np.random.default_rng(0), min(rows, columns)
    u, v = (np.linalg.qr(rng.normal(size=(side, few)))[0] for side in (rows, columns))
    return jnp.asarray((u * np.logspace(0, -decades, few)) @ v.T, jnp.float32)


@pytest.mark.parametrize("some", [slice(3), slice(-3, None)], ids=["largest", "smallest"])
@pytest.mark.parametrize("decades", [1, 5])
@pytest.mark.parametrize(
    "shape", [(64, 32), (131, 32), (32, 131), (32, 64), (9, 4), (40, 30), (3, 50)], ids=str
)
def test_equal_to_numpy(shape, decades, some):
    check(conditioned(*shape, decades), some)


DEFICIENT = {
    "ones": np.ones((50, 12)),
    "a column": np.eye(12)[[3] * 50],
    "a number": np.eye(50, 12) * (np.arange(12) == 0),
    "a diagonal": np.eye(50, 12) * (np.arange(12) < 5),
    "two": np.outer(np.sin(range(50)), np.arange(12)) + np.outer(np.cos(range(50)), np.ones(12)),
    "gaps": np.asarray(conditioned(50, 12, 0)) * np.repeat([1, 1e-4, 1e-6, 0], 3),
}


@pytest.mark.parametrize("some", [slice(3), slice(-3, None)], ids=["largest", "smallest"])
@pytest.mark.parametrize("name", DEFICIENT)
@pytest.mark.parametrize("wide", [False, True])
def test_of_lower_rank(name, wide, some):
    """Vectors for which s is 0 are orthogonal to all others, on both sides."""
    matrix = DEFICIENT[name].T if wide else DEFICIENT[name]
    check(jnp.asarray(matrix / np.linalg.norm(matrix, 2), jnp.float32), some)


def check(matrix, some):
    """Both `M v = s u` and `Mᵀ u = s v`: to the rounding of the largest, whatever s is."""
    u, s, vt = (np.asarray(x, np.float64) for x in singular(matrix, some))
    exact = np.asarray(matrix, np.float64)
    np.testing.assert_allclose(s, np.linalg.svd(exact)[1][some], rtol=0, atol=2e-6)
    for got in (u.T @ u, vt @ vt.T):
        np.testing.assert_allclose(got, np.eye(len(s)), atol=2e-6)
    np.testing.assert_allclose(exact @ vt.T, u * s, atol=2e-6)
    np.testing.assert_allclose(exact.T @ u, vt.T * s, atol=2e-6)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (8, 8)], ids=str)
def test_bfloat16_is_computed_in_float32(shape):
    matrix = conditioned(*shape, 1).astype(jnp.bfloat16)
    for got, want in zip(
        singular(matrix, slice(2)), singular(matrix.astype(jnp.float32), slice(2)), strict=True
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(abs(got), abs(want), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
@pytest.mark.parametrize("some", [slice(3), slice(-3, None)], ids=["largest", "smallest"])
def test_of_any_scale(scale, some):
    """Squares of what is small or large are not numbers in float32."""
    matrix = conditioned(64, 16, 1)
    for got, want in zip(singular(scale * matrix, some), singular(matrix, some), strict=True):
        power = 1.0 if got.ndim == 2 else scale
        np.testing.assert_allclose(abs(got / power), abs(want), atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)], ids=str)
@pytest.mark.parametrize("some", [slice(2), slice(-2, None)], ids=["largest", "smallest"])
def test_of_zeros_they_are_orthonormal(shape, some):
    u, s, vt = singular(jnp.zeros(shape), some)
    np.testing.assert_array_equal(s, 0)
    np.testing.assert_allclose(u.T @ u, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(2), atol=1e-6)


def attach(base, **how):
    return jlora.attach(base, {"w": LoraSpec(4, layout="io", **how)}, key=jax.random.key(0))


def lora_ga(base, gradients):
    return initializers.lora_ga(attach(base), gradients)


def compiled(fn, *given):
    return jax.jit(fn, donate_argnums=0).lower(*given).compile()


def stack(shape, at=None):
    return {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=at)}


SHAPES = pytest.mark.parametrize("shape", [(LAYERS, LONG, SHORT), (LAYERS, SHORT, LONG)], ids=str)


@SHAPES
@pytest.mark.parametrize("name", [*INITIAL, "lora_ga"])
def test_a_stack_is_changed_where_it_is(name, shape):
    """Of 40 layers in bfloat16, donated: the memory of four in float32, and no second stack."""
    given = [stack(shape)] * (2 if name == "lora_ga" else 1)
    run = lora_ga if name == "lora_ga" else functools.partial(attach, **INITIAL[name])
    memory = compiled(run, *given).memory_analysis()
    adapter = 4 * LAYERS * (4 * (LONG + SHORT) + 16 + 1)
    more = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert 0 < more - adapter < 4 * (4 * LONG * SHORT) < 2 * LAYERS * LONG * SHORT / 4


@SHAPES
@pytest.mark.parametrize("name", ["pissa", "milora", "lora_xs"])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_device_gathers_a_block_at_a_time(axis, name, shape):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    at = NamedSharding(mesh, P(*[None] * axis, "x"))
    text = compiled(functools.partial(attach, **INITIAL[name]), stack(shape, at)).as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)
    assert 0 < max(np.prod([*map(int, dims.split(","))]) for dims in gathered) < LONG * SHORT / 2
