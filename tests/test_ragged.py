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


@pytest.mark.parametrize("dora", [False, True])
def test_over_adapters(dora):
    base, both = tree(layer, dora)
    apply = jlora.lora(layer, fallback="error")

    def run(adapter):
        return apply(jlora.bind(base, adapter), X, SIZES)

    def slopes(adapter):
        return jax.grad(lambda a: jnp.sin(run(a)).sum())(adapter)

    for fn in (run, slopes):
        close(jax.jit(jax.vmap(fn))(both), lax.map(fn, both))
    moved = jax.vmap(lambda a: jax.jvp(run, (a,), (a,))[1])(both)
    close(moved, lax.map(lambda a: jax.jvp(run, (a,), (a,))[1], both))


def test_over_stacked_bases():
    base, both = tree(two_layers)
    bases = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), base)
    run = lambda b, a: jlora.lora(two_layers)(jlora.bind(b, a), X, SIZES)
    close(jax.vmap(run)(bases, both), lax.map(lambda ba: run(*ba), (bases, both)))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_base_is_not_repeated(wrap):
    """The second layer's rows are mapped and its weight is not, which JAX cannot batch."""
    base, both = tree(two_layers)
    run = wrap(lambda a: jlora.lora(two_layers)(jlora.bind(base, a), X, SIZES))
    with pytest.raises(ValueError, match=says('"v" float32[3,4,6]', "lax.map(run, adapters)")):
        jax.vmap(run)(both)
    want = [run(jax.tree.map(lambda x, n=n: x[n], both)) for n in range(2)]
    close(lax.map(run, both), jnp.stack(want))
