"""`jlora.layouts` where an axis could be a side or a stack: experts, heads, embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says

import jlora

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
TOKENS = jnp.array([2, 0, 1, 1, 2])


def w(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense_mixture(p, x):
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("tef,efd->td", h, p["down"])


MIXTURE = {"up": w(3, 8, 4), "down": w(3, 4, 8)}
HEADS_OR_EXPERTS = {
    "einsum": ("oio", lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]), w(3, 8, 4)),
    "experts first": ("oio", lambda p, x: jnp.einsum("td,edf->etf", x, p["w"]), w(3, 8, 4)),
    "mapped": ("oio", lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), w(3, 8, 4)),
    "matmul": ("oio", lambda p, x: x @ p["w"], w(3, 8, 4)),
    "outputs first": ("ooi", lambda p, x: jnp.einsum("td,efd->tef", x, p["w"]), w(3, 4, 8)),
}


@pytest.mark.parametrize("name", HEADS_OR_EXPERTS)
def test_heads_or_experts_is_asked(name):
    layout, fn, weight = HEADS_OR_EXPERTS[name]
    line = f'layouts={{**layouts, "w": "{layout[1:]}"}}'
    with pytest.warns(UserWarning, match=says('"w" [3, ', "share one A", "3 experts", line)):
        assert jlora.layouts(fn, {"w": weight}, X) == {"w": layout}


def test_a_dense_mixture_as_the_warning_says():
    with pytest.warns(UserWarning, match="experts of a mixture"):
        layouts = jlora.layouts(dense_mixture, MIXTURE, X)
    assert layouts == {"up": "oio", "down": "iio"}
    layouts = {**layouts, "up": "io", "down": "io"}
    rules = {".*": jlora.LoraSpec(2)}
    params = jlora.attach(MIXTURE, rules, key=jax.random.key(0), layouts=layouts)
    params = jax.tree.map(lambda x: x + 0.1, params)
    assert params["up"].lora_a.shape == (3, 8, 2) and params["down"].lora_b.shape == (3, 2, 8)
    got = jlora.lora(dense_mixture, fallback="error")(params, X)
    np.testing.assert_allclose(got, dense_mixture(jlora.merge(params), X), rtol=1e-4)
    # An adapted weight has its layout, so nothing is asked.
    assert jlora.layouts(dense_mixture, params, X)["up"] == "oio"


UNASKED = {
    "a head's outputs": ("ioo", lambda p, x: jnp.einsum("td,dhf->thf", x, p["w"]), w(8, 3, 4)),
    "a kernel of outputs first": (
        "oiii",
        lambda p, x: jax.lax.conv(jnp.ones((1, 2, 4, 4)), p["w"], (1, 1), "SAME"),
        w(3, 2, 3, 3),
    ),
    "outputs first": ("oi", lambda p, x: x @ p["w"].T, w(4, 8)),
    "mapped with the inputs": (
        "io",
        lambda p, x: jax.vmap(jnp.dot)(jnp.stack([x] * 3), p["w"]),
        w(3, 8, 4),
    ),
}


@pytest.mark.parametrize("name", UNASKED)
def test_what_is_known_is_not_asked(name):
    layout, fn, weight = UNASKED[name]
    assert jlora.layouts(fn, {"w": weight}, X) == {"w": layout}  # a warning is an error


def by_token(p, x, t):
    return jnp.einsum("td,tdf->tf", x, p["w"][t])


LOOKUPS = {
    "einsum": by_token,
    "mapped": lambda p, x, t: jax.vmap(lambda x, t: x @ p["w"][t])(x, t),
    "take": lambda p, x, t: (x[:, None] @ jnp.take(p["w"], t, axis=0))[:, 0],
    "cast": lambda p, x, t: jnp.einsum("td,tdf->tf", x, p["w"].astype(jnp.float32)[t] * 2.0),
    "transposed": lambda p, x, t: jnp.einsum("td,tfd->tf", x, jnp.swapaxes(p["w"][t], 1, 2)),
    "in jit": jax.jit(by_token),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LOOKUPS)
def test_a_matrix_for_each_token_is_a_stack_of_experts(name):
    fn, base = LOOKUPS[name], {"w": w(3, 8, 4)}
    layouts = jlora.layouts(fn, base, X, TOKENS)
    assert layouts == {"w": "io"}
    rules = {"w": jlora.LoraSpec(2)}
    params = jlora.attach(base, rules, key=jax.random.key(0), layouts=layouts)
    params = jax.tree.map(lambda x: x + 0.1, params)
    assert params["w"].lora_a.shape == (3, 8, 2)
    got = jlora.lora(fn, fallback="error")(params, X, TOKENS)
    np.testing.assert_allclose(got, fn(jlora.merge(params), X, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attn/q_einsum", "layers/0/kv_einsum", "Attention_0/w", "query"])
def test_an_attentions_weights_are_heads(name):
    fn, weight = HEADS_OR_EXPERTS["einsum"][1:]
    assert jlora.layouts(lambda p, x: fn({"w": p[name]}, x), {name: weight}, X) == {name: "oio"}


EMBEDDINGS = {
    "2-D": ("io", lambda p, t: p["w"][t], w(6, 8)),
    "3-D": ("ioo", lambda p, t: p["w"][t], w(6, 2, 4)),
    "3-D, then a product": (
        "ioo",
        lambda p, t: jnp.einsum("thd,hdo->to", p["w"][t], w(2, 4, 5)),
        w(6, 2, 4),
    ),
    "3-D, then one with a parameter": (
        "ioo",
        lambda p, t: jnp.einsum("thd,hdo->to", p["w"][t], p["o"]),
        w(6, 2, 4),
    ),
    "tied": ("io", lambda p, t: jnp.tanh(p["w"][t]) @ p["w"].T, w(6, 8)),
    "tied, 3-D": (
        "ioo",
        lambda p, t: jnp.einsum("thd,vhd->tv", jnp.tanh(p["w"][t]), p["w"]),
        w(6, 2, 4),
    ),
    "normalized": ("ioo", lambda p, t: p["w"][t] / jnp.std(p["w"][t]), w(6, 2, 4)),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_lookup_of_rows_is_an_embedding(name):
    layout, fn, weight = EMBEDDINGS[name]
    assert jlora.layouts(fn, {"w": weight, "o": w(2, 4, 5)}, TOKENS)["w"] == layout
