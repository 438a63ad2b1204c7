"""Ragged products under `vmap`, which JAX maps only if all operands are mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says
from jax import lax

import jlora

SIZES = jnp.array([4, 1, 5])


def w(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = w(10, 6, seed=1)


def layer(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


def two_layers(p, x, sizes):
    return lax.ragged_dot(jnp.tanh(layer(p, x, sizes)), p["v"], sizes)


def tree(fn, dora=False):
    base = {"w": w(3, 6, 4), "v": w(3, 4, 6, seed=2)}
    base = base if fn is two_layers else {"w": base["w"]}
    spec = jlora.LoraSpec(2, layout="io", dora=dora)
    params = jlora.attach(base, {".*": spec}, key=jax.random.key(0))
    base, one = jlora.detach(jax.tree.map(lambda x: x + 0.1, params))
    return base, jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), one)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


MODES = {
    "grad": lambda run: jax.value_and_grad(run, 1),
    "jvp": lambda run: lambda b, a: jax.jvp(lambda a: run(b, a), (a,), (a,))[1],
}


@pytest.mark.parametrize("mode", ["grad", pytest.param("jvp", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_over_adapters_and_their_bases(dora, mode):
    """The rows and the sizes of the groups are the same for both."""
    base, both = tree(layer, dora)
    bases = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), base)
    apply = jlora.lora(layer, fallback="error")

    def run(base, adapter):
        return jnp.sin(apply(jlora.bind(base, adapter), X, SIZES)).sum()

    fn = MODES[mode](run)
    close(jax.jit(jax.vmap(fn))(bases, both), lax.map(lambda pair: fn(*pair), (bases, both)))


WRAPS = {"eager": lambda f: f, "jit": jax.jit, "grad": lambda f: jax.grad(lambda a: f(a).sum())}


@pytest.mark.sample(4)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("fn", [layer, two_layers])
def test_a_base_is_not_repeated(fn, wrap):
    base, both = tree(fn)
    run = WRAPS[wrap](lambda a: jlora.lora(fn)(jlora.bind(base, a), X, SIZES))
    with pytest.raises(ValueError, match=says('"w" float32[3,6,4]', "lax.map(run, adapters)")):
        jax.vmap(run)(both)
    if fn is layer:
        close(lax.map(run, both), jax.tree.map(lambda *x: jnp.stack(x), *map(run, each(both))))


def each(both):
    return [jax.tree.map(lambda x, n=n: x[n], both) for n in range(2)]
