"""Functions with rules of their own over a weight: the rule stays in force, and is factored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from jax import lax

import jlora
from jlora import LoraSpec

IN, OUT = 11, 7
X = jax.random.normal(jax.random.key(3), (4, IN))


def tree():
    base = {"w": jax.random.normal(jax.random.key(0), (IN, OUT))}
    params = jlora.attach(base, {"w": LoraSpec(2)}, key=jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1, params)


def close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


def gradients(fn, params, x):
    trainable, frozen = jlora.partition(params)

    def loss(trainable, x):
        return jnp.sin(fn(jlora.combine(trainable, frozen), x)).sum()

    return jax.grad(loss, argnums=(0, 1))(trainable, x)


def agree(fn, fallback="error"):
    params = tree()
    adapted, merged = jlora.lora(fn, fallback=fallback), lambda p, x: fn(jlora.merge(p), x)
    close(adapted(params, X), merged(params, X))
    close(gradients(adapted, params, X), gradients(merged, params, X))


def straight_through(bwd):
    @jax.custom_vjp
    def dense(x, k):
        return x @ k

    dense.defvjp(lambda x, k: (x @ k, (x, k)), bwd)
    return lambda p, x: dense(jnp.sin(x), p["w"])


RULES = {
    "the derivative": lambda r, ct: (ct @ r[1].T, r[0].T @ ct),
    "another one": lambda r, ct: (2.0 * ct @ r[1].T, (3.0 * r[0]).T @ ct),
    "transposed": lambda r, ct: (ct @ r[1].T, (ct.T @ r[0]).T),
    "clipped": lambda r, ct: (ct @ r[1].T, jnp.clip(r[0].T @ ct, -0.1, 0.1)),
    "of the weight": lambda r, ct: (ct @ r[1].T, r[0].T @ ct + r[1]),
    "none": lambda r, ct: (ct @ r[1].T, jnp.zeros_like(r[1])),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", RULES)
def test_a_custom_vjp_keeps_its_rule(name):
    agree(straight_through(RULES[name]), "materialize" if name == "of the weight" else "error")


@pytest.mark.parametrize("name", ["the derivative", "transposed"])
def test_the_weights_own_gradient_is_not_built(name):
    """The rule's x.T @ ct is (in, out); what trains are A and B, which it reaches factored."""
    trainable, frozen = jlora.partition(tree())
    fn = jlora.lora(straight_through(RULES[name]), fallback="error")

    def grad(trainable):
        return jax.grad(lambda t: fn(jlora.combine(t, frozen), X).sum())(trainable)

    text = jax.jit(grad).lower(trainable).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert products and not any(f"f32[{IN},{OUT}]" in line.split("=")[1][:20] for line in products)


def test_residuals_may_be_whole_or_moved_weights():
    @jax.custom_vjp
    def dense(x, k):
        return x @ k

    dense.defvjp(
        lambda x, k: (x @ k, (x, k.T, {"again": k})),
        lambda r, ct: (ct @ r[1] + 0.1 * (ct @ r[2]["again"].T), r[0].T @ ct),
    )
    agree(lambda p, x: dense(x, p["w"]))


@pytest.mark.nightly
def test_integer_and_static_arguments():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def lookup(scale, k, n):
        return k[n] * scale

    def backward(scale, n, ct):
        return jnp.zeros((IN, OUT)).at[n].add(ct * scale), None

    lookup.defvjp(lambda scale, k, n: (k[n] * scale, n), backward)
    agree(lambda p, x: x @ p["w"] + lookup(2.0, p["w"], jnp.array([1, 3, 3, 10])))


def test_a_weight_that_the_function_closes_over():
    def fn(p, x):
        @jax.custom_vjp
        def half(x):
            return x @ p["w"].T

        half.defvjp(lambda x: (x @ jnp.ones((OUT, IN)), None), lambda _, ct: (ct[:, :OUT],))
        return half(x)

    params, x = tree(), X[:, :OUT]
    close(jlora.lora(fn, fallback="error")(params, x), fn(jlora.merge(params), x))
    # JAX refuses the weight's gradient here or gives zero, by release; the input's is the rule's.
    got = jax.grad(lambda x: jlora.lora(fn, fallback="error")(params, x).sum())(X[:, :OUT])
    close(got, jnp.ones((4, OUT)))


def test_a_custom_jvp_keeps_its_rule_both_ways():
    @jax.custom_jvp
    def dense(x, k):
        return x @ k

    dense.defjvp(lambda p, t: (dense(*p), 2.0 * (t[0] @ p[1]) + 3.0 * (p[0] @ t[1])))

    def fn(p, x):
        return dense(jnp.sin(x), p["w"])

    agree(fn)
    trainable, frozen = jlora.partition(tree())

    def forward(fn):
        def value(t):
            return fn(jlora.combine(t, frozen), X)

        return jax.jvp(value, (trainable,), (trainable,))[1]

    close(forward(jlora.lora(fn, fallback="error")), forward(lambda p, x: fn(jlora.merge(p), x)))


