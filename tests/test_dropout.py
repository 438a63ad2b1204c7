"""Dropout: on the adapter's input only, its own mask at each site and step, and under remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says
from jax import lax

import jlora

D = 64
X = jnp.ones((5, D))


def node(stack=(), b=1.0):
    """W = 0 and A·B = 1/D everywhere in effect: the output is the mean of the dropped input."""
    ones = jnp.ones((*stack, D, 1))
    return jlora.LoraArray(
        jnp.zeros((*stack, D, D)), ones / D, jnp.full((*stack, 1, D), b), jnp.ones(stack), "io"
    )


def run(fn, w, key, rate=0.5):
    return jlora.lora(fn, dropout=rate, key=key, fallback="error")({"w": w}, X)


def plain(p, x):
    return x @ p["w"]


def test_it_falls_on_the_adapter_only(key):
    w = jlora.LoraArray(jnp.eye(D), node().lora_a, jnp.zeros((1, D)), jnp.ones(()), "io")
    assert jnp.array_equal(run(plain, w, key), X)


def test_the_mean_is_the_output_without_and_the_variance_is_the_masks(key):
    keys = jax.random.split(key, 2000)
    out = jax.vmap(lambda k: run(plain, node(), k, 0.25))(keys)[:, :, 0]
    assert abs(float(out.mean()) - 1) < 0.005
    assert abs(float(out.var()) / (0.25 / 0.75 / D) - 1) < 0.1  # of D masks of p/(1-p)


def test_the_same_key_is_the_same_mask(key):
    other = jax.random.fold_in(key, 1)
    assert jnp.array_equal(run(plain, node(), key), run(plain, node(), key))
    assert not jnp.array_equal(run(plain, node(), key), run(plain, node(), other))


def distinct(rows) -> bool:
    return len({tuple(r) for r in np.asarray(rows).reshape(-1, 5)}) == np.size(rows) // 5


def test_every_site_has_its_own(key):
    def fn(p, x):
        return jnp.stack([(x @ p["w"])[:, 0], jax.jit(lambda x: x @ p["w"])(x)[:, 0]])

    assert distinct(run(fn, node(), key))


def test_every_step_of_a_scan_has_its_own(key):
    def closed(p, x):
        return lax.scan(lambda c, _: (c, (x @ p["w"])[:, 0]), 0, length=4)[1]

    def stacked(p, x):
        return lax.scan(lambda c, w: (c, (x @ w)[:, 0]), 0, p["w"])[1]

    assert distinct(run(closed, node(), key))
    assert distinct(run(stacked, node((4,)), key))


def test_every_step_of_a_while_has_its_own(key):
    def fn(p, x):
        def step(state):
            n, out = state
            return n + 1, out.at[n].set((x @ p["w"])[:, 0])

        return lax.while_loop(lambda s: s[0] < 4, step, (0, jnp.zeros((4, 5))))[1]

    assert distinct(run(fn, node(), key))


def test_layers_that_share_a_function_do_not_share_masks(key):
    layer = jax.jit(lambda x, w: x @ w)

    def fn(p, x):
        return jnp.stack([layer(x, p["w"])[:, 0] for _ in range(3)])

    assert distinct(run(fn, node(), key))


def test_cond_draws(key):
    def fn(p, x):
        return lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x)

    assert len(np.unique(np.asarray(run(fn, node(), key))[:, 0])) > 1


def test_remat_draws_the_same_again(key):
    def gradient(fn):
        def loss(b):
            return jnp.sin(run(fn, node(b=b), key)).sum()

        return jax.grad(loss)(0.7)

    kept, nothing = (
        gradient(jax.checkpoint(plain, policy=policy))
        for policy in (
            jax.checkpoint_policies.everything_saveable,
            jax.checkpoint_policies.nothing_saveable,
        )
    )
    assert jnp.allclose(kept, nothing, rtol=1e-6)


@pytest.mark.nightly
def test_a_loops_condition_and_body_draw_apart(key):
    def fn(p, x):
        def going(state):
            return (state[0] < 3) & ((x @ p["w"]).sum() > -1)

        return lax.while_loop(going, lambda state: (state[0] + 1, x @ p["w"]), (0, x))[1]

    drawn = []
    draw = jax.random.bernoulli

    def record(k, *args):
        drawn.append(tuple(jax.random.key_data(k).tolist()))
        return draw(k, *args)

    with jax.disable_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", record)
        run(fn, node(), key)
    assert len(drawn) >= 7  # four conditions, three bodies
    assert len(set(drawn)) == len(drawn)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dora", [False, True])
def test_integers_are_dropped_as_numbers(dora):
    spec = jlora.LoraSpec(2, dora=dora)
    params = jlora.attach({"w": jnp.ones((8, 8))}, {"w": spec}, key=jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1, params)

    def fn(p, x):
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, p["w"], dims, preferred_element_type=jnp.float32)

    x = jnp.ones((4096, 8), jnp.int8)
    out = jlora.lora(fn, dropout=0.3, key=jax.random.key(0), fallback="error")(params, x)
    np.testing.assert_allclose(out.mean(0), fn(jlora.merge(params), x).mean(0), rtol=0.02)


def sampled(w, key, x=X, rate=0.5):
    """A step as it should be written: the function is built in it, with the step's key."""
    return jlora.lora(plain, dropout=rate, key=key)({"w": w}, x)[..., 0]


