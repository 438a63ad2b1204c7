"""Dropout: on the adapter's input only, its own mask at each site and step, and under remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


GROUPS = jnp.array([3, 1, 4])


def convolve(w, x):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("name", ["matmul", "conv", "ragged_dot"])
def test_remat_keeps_neither_the_narrow_product_nor_the_dropped_input(name, rate, key):
    layout, x, fn = {
        "matmul": ("io", jnp.ones((4, 8, 12)), lambda p, x: x @ p),
        "conv": ("iio", jnp.ones((4, 8, 12)), convolve),
        "ragged_dot": ("io", jnp.ones((8, 12)), lambda p, x: lax.ragged_dot(x, p, GROUPS)),
    }[name]
    shape = {"matmul": (12, 10), "conv": (3, 12, 10), "ragged_dot": (3, 12, 10)}[name]
    spec = jlora.LoraSpec(2, layout=layout)
    params = jlora.attach({"w": jnp.ones(shape)}, {"w": spec}, key=key)
    trainable, frozen = jlora.partition(jax.tree.map(lambda x: x + 0.1, params))

    def loss(t, remat):
        drop = {"dropout": rate, "key": key if rate else None, "remat": remat}
        run = jlora.lora(lambda p, x: jnp.sin(fn(p["w"], x)), fallback="error", **drop)
        return run(jlora.combine(t, frozen), x).sum()

    def kept(remat):
        pull = jax.eval_shape(lambda t: jax.vjp(lambda t: loss(t, remat), t)[1], trainable)
        sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(pull)]
        return sizes.count(x.size // 12 * 2), sizes.count(x.size)  # x·A, and inputs

    plain, again = kept(False), kept(True)
    assert plain[0] > 0 == again[0] and again[1] <= plain[1]
    gradients = [jax.grad(loss)(trainable, remat) for remat in (False, True)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
