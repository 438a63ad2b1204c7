"""What the walk adds to a program, counted in equations: linear in layers, and shared by them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Decoder, equations
from jax import lax

import jlora

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
    """The equations of a program that compute, not those inside its inner functions."""
    eqns = jax.make_jaxpr(fn)(*args).jaxpr.eqns
    return sum(e.primitive.name != "stop_gradient" for e in eqns)


def gradient(fn):
    def of(params, x):
        trainable, frozen = jlora.partition(params)
        return jax.grad(lambda t: fn(jlora.combine(t, frozen), x).sum())(trainable)

    return of


def squared(fn):
    """A gradient that needs the outputs."""

    def of(params, x):
        trainable, frozen = jlora.partition(params)
        return jax.grad(lambda t: lax.integer_pow(fn(jlora.combine(t, frozen), x), 2).sum())(
            trainable
        )

    return of


@pytest.mark.sample(2)
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


def dense(rank, dtype=jnp.float32):
    """One adapted product, all of it random, and its input."""
    keys = jax.random.split(jax.random.key(0), 4)
    w, a, b, x = (
        jax.random.normal(k, s, dtype)
        for k, s in zip(keys, ((24, 32), (24, rank), (rank, 32), (5, 7, 24)), strict=True)
    )
    return {"w": jlora.LoraArray(w, a, b, jnp.float32(0.5), "io")}, x


def product(params, x):
    return x @ params["w"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("rank", [1, 8, 9])
def test_up_to_rank_8_a_differentiated_update_is_a_sum_of_terms(rank):
    params, x = dense(rank)
    run = jlora.lora(product, fallback="error")

    def found(fn):
        eqns = equations(jax.make_jaxpr(fn)(params, x))
        return [(e.primitive.name, e.outvars[0].aval.shape[-1:]) for e in eqns]

    def made(fn):
        names = [name for name, last in found(fn) if last == (32,)]
        return {name: names.count(name) for name in ("dot_general", "mul")}

    # x W and z B; a token that is decoded would compute terms as often as they are read.
    assert made(run) == {"dot_general": 2, "mul": 0}
    square = 2  # multiplications in its derivative
    terms = {"dot_general": 1, "mul": rank + square}
    products = {"dot_general": 2, "mul": square}
    assert made(squared(run)) == (terms if rank <= 8 else products)
    # A gradient is products whatever the rank: those of x by W and A, of A and of B, and z's.
    names = [name for name, _ in found(gradient(run))]
    assert names.count("dot_general") == (2 if rank <= 8 else 3) + 3


@pytest.mark.parametrize("stacked", [False, True])
def test_without_a_derivative_the_factors_stay_as_they_lie(stacked):
    (params, x), z = dense(3), 35 * 3
    x = x.reshape(35, 24)
    if stacked:  # two weights, two scalings
        params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), params)
        x, z = jnp.stack([x, x]), 2 * z
    run = jlora.lora(lambda p, x: jnp.matmul(x, p["w"]), fallback="error")
    eqns = equations(jax.make_jaxpr(run)(params, x))
    assert [e.outvars[0].aval.size for e in eqns if e.primitive.name == "mul"] == [z]
    factors = {params["w"].lora_a.size, params["w"].lora_b.size}
    moved = [e for e in eqns if e.primitive.name in ("transpose", "mul")]
    assert not factors & {e.outvars[0].aval.size for e in moved}
    want = jnp.matmul(x, jlora.merge(params)["w"])
    np.testing.assert_allclose(run(params, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("rank", [3, 12, 34, 35, 40])
def test_the_gradient_of_a_is_compiled_rank_first_over_more_tokens_than_ranks(rank):
    params, x = jax.device_put(dense(rank), jax.devices("cpu")[0])  # whatever the default is
    run = gradient(jlora.lora(product, fallback="error"))
    text = jax.jit(run).lower(params, x).compile().as_text()
    made = re.findall(r"f32\[([\d,]+)\]\S* dot\(", text)
    shapes = [f"{rank},24", f"24,{rank}"]
    assert [shape in made for shape in shapes] == [rank < 35, rank >= 35]


@pytest.mark.sample(2)
@pytest.mark.parametrize("rank", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_of_the_update_are_the_product(rank, dtype):
    params, x = dense(rank, dtype)
    found = jlora.lora(product, fallback="error")(params, x)
    assert found.dtype == dtype
    node = params["w"]
    w, a, b, x = (np.asarray(v, np.float64) for v in (node.base, node.lora_a, node.lora_b, x))
    wanted = x @ w + 0.5 * (x @ a) @ b
    bound = np.abs(x) @ np.abs(w) + 0.5 * (np.abs(x) @ np.abs(a)) @ np.abs(b)
    # x A, the update, x W and the sum are each rounded once to bfloat16.
    eps = 4 * float(jnp.finfo(dtype).eps)
    assert np.all(np.abs(np.asarray(found, np.float64) - wanted) <= eps * bound)


@pytest.mark.sample(16)
@pytest.mark.parametrize("rank", [3, 12, 40])  # in terms, turned, as it lies
@pytest.mark.parametrize("moved", [("lora_a", "lora_b"), ("lora_a",), ("lora_b",), ("scaling",)])
def test_every_form_is_differentiated_as_a_product_is(moved, rank):
    params, x = dense(rank)
    run = jlora.lora(product, fallback="error", freeze=False)

    def merged(params, x):
        return product(jlora.merge(params), x)

    def along(fn):
        """The derivative of fn, and of its gradient, as the named arrays move."""

        def of(values):
            node = dataclasses.replace(params["w"], **values)
            return jnp.sin(fn({"w": node}, x))

        values = {name: getattr(params["w"], name) for name in moved}
        ways = {name: jnp.cos(v) for name, v in values.items()}
        second = jax.jvp(jax.grad(lambda v: of(v).sum()), (values,), (ways,))[1]
        return jax.jvp(of, (values,), (ways,))[1], second

    for one, other in zip(*(jax.tree.leaves(along(f)) for f in (run, merged)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))
