"""Rules from outside: a primitive and a Pallas kernel of one's own, through public names."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import jlora
from jlora import LoraSpec
from jlora.transform import Probe, View, Walk, product, rule

NUMBERS = (((1,), (0,)), ((), ()))
X = jnp.linspace(-1.0, 1.0, 15).reshape(3, 5)
fresh = (f"of_one_s_own_{n}" for n in itertools.count())


def primitive():
    """A new primitive that computes x @ w, and its own derivative."""
    p = Primitive(next(fresh))
    p.def_impl(jax.jit(jnp.matmul))
    p.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[1]), x.dtype))
    mlir.register_lowering(p, mlir.lower_fun(jnp.matmul, multiple_results=False))
    ad.defbilinear(p, lambda ct, x, w: ct @ w.T, lambda ct, x, w: x.T @ ct)
    return p.name, p.bind


def kernel():
    """A new Pallas kernel that computes x @ w."""
    name = next(fresh)

    def body(x, w, out):
        out[...] = x[...] @ w[...]

    def call(x, w):
        out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
        return pl.pallas_call(body, out, interpret=True, name=name)(x, w)

    return name, call


def by_helper(walk, eqn, x, w):
    return product(walk, eqn, (x, w), NUMBERS)


def by_hand(walk: Walk, eqn, x, w):
    if not isinstance(w, View) or isinstance(x, View):
        return NotImplemented
    a, b = w.factors
    return [walk.bind(eqn, x, w)[0] + (walk.drop(x, eqn.invars[0]) @ a) @ b.T]


@pytest.fixture(params=["primitive", "kernel"])
def matmul(request):
    """Return what registers a rule of a new function that multiplies, and the function."""
    if request.param == "primitive":
        name, call = primitive()
        return lambda fn, **kw: rule(name, **kw)(fn), call
    name, call = kernel()
    return lambda fn, **kw: rule("pallas_call", kernel=name, **kw)(fn), call


def params(**kw):
    tree = {"w": jax.random.normal(jax.random.key(1), (5, 7))}
    tree = jlora.attach(tree, {"w": LoraSpec(2, **kw)}, key=jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1, tree)


def close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.sample(3)
@pytest.mark.parametrize("fn", [by_helper, by_hand])
def test_the_law(matmul, fn):
    register, call = matmul
    assert register(fn, kind="product") is fn

    def model(p, x):
        return jnp.tanh(call(x, p["w"]))

    tree, run = params(), jlora.lora(model, fallback="error")
    want = model(jlora.merge(tree), X)
    close(run(tree, X), want)
    close(jax.jit(run)(tree, X), want)

    def made(fn, tree):
        return Counter(
            (e.primitive.name, v.aval.shape)
            for e in equations(jax.make_jaxpr(fn)(tree, X))
            for v in e.outvars
            if v.aval.shape in ((5, 7), (3, 2)) and e.primitive.name != "stop_gradient"
        )

    # A kernel reads the base, with a rule and without.
    more = made(run, tree) - made(model, {"w": tree["w"].base})
    assert {shape for _, shape in more} == {(3, 2)}, "x A, and nothing of W's shape"


def test_the_gradient():
    name, call = primitive()
    rule(name, kind="product")(by_helper)

    def by(fn):
        return jax.grad(lambda t, frozen: fn(jlora.combine(t, frozen), X).sum())

    def model(p, x):
        return jnp.tanh(call(x, p["w"]))

    parts = jlora.partition(params())
    close(
        by(jlora.lora(model, fallback="error"))(*parts),
        by(lambda p, x: model(jlora.merge(p), x))(*parts),
    )


def test_the_helper_knows_the_gain_dropout_layouts_and_explain(matmul):
    register, call = matmul
    register(by_helper, kind="product")

    def model(p, x):
        return call(x, p["w"])

    def same(p, x):
        return x @ p["w"]

    tree = params(dora=True)
    close(jlora.lora(model, fallback="error")(tree, X), model(jlora.merge(tree), X))
    drop = {"dropout": 0.5, "key": jax.random.key(3)}
    close(jlora.lora(model, **drop)(tree, X), jlora.lora(same, **drop)(tree, X))
    plain = {"w": jnp.ones((5, 7))}
    assert jlora.layouts(model, plain, X) == jlora.layouts(same, plain, X) == {"w": "io"}
    (use,) = jlora.explain(model, tree, X).uses
    assert use.factored


def test_two_weights_and_a_weight_on_the_left(matmul):
    register, call = matmul
    register(by_helper, kind="product")

    def model(p, x):
        return call(p["w"].T, x.T), call(p["w"].T, p["w"])

    tree = params()
    close(jlora.lora(model, fallback="materialize")(tree, X), model(jlora.merge(tree), X))


def test_a_rule_that_does_not_know_the_gain_never_sees_one(matmul):
    """A forgotten gain costs a dense weight, which is told, and never another number."""
    register, call = matmul
    register(by_hand, kind="join")
    tree = params(dora=True)

    def model(p, x):
        return call(x, p["w"])

    with pytest.raises(
        ValueError, match=r'"w".*its rule does not support a weight with DoRA\'s gain'
    ):
        jlora.lora(model, fallback="error")(tree, X)
    close(jlora.lora(model, fallback="materialize")(tree, X), model(jlora.merge(tree), X))
    close(jlora.lora(model, fallback="error")(params(), X), model(jlora.merge(params()), X))


def test_a_primitive_that_rearranges():
    name = next(fresh)
    p = Primitive(name)
    p.def_impl(lambda x: x[::-1])
    p.def_abstract_eval(lambda x: x)

    @rule(name, kind="rearrange")
    def _(walk, eqn, w):
        def move(f, axes):
            return jnp.flip(f, axes.index(0)) if 0 in axes else f

        return [w.moved(walk.bind(eqn, w)[0], w.roles, move)]

    def model(p_, x):
        return x @ p.bind(p_["w"])

    for tree in (params(), params(dora=True)):
        close(jlora.lora(model, fallback="error")(tree, X), model(jlora.merge(tree), X))
    assert jlora.layouts(model, {"w": jnp.ones((5, 7))}, X) == {"w": "io"}


def test_without_a_rule_the_fallback_names_the_way(matmul):
    _, call = matmul

    def model(p, x):
        return call(x, p["w"])

    with pytest.raises(
        ValueError, match=r'register a rule, `jlora.transform.rule\(".*", \.\.\.\)`'
    ):
        jlora.lora(model, fallback="error")(params(), X)
    close(jlora.lora(model, fallback="materialize")(params(), X), model(jlora.merge(params()), X))


def test_not_implemented_is_the_fallback(matmul):
    register, call = matmul
    seen = []

    def refuse(walk, eqn, x, w):
        seen.append(type(w))
        return NotImplemented

    register(refuse, kind="product")

    def model(p, x):
        return call(x, p["w"])

    with pytest.raises(ValueError, match=r"no factored form"):
        jlora.lora(model, fallback="error")(params(), X)
    assert jlora.layouts(model, {"w": jnp.ones((5, 7))}, X) == {}
    assert seen == [View, Probe]


def test_a_rule_is_not_replaced_by_accident(matmul):
    register, call = matmul
    register(lambda *_: NotImplemented, kind="product")
    with pytest.raises(ValueError, match=r"already has a rule.*pass `replace=True`"):
        register(by_helper, kind="product")
    register(by_helper, kind="product", replace=True)
    run = jlora.lora(lambda p, x: call(x, p["w"]), fallback="error")
    close(run(params(), X), X @ jlora.merge(params())["w"])
    with pytest.raises(ValueError, match=r'"dot_general" already has a rule.*linear'):
        rule("dot_general", kind="product")(by_helper)


def test_one_kernel_s_rule_is_not_another_s():
    (one, first), (_, second) = kernel(), kernel()
    rule("pallas_call", kernel=one, kind="product")(by_helper)
    jlora.lora(lambda p, x: first(x, p["w"]), fallback="error")(params(), X)
    with pytest.raises(ValueError, match="no rule for this primitive"):
        jlora.lora(lambda p, x: second(x, p["w"]), fallback="error")(params(), X)
