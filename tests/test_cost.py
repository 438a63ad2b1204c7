"""What the walk adds to a program, counted in equations: linear in layers, and shared by them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from test_laws import equations

import jlora


class Decoder(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            h = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
            x = x + h
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return x


X = jnp.ones((2, 3, 6))


def adapted(layers):
    model = Decoder(layers)
    base = jax.eval_shape(model.init, jax.random.key(0), X)
    layouts = jlora.layouts(model.apply, base, X)
    rules = {r".*/kernel": jlora.LoraSpec(2)}
    params = jax.eval_shape(
        lambda p: jlora.attach(p, rules, key=jax.random.key(1), layouts=layouts), base
    )
    return model.apply, base, params


def outer(fn, *args):
    """The equations of a program, not those inside its inner functions."""
    return len(jax.make_jaxpr(fn)(*args).jaxpr.eqns)


def gradient(fn):
    def of(params, x):
        trainable, frozen = jlora.partition(params)
        return jax.grad(lambda t: fn(jlora.combine(t, frozen), x).sum())(trainable)

    return of


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_equations_are_linear_in_layers(kind):
    counts = []
    for layers in (1, 2, 3, 6):
        fn, _, params = adapted(layers)
        run = jlora.lora(fn, fallback="error")
        run = gradient(run) if kind == "gradient" else run
        counts.append(len(list(equations(jax.make_jaxpr(run)(params, X)))))
    one, two, three, six = counts
    assert two - one == three - two > 0
    assert six - three == 3 * (three - two)


def test_an_adapted_product_is_one_equation_more():
    fn, base, params = adapted(3)
    products = 3 * 6  # query, key, value, out, and the two of the MLP
    extra = outer(jlora.lora(fn, fallback="error"), params, X) - outer(fn, base, X)
    assert extra == products


def test_layers_of_one_shape_share_the_added_function():
    fn, _, params = adapted(6)
    text = jax.jit(jlora.lora(fn, fallback="error")).lower(params, X).as_text()
    # Of the six adapted products of a layer query, key and value have one shape.
    assert text.count("func.func private @low_rank") == 4
    assert text.count("call @low_rank") == 6 * 6