def test_hessians():
    """In float64: sums of terms that cancel lose float32's digits in one order or another."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ jnp.ones(OUT)

    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda v: v.astype(jnp.float64), (tree(), X))
        trainable, frozen = jlora.partition(params)

        def second(f):
            loss = lambda t: f(jlora.combine(t, frozen), x).sum()
            return jax.jit(jax.hessian(loss))(trainable)

        got = second(jlora.lora(fn, fallback="error"))
        close(got, second(lambda p, x: fn(jlora.merge(p), x)))


def batched_dense(calls):
    @jax.custom_batching.custom_vmap
    def dense(x, k):
        return x @ k

    @dense.def_vmap
    def rule(size, batched, x, k):
        calls.append(tuple(batched))
        x, k = (
            v if b else jnp.broadcast_to(v, (size, *v.shape))
            for v, b in zip((x, k), batched, strict=True)
        )
        return jnp.einsum("nti,nio->nto", x, k), True

    return lambda p, x: dense(x, p["w"])


def test_a_custom_vmap_keeps_its_rule():
    calls, params = [], tree()
    fn = batched_dense(calls)
    adapted, many = jlora.lora(fn, fallback="error"), jnp.stack([X, 2 * X])
    close(adapted(params, X), X @ jlora.merge(params)["w"])
    got = jax.vmap(lambda x: adapted(params, x))(many)
    close(got, many @ jlora.merge(params)["w"])
    assert calls == [(True, False)]


def test_a_custom_vmap_over_adapters():
    calls, params = [], tree()
    base, adapter = jlora.detach(params)
    adapters = [adapter, jax.tree.map(lambda x: 2 * x, adapter)]
    fn = jlora.lora(batched_dense(calls), fallback="error")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    got = jax.vmap(lambda a: fn(jlora.bind(base, a), X))(stacked)
    want = [X @ jlora.merge(jlora.bind(base, a))["w"] for a in adapters]
    close(got, jnp.stack(want))
    assert calls == [(False, True)]


def test_inside_a_scan():
    fn = straight_through(RULES["another one"])

    def layers(p, x):
        return lax.scan(lambda c, _: (c + fn(p, x).sum(), None), 0.0, length=3)[0]

    agree(layers)


def test_no_dense_update_in_the_traced_program():
    for name in ("the derivative", "clipped"):
        fn = jlora.lora(straight_through(RULES[name]), fallback="error")
        made = [
            v.aval.shape
            for e in equations(jax.make_jaxpr(fn)(tree(), X).jaxpr)
            for v in e.outvars
            if e.primitive.name != "stop_gradient"  # of W itself, which compiles to nothing
        ]
        assert (IN, OUT) not in made


def by_jvp(fn):
    """A function whose derivative rule is that of JAX, called in the rule."""
    ruled = jax.custom_jvp(fn)
    ruled.defjvp(lambda at, along: jax.jvp(fn, at, along))
    return ruled


OF_A_WEIGHT = {
    "normalized": lambda w: w / jnp.sqrt(1 + (w * w).sum(1, keepdims=True)),
    "standardized": lambda w: (w - w.mean(0, keepdims=True)) / w.std(0, keepdims=True),
    "scaled by itself": lambda w: w * w.mean(0, keepdims=True) + w * w.mean(1, keepdims=True),
    "shifted": lambda w: w + jnp.concatenate([w[1:], w[:1] * w.mean()]),
    "in jit": jax.jit(lambda w: w + jax.jit(lambda v: v * v.mean(0, keepdims=True))(w)),
    "in scan": lambda w: lax.scan(lambda c, _: (c + w * c.mean(), None), w, length=2)[0],
    "a gram matrix": lambda w: 0.1 * w @ (0.1 * w.T @ w),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "normalized" else pytest.param(n, marks=pytest.mark.nightly) for n in OF_A_WEIGHT],
)
def test_a_rule_that_calls_jvp_is_transposed(name):
    ruled = by_jvp(OF_A_WEIGHT[name])
    agree(lambda p, x: x @ ruled(p["w"]), "materialize")


def test_a_rule_that_calls_jvp_in_forward_mode():
    trainable, frozen = jlora.partition(tree())
    ruled = by_jvp(OF_A_WEIGHT["normalized"])

    def moved(fn):
        run = lambda t: fn(jlora.combine(t, frozen), X)
        return jax.jvp(run, (trainable,), (trainable,))[1]

    fn = lambda p, x: x @ ruled(p["w"])
    got = moved(jlora.lora(fn, fallback="materialize"))
    close(got, moved(lambda p, x: fn(jlora.merge(p), x)))


def test_a_rule_that_calls_jvp_keeps_products_factored():
    """Under "error" nothing may be built: neither the weight nor its tangent."""
    ruled = by_jvp(lambda x, w: jnp.tanh(x @ w))
    agree(lambda p, x: ruled(x, p["w"]))
