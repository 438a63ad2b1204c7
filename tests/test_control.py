"""Loops and branches that the table of laws lacks: no reverse mode, or weights that change."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import jlora
from jlora import LoraSpec
from jlora.transform import _walk

X = jnp.ones((3, 6))


def params(stack=(), key=5):
    w = jax.random.normal(jax.random.key(key), (*stack, 6, 6)) * 0.3
    tree = jlora.attach({"w": w}, {"w": LoraSpec(2, layout="io")}, key=jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1, tree)


def agree(fn, tree, fallback="error"):
    want = fn(jlora.merge(tree), X)
    for run in (jlora.lora(fn, fallback=fallback), jax.jit(jlora.lora(fn, fallback=fallback))):
        got = run(tree, X)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_while_closed_over_in_body_and_condition():
    def fn(p, x):
        def going(s):
            return (s[0] < 5) & (jnp.abs(s[1] @ p["w"]).sum() < 1e3)

        return lax.while_loop(going, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))

    agree(fn, params())


def test_while_with_the_weight_in_its_carry():
    def fn(p, x):
        def step(s):
            n, p, x = s
            return n + 1, p, jnp.tanh(x @ p["w"])

        return lax.while_loop(lambda s: s[0] < 3, step, (0, p, x))[2]

    agree(fn, params())


def test_a_carried_weight_that_stays_a_product_stays_factored():
    def fn(p, x):
        def step(c, _):
            w, x = c
            return (w * 0.9 + 0.01, jnp.tanh(x @ w)), x.sum()

        return lax.scan(step, (p["w"], x), length=3)

    agree(fn, params())


def test_a_carried_weight_that_becomes_another_thing_is_reported_and_right():
    def fn(p, x):
        def step(c, _):
            w, x = c
            return (jnp.tanh(w), jnp.tanh(x @ w)), x.sum()

        return lax.scan(step, (p["w"], x), length=3)

    with pytest.raises(ValueError, match=r'"w".*must be materialized for primitive "scan"'):
        jlora.lora(fn, fallback="error")(params(), X)
    agree(fn, params(), "materialize")


@pytest.mark.sample(3)
@pytest.mark.parametrize("carried", ["closed over", "handed on", "changed"])
def test_each_lane_of_a_mapped_while_has_its_own_condition(carried):
    def fn(p, x):
        def small(s):
            return jnp.abs(s[1]).sum() < 3

        def step(s):
            w, x = s
            x = jnp.tanh(x @ (p["w"] if carried == "closed over" else w)) + 0.3
            return (w * 0.9 if carried == "changed" else w), x

        return jax.vmap(lambda x: lax.while_loop(small, step, (p["w"], x))[1])(x)

    x = jnp.linspace(0.0, 1.0, 4)[:, None] * jnp.ones((4, 6))
    tree = params()
    want = fn(jlora.merge(tree), x)
    steps = [fn(jlora.merge(tree), row[None])[0] for row in x]
    np.testing.assert_allclose(want, jnp.stack(steps), rtol=1e-5)
    run = jlora.lora(fn, fallback="materialize" if carried == "changed" else "error")
    for f in (run, jax.jit(run)):
        np.testing.assert_allclose(f(tree, x), want, rtol=1e-4, atol=1e-5)


def test_a_mapped_while_draws_one_mask_for_its_condition():
    """W = 0: what a lane adds is its dropped input, and a lane that ends stays as it is."""
    node = jlora.LoraArray(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), 1.0, "io")

    def fn(p, x):
        def goes(s):
            return (s[0] @ p["w"])[0] < 10

        return jax.vmap(lambda x: lax.while_loop(goes, lambda s: (s[0] + 1, s[1] + 1), (x, 0)))(x)

    run = jlora.lora(fn, dropout=0.5, key=jax.random.key(0), fallback="error")
    x, count = run({"w": node}, jnp.zeros((8, 1)))
    np.testing.assert_array_equal(x[:, 0], count)
    assert len(set(np.asarray(count).tolist())) > 1


def test_a_scan_over_nothing_hands_on_its_carry():
    def fn(p, x):
        return x @ lax.scan(lambda w, t: (w * 2, t), p["w"], jnp.zeros((0, 3)))[0]

    agree(fn, params())


def test_branches_that_return_the_weight_with_an_axis_more():
    def fn(p, x):
        first, second = lambda w: w[None], lambda w: 2 * w[None]
        return x @ lax.cond(x[0, 0] > 0, first, second, p["w"])[0]

    agree(fn, params())


def test_another_platforms_branch_is_not_compiled():
    def elsewhere(x, w):
        return pl.pallas_call(lambda *_: None, out_shape=jax.ShapeDtypeStruct((3, 6), x.dtype))(
            x, w
        )

    def fn(p, x):
        branches = {"cpu": jnp.matmul, "cuda": jnp.matmul, "tpu": elsewhere}
        return lax.platform_dependent(x, p["w"], **branches)

    agree(fn, params(), fallback="materialize")

    def default(p, x):
        return lax.platform_dependent(x, p["w"], tpu=elsewhere, default=jnp.matmul)

    agree(default, params(), fallback="materialize")


def test_a_weight_handed_on_through_an_inner_jit_stays_factored():
    def fn(p, x):
        inner = jax.jit(lambda w, x: (w, jnp.tanh(x @ w)))
        return lax.fori_loop(0, 3, lambda _, c: inner(*c), (p["w"], x))[1]

    agree(fn, params())


def test_scans_inside_scans():
    def fn(p, x):
        def outer(x, stack):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, stack)

        return lax.scan(outer, x, p["w"])

    agree(fn, params((2, 3)))


def test_branches_that_return_the_weight_stay_factored():
    def fn(p, x):
        return x @ lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: w, p["w"])

    agree(fn, params())


def test_branches_that_return_other_things_are_reported_and_right():
    def fn(p, x):
        return x @ lax.cond(x[0, 0] > 0, lambda w: jnp.tanh(w), lambda w: w, p["w"])

    with pytest.raises(ValueError, match=r'"w".*"tanh"'):
        jlora.lora(fn, fallback="error")(params(), X)
    agree(fn, params(), "materialize")


def test_an_eager_call_of_a_jitted_function_compiles_once():
    apply, tree = jlora.lora(jax.jit(lambda p, x: jnp.tanh(x @ p["w"])), fallback="error"), params()
    apply(tree, X)
    other, compiled = X * 2, []

    def listen(name, *_, **__):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        apply(tree, other)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]


@pytest.mark.nightly
def test_jits_made_anew_at_each_call_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(_walk, "_MOST_COMPILED", 3)
    held = []

    def fn(p, x):
        def layer(x, w):
            return x @ w

        held.append(weakref.ref(layer))
        return jax.jit(layer)(x, p["w"])

    run = jlora.lora(fn)
    for _ in range(8):
        run(params(), X)
    jax.clear_caches()
    gc.collect()
    assert sum(ref() is not None for ref in held) <= 3


def test_a_jitted_layer_is_walked_once_for_all_layers():
    traced = []

    @jax.jit
    def layer(w, x):
        traced.append(1)
        return jnp.tanh(x @ w)

    def fn(p, x):
        for w in p["layers"]:
            x = layer(w, x)
        return x

    def products(layers):
        tree = {"layers": [params(key=k)["w"] for k in range(layers)]}
        return str(jax.make_jaxpr(jlora.lora(fn, fallback="error"))(tree, X)).count("dot_general[")

    assert products(6) == products(2), "the layers share one inner program"
    assert len(traced) == 1


@pytest.mark.sample(4)
@pytest.mark.parametrize("init", ["kaiming", "kaiming_rank", "gaussian", "a_zero"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", ["io", "oi"])
def test_every_initializer_starts_at_the_base(init, dtype, layout):
    spec = LoraSpec(2, init=getattr(jlora.initializers, init), dtype=dtype, layout=layout)
    base = {"w": jax.random.normal(jax.random.key(0), (6, 6)).astype(dtype)}
    tree = jlora.attach(base, {"w": spec}, key=jax.random.key(1))
    x = X.astype(dtype)

    def fn(p, x):
        return x @ p["w"]

    assert jnp.array_equal(jlora.lora(fn, fallback="error")(tree, x), fn(base, x))
    assert tree["w"].lora_a.dtype == dtype
    assert bool(tree["w"].lora_a.any()) != bool(tree["w"].lora_b.any())


def test_layers_taken_for_a_side_of_a_convolution_are_told():
    def fn(p, x):
        def layer(x, kernel):
            return jnp.einsum("th,hnd,mnd->tm", x, kernel, kernel), None

        return lax.scan(layer, x, p["w"])[0]

    base = {"w": jax.random.normal(jax.random.key(0), (3, 6, 2, 4)) * 0.2}

    def adapted(**layouts):
        tree = jlora.attach(base, {"w": LoraSpec(2)}, key=jax.random.key(0), **layouts)
        return jax.tree.map(lambda x: x + 0.1, tree)

    with pytest.warns(
        UserWarning, match=r'"w" float32\[3,6,2,4\] is scanned .*share one B'
    ) as told:
        jlora.lora(fn)(adapted(), X)
    assert len(told) == 1 and told[0].message.args[0].endswith("jlora.layouts(fn, params, x))`.")
    agree(fn, adapted(layouts=jlora.layouts(fn, base, X)))  # a warning is an error


def test_that_warning_hides_no_other_at_its_line():
    def fn(p, x):
        return lax.scan(lambda v, k: (jnp.sin(v), x.sum() * k.sum()), p["v"], p["w"])[0]

    base = {"w": jnp.ones((3, 6, 2, 4)), "v": jnp.ones((6, 6))}
    tree = jlora.attach(base, {".*": LoraSpec(2)}, key=jax.random.key(0))
    with pytest.warns(UserWarning) as told:
        jlora.lora(fn)(tree, X)
    messages = [str(w.message) for w in told]
    assert sum("is scanned along" in m for m in messages) == 1
    assert any('"v" float32[6,6] must be materialized for primitive "scan"' in m for m in messages)
