"""Parts that several weights share: one leaf, the sum of the gradients, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import LoraSpec, checkpoint
from jlora._arrays import Tied

SHAPES = {"a/k": (5, 9), "b/k": (9, 7), "c/k": (7, 3, 2), "d/k": (3, 6, 5)}
LAYOUTS = {"a/k": "io", "b/k": "io", "c/k": "ioo", "d/k": "io"}
X = jax.random.normal(jax.random.key(3), (4, 5))
BOTH = ("lora_a", "lora_b")


def model(p, x):
    """Four weights of other widths, the last a stack of three that is scanned."""
    h = jnp.tanh(jnp.tanh(x @ p["a"]["k"]) @ p["b"]["k"])
    h = jnp.einsum("bi,ihd->bhd", h, p["c"]["k"]).reshape(4, 6)
    return jax.lax.scan(
        lambda h, k: (jnp.pad(jnp.tanh(h @ k), ((0, 0), (0, 1))), None), h, p["d"]["k"]
    )[0]


def adapted(**spec):
    params = {
        path[0]: {"k": jax.random.normal(jax.random.key(n), shape)}
        for n, (path, shape) in enumerate(SHAPES.items())
    }
    rules = {path: LoraSpec(2, alpha=3, layout=LAYOUTS[path], **spec) for path in SHAPES}
    params = jlora.attach(params, rules, key=jax.random.key(9))

    def moved(node):
        b = jnp.cos(jnp.arange(node.lora_b.size, dtype=jnp.float32)).reshape(node.lora_b.shape)
        return dataclasses.replace(node, lora_b=node.lora_b + b)

    return jax.tree.map(moved, params, is_leaf=lambda x: isinstance(x, jlora.LoraArray))


apply = jlora.lora(model, fallback="error")


@pytest.mark.nightly
def test_a_smaller_weight_takes_the_leading_part():
    params = adapted()
    tied = jlora.tie(params, {".*": BOTH})
    owners = {x["k"].lora_a.owner for x in tied.values() if isinstance(x["k"].lora_a, Tied)}
    assert owners == {"b/k"}  # 9 inputs; B's is "a/k", 9 outputs
    whole = jlora.untie(tied)
    a, b = params["b"]["k"].lora_a, params["a"]["k"].lora_b
    np.testing.assert_array_equal(whole["a"]["k"].lora_a, a[:5])
    np.testing.assert_array_equal(whole["c"]["k"].lora_a, a[:7])
    np.testing.assert_array_equal(whole["c"]["k"].lora_b, b[:, :6].reshape(2, 3, 2))
    np.testing.assert_array_equal(whole["d"]["k"].lora_a, np.broadcast_to(a[:6], (3, 6, 2)))
    np.testing.assert_array_equal(whole["d"]["k"].lora_b, np.broadcast_to(b[:, :5], (3, 2, 5)))
    assert whole["b"]["k"].lora_a is a and whole["a"]["k"].lora_b is b
    for path in SHAPES:
        assert whole[path[0]]["k"].base is params[path[0]]["k"].base


def test_the_layers_of_a_stack_share():
    params = adapted()
    tied = jlora.tie(params, {"d/k": ("lora_a",)})
    assert tied["d"]["k"].lora_a.shape == (1, 6, 2)
    first = params["d"]["k"].lora_a[:1]
    np.testing.assert_array_equal(jlora.untie(tied)["d"]["k"].lora_a, jnp.repeat(first, 3, 0))


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["lora", "vera", "lora_xs"])
def test_the_gradient_is_the_sum_of_the_uses(form):
    parts = ("core",) if form == "lora_xs" else BOTH
    tied = jlora.tie(adapted(form=form), {".*": parts})
    trainable, frozen = jlora.partition(tied)

    def by(fn):
        def loss(t):
            return jnp.sin(fn(jlora.untie(jlora.combine(t, frozen)), X)).sum()

        return jax.jit(jax.value_and_grad(loss))(trainable)

    got, want = by(apply), by(lambda p, x: model(jlora.merge(p), x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), got, want)
    # The owner's gradient is what its users' would add up to, each a part of its own.
    whole = jlora.untie(tied)
    one, other = jlora.partition(whole)
    each = jax.grad(lambda t: jnp.sin(apply(jlora.combine(t, other), X)).sum())(one)
    if form == "lora":
        total = np.zeros((9, 2), np.float32)
        for path in SHAPES:
            g = np.asarray(each[path[0]]["k"].lora_a).reshape(
                -1, *whole[path[0]]["k"].lora_a.shape[-2:]
            )
            total[: g.shape[1]] += g.sum(0)
        np.testing.assert_allclose(got[1]["b"]["k"].lora_a, total, rtol=2e-4, atol=1e-4)


def test_it_trains_is_stored_and_donated_once():
    params = adapted(form="vera")
    tied = jlora.tie(params, {".*": BOTH})
    count = sum(x.size for x in jax.tree.leaves(tied)) - sum(
        x.size for x in jax.tree.leaves(jlora.detach(params)[0])
    )
    outs = 9 + 7 + 6 + 3 * 5
    scalings, ranks = 1 + 1 + 1 + 3, 2 * (3 + 3)
    assert count == 2 * (9 + 9) + outs + ranks + scalings
    tx, traces = jlora.freeze(optax.adam(1e-2)), []

    def step(params, state, x):
        traces.append(1)

        def loss(p):
            return (apply(jlora.untie(p), x) ** 2).sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    run = jax.jit(step, donate_argnums=(0, 1))
    before = jax.tree.map(np.array, tied)
    state, values = tx.init(tied), []
    tied = jax.tree.map(jnp.copy, tied)
    with jax.numpy_dtype_promotion("standard"):  # optax's powers of a step count
        for _ in range(5):
            tied, state, value = run(tied, state, X)
            values.append(float(value))
    assert values[-1] < values[0] and len(traces) == 1
    np.testing.assert_array_equal(tied["b"]["k"].lora_a, before["b"]["k"].lora_a)


def test_a_checkpoint_holds_the_part_once(tmp_path):
    params = adapted()
    tied = jlora.tie(params, {"[abd]/k": ("lora_a",)})
    checkpoint.save(tmp_path / "t", tied)
    got = checkpoint.restore(tmp_path / "t", jlora.detach(params)[0])
    assert jax.tree.structure(got) == jax.tree.structure(tied)
    jax.tree.map(np.testing.assert_array_equal, got, tied)
    with pytest.raises(ValueError, match=r'that of "b/k", which has none here'):
        checkpoint.save(tmp_path / "u", {k: v for k, v in tied.items() if k != "b"})
        checkpoint.restore(
            tmp_path / "u", {k: v for k, v in jlora.detach(params)[0].items() if k != "b"}
        )


@pytest.mark.sample(3)
@pytest.mark.parametrize("pattern", ["v", ".*"])
@pytest.mark.parametrize(
    ("form", "parts"),
    [("lora", ("lora_a",)), ("vera", ("lora_a", "lora_b")), ("lora_xs", ("core",))],
)
def test_a_checkpoint_holds_what_the_layers_of_a_stack_share(tmp_path, form, parts, pattern):
    base = {"v": jnp.ones((3, 8, 6)), "w": jnp.ones((3, 8, 6))}
    spec = LoraSpec(2, layout="io", form=form)
    tied = jlora.tie(jlora.attach(base, {".*": spec}, key=jax.random.key(0)), {pattern: parts})
    checkpoint.save(tmp_path / "t", tied)
    got = checkpoint.restore(tmp_path / "t", base)
    assert jax.tree.structure(got) == jax.tree.structure(tied)
    jax.tree.map(np.testing.assert_array_equal, got, tied)
    with pytest.raises(ValueError, match="needs"):
        checkpoint.restore(tmp_path / "t", {k: jnp.ones((4, 8, 6)) for k in base})


def test_what_is_not_tied_comes_back_as_it_is():
    params = adapted()
    same = jlora.untie(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
    trainable, frozen = jlora.partition(jlora.tie(params, {".*": ("lora_a",)}))
    jax.tree.map(
        np.testing.assert_array_equal,
        jlora.combine(trainable, frozen),
        jlora.tie(params, {".*": ("lora_a",)}),
    )


def ranks():
    return jlora.attach(
        {"q": jnp.ones((4, 6)), "k": jnp.ones((4, 6))},
        {"q": LoraSpec(2), "k": LoraSpec(3)},
        key=jax.random.key(0),
    )


def slices():
    spec = LoraSpec(2, slices=((0, 3),))
    return jlora.attach({"q": jnp.ones((4, 6))}, {"q": spec}, key=jax.random.key(0))


ERRORS = {
    "no_match": (
        lambda: jlora.tie(adapted(), {"x/k": BOTH}),
        r'"x/k" matches no adapted weight.*Closest: "',
    ),
    "part": (
        lambda: jlora.tie(adapted(), {".*": ("scaling",)}),
        r"'scaling' cannot be shared; give names among \"lora_a\"",
    ),
    "none": (
        lambda: jlora.tie(adapted(), {".*": ("core",)}),
        r'the core of "a/k" cannot be shared: it has none',
    ),
    "twice": (
        lambda: jlora.tie(adapted(), {"a/k|b/k": BOTH, "b/k|a/k": ("lora_a",)}),
        r'the lora_a of "a/k" cannot be shared: it shares that of "b/k" already',
    ),
    "again": (
        lambda: jlora.tie(jlora.tie(adapted(), {".*": BOTH}), {".*": BOTH}),
        r'"a/k" is tied: a part of it is another node',
    ),
    "ranks": (
        lambda: jlora.tie(ranks(), {".*": BOTH}),
        r'the lora_a of "k" and of "q" differ in rank, dtype, form',
    ),
    "slices": (
        lambda: jlora.tie(slices(), {".*": BOTH}),
        r'"q".* is adapted on slices of its outputs',
    ),
    "used_tied": (
        lambda: apply(jlora.tie(adapted(), {".*": BOTH}), X),
        r'`jlora.lora`: "a/k" is tied.*`jlora.untie\(params\)`',
    ),
    "merged_tied": (
        lambda: jlora.merge(jlora.tie(adapted(), {".*": BOTH})),
        r'`jlora.merge`: "a/k" is tied',
    ),
    "no_base": (
        lambda: jlora.untie(jlora.detach(jlora.tie(adapted(), {".*": BOTH}))[1]),
        r'the base of "a/k" or of "b/k".* is missing.*`jlora.bind',
    ),
}


@pytest.mark.parametrize(("make", "match"), ERRORS.values(), ids=ERRORS)
def test_what_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