def test_a_function_with_dropout_is_for_one_call(key):
    once = jlora.lora(plain, dropout=0.5, key=key)
    once({"w": node()}, X)
    with pytest.raises(ValueError, match=says("second time", "key=step_key)(params, ...)")):
        once({"w": node()}, X)


BUILT_ONCE = {
    "jit": jax.jit,
    "grad in jit": lambda f: jax.jit(jax.grad(lambda w, x: f(w, x).sum())),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda w, x: lax.scan(lambda c, _: (c, f(w, x)), 0, length=2)[1],
}


@pytest.mark.parametrize("how", BUILT_ONCE)
@pytest.mark.parametrize("kind", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_a_key_is_no_constant_of_a_program(how, kind):
    apply = jlora.lora(plain, dropout=0.5, key=kind(0))
    step = BUILT_ONCE[how](lambda w, x: apply({"w": w}, x))
    with pytest.raises(ValueError, match=says("constant of the program", "fold_in(key, step)")):
        step(node(), X)


def examples(of):
    """Map over examples, with one key for all."""
    return lambda w, key: jax.vmap(lambda x: of(w, key, x[None]))(X)


def slope(w, key, x):
    return jax.grad(lambda w: sampled(w, key, x).sum())(w).lora_a


ONE_KEY = {
    "examples": examples(sampled),
    "examples in jit": jax.jit(examples(sampled)),
    "gradients by example": jax.jit(examples(slope)),
    "jit of an example": examples(jax.jit(sampled)),
    "adapters": lambda w, key: jax.vmap(lambda a: sampled(dataclasses.replace(w, lora_a=a), key))(
        jnp.ones((5, D, 1))
    ),
}


@pytest.mark.parametrize("how", ONE_KEY)
def test_examples_have_a_key_each(how, key):
    with pytest.raises(ValueError, match=says("over 5 examples", "jax.random.split(step_key, 5)")):
        ONE_KEY[how](node(), key)


def test_steps_and_examples_differ_with_keys_of_their_own(key):
    step, keys = jax.jit(lambda w, key: sampled(w, key, X[:1])), jax.random.split(key, 5)
    want = jnp.stack([step(node(), k) for k in keys])
    assert step._cache_size() == 1 and len(np.unique(want)) > 1
    w, x = node(), X[:, None]
    each = jax.vmap(lambda x, k: sampled(w, k, x))(x, keys)
    np.testing.assert_allclose(each, want, rtol=1e-6)
    # A key for each and one input for all is a sample of masks.
    np.testing.assert_allclose(jax.vmap(lambda k: sampled(w, k, X[:1]))(keys), want, rtol=1e-6)
    steps = lax.scan(lambda c, k: (c, sampled(w, k, X[:1])), 0, keys)[1]
    np.testing.assert_allclose(steps, want, rtol=1e-6)
    slopes = jax.vmap(lambda x, k: slope(w, k, x))(x, keys)
    assert len(np.unique(slopes, axis=0)) > 1


def test_the_rate_may_be_traced(key):
    step = jax.jit(lambda rate, key: sampled(node(), key, rate=rate))
    for rate in (0.0, 0.25):
        want = sampled(node(), key, rate=rate) if rate else jnp.ones(5)
        np.testing.assert_allclose(step(rate, key), want, rtol=1e-6)
    assert step._cache_size() == 1
    rates = jax.vmap(lambda r: sampled(node(), key, rate=r))(jnp.asarray([0.0, 0.25]))
    np.testing.assert_allclose(rates[1], want, rtol=1e-6)

    def looped(p, x):
        return lax.scan(lambda c, _: (c, jax.jit(plain)(p, x)[:, 0]), 0, length=3)[1]

    def run(rate, key):
        return jlora.lora(jax.checkpoint(looped), dropout=rate, key=key)({"w": node()}, X)

    np.testing.assert_allclose(jax.jit(run)(0.5, key), run(0.5, key), rtol=1e-6)


def test_a_traced_rate_needs_a_key_too():
    with pytest.raises(ValueError, match="needs a key"):
        jax.jit(lambda rate: jlora.lora(plain, dropout=rate))(0.1)
