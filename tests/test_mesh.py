"""A model on a mesh computes what it computes on one device, and its step is compiled once."""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_model import TOKENS, loss, mesh, params, placed

import jlora

CASES = [
    pytest.param(
        *case,
        marks=[] if case == (AxisType.Explicit, (2, 4), True, ("fsdp",)) else [pytest.mark.nightly],
        id="-".join(map(str, case)),
    )
    for case in itertools.product(
        (AxisType.Auto, AxisType.Explicit), ((4, 2), (2, 4)), (True, False), ((), ("fsdp",))
    )
]
LR = 0.5


@functools.partial(jax.jit, static_argnames="kind")
def steps(p, tokens, kind=None):
    """Logits and gradient, and the losses and the adapter of 20 steps of SGD."""
    trained, frozen = jlora.partition(p)

    def of(trained):
        return loss(jlora.combine(trained, frozen), tokens, kind)

    def step(trained, _):
        (value, logits), grads = jax.value_and_grad(of, has_aux=True)(trained)
        moved = jax.tree.map(lambda x, g: x - LR * g, trained, grads)
        return moved, (value, logits, grads)

    last, (losses, logits, grads) = jax.lax.scan(step, trained, length=20)
    return logits[0], jax.tree.map(lambda g: g[0], grads), losses, last


@functools.cache
def alone(scanned, dora):
    p = params(scanned, dora=dora)
    return p, steps(p, TOKENS)


def near(got, want):
    """Compare two trees, relative to the largest value in each."""
    most = max(float(abs(x).max()) for x in jax.tree.leaves(want))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * most)


@pytest.mark.parametrize(("kind", "shape", "scanned", "replicate"), CASES)
def test_as_on_one_device(kind, shape, scanned, replicate):
    p, want = alone(scanned, dora=True)
    where = mesh(shape, kind)
    on_mesh = placed(p, where, scanned, replicate)
    tokens = jax.device_put(TOKENS, NamedSharding(where, P("fsdp")))
    with jax.set_mesh(where):
        got = steps(on_mesh, tokens, kind)
    assert float(want[2][-1]) < 0.99 * float(want[2][0]), "it learns"
    for x, y in zip(got, want, strict=True):
        near(x, y)
    if kind == AxisType.Explicit:
        trained = jlora.partition(on_mesh)[0]
        for x, y in zip(*map(jax.tree.leaves, (got[3], trained)), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
