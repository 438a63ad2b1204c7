"""What does not train is a constant of differentiation, and no optimizer moves it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases_forms import CASES
from helpers import adapted, bits, close, coarse, loss_of, transform

import jlora

BY_NAME = {case.name: case for case in CASES}
SOME = ["matmul", "tied", "scan_stacked", "experts", "conv_2d", "dora_io"]
# One of each form, whatever its program.
FORMS = list({c.form: c for c in CASES if c.form not in (None, "lora")}.values())
EACH = [*(BY_NAME[name] for name in SOME), *FORMS]


@pytest.fixture
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def zero(tree):
    """Whether every gradient is exactly zero; an integer has none."""
    leaves = [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    return bool(leaves) and not any(np.any(np.asarray(x, np.float64)) for x in leaves)


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", EACH, ids=repr)
def test_gradients_are_the_merged_models_where_it_trains_and_zero_elsewhere(case):
    params = adapted(case)
    trainable, frozen = jlora.partition(params)

    def merged(t):
        fn = lambda p, *a: case.fn(jlora.merge(p), *a)
        return loss_of(case, fn)(jlora.combine(t, frozen), *case.args)

    loss = loss_of(case, transform(case))
    got = jax.jit(jax.grad(loss, allow_int=True))(params, *case.args)
    close(jlora.partition(got)[0], jax.jit(jax.grad(merged))(trainable), scale=coarse(case))
    assert zero(jlora.partition(got)[1])


def program(**options):
    """A loss over every kind of leaf, and its parameters."""

    def fn(p, x):
        y = jnp.tanh(x @ p["w"]) + p["bias"][None]
        return y @ p["head"] * p["gain"]

    keys = jax.random.split(jax.random.key(0), 4)
    base = {
        "w": jax.random.normal(keys[0], (6, 8)),
        "head": jax.random.normal(keys[1], (8, 5)),
        "bias": jnp.ones(8),
        "gain": jnp.float32(1.5),
    }
    rules = {"w|head": jlora.LoraSpec(2, init=jlora.initializers.orthogonal), "bias": "full"}
    params = jlora.attach(base, rules, key=keys[2])
    apply = jlora.lora(fn, fallback="error", **options)
    return lambda p, x: jnp.square(apply(p, x)).mean(), params, jax.random.normal(keys[3], (4, 6))


def test_every_kind_of_frozen_leaf_has_a_zero_gradient_and_inputs_have_one():
    loss, params, x = program()
    for grad in (jax.grad(loss, (0, 1)), jax.jit(jax.grad(loss, (0, 1))), jax.grad(jax.jit(loss))):
        got = grad(params, x)
        grads, dx = got if isinstance(got, tuple) else (got, None)
        trainable, frozen = jlora.partition(grads)
        assert zero(frozen) and float(grads["gain"]) == 0
        assert all(np.any(g != 0) for g in jax.tree.leaves(trainable))
        assert dx is None or np.any(dx != 0)


def test_freeze_false_differentiates_the_base():
    loss, params, x = program(freeze=False)
    grads = jax.grad(loss)(params, x)
    plain = jax.grad(lambda p: loss(p, x))(jlora.merge(params))
    np.testing.assert_allclose(grads["head"].base, plain["head"], rtol=1e-5)
    assert float(grads["gain"]) == pytest.approx(float(plain["gain"]), rel=1e-5)
    assert float(grads["w"].scaling) != 0


def test_a_parameter_given_by_keyword_is_frozen_and_plain_arguments_are_not():
    node = jlora.LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones(()), "io")
    apply = jlora.lora(lambda x, *, params, scale: x @ params["w"] * scale + params["b"][None])

    def loss(params, scale, x):
        return apply(x, params=params, scale=scale).sum()

    params = {"w": node, "b": jnp.ones(4)}
    grads, scale, x = jax.grad(loss, (0, 1, 2))(params, jnp.ones(()), jnp.ones((2, 3)))
    assert zero((grads["w"].base, grads["w"].scaling, grads["b"]))
    assert np.any(grads["w"].lora_a != 0) and scale != 0 and np.any(x != 0)


def test_a_tree_with_full_parameters_alone_is_frozen_too():
    apply = jlora.lora(lambda p, x: x * p["gain"] + p["shift"])
    params = {"gain": jlora.FullArray(jnp.ones(3), jnp.ones(3)), "shift": jnp.ones(3)}
    grads = jax.grad(lambda p: apply(p, jnp.full(3, 2.0)).sum())(params)
    assert zero((grads["shift"], grads["gain"].base)) and np.all(grads["gain"].value == 2)
    merged = jax.grad(lambda p: apply(p, jnp.full(3, 2.0)).sum())(jlora.merge(params))
    assert np.all(merged["shift"] == 1)  # plain parameters differentiate as before


def test_a_bound_adapter_and_forward_mode_are_frozen_the_same():
    loss, params, x = program()
    base, adapter = jlora.detach(params)
    grads = jax.grad(lambda a: loss(jlora.bind(base, a), x))(adapter)
    assert float(grads["w"].scaling) == 0 and np.any(grads["w"].lora_b != 0)
    ones = jax.tree.map(jnp.ones_like, params)
    moved = jlora.combine(jax.tree.map(jnp.zeros_like, jlora.partition(ones)[0]), ones)
    assert jax.jvp(lambda p: loss(p, x), (params,), (moved,))[1] == 0


def flops(tx, loss, params, x):
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(params, tx.init(params)).compile().cost_analysis()["flops"]


def test_clipping_inside_and_outside_of_freeze_is_one_program():
    loss, params, x = program()
    clip, sgd = optax.clip_by_global_norm(0.01), optax.sgd(0.1)
    inside, outside = jlora.freeze(optax.chain(clip, sgd)), optax.chain(clip, jlora.freeze(sgd))
    grads = jax.grad(loss)(params, x)
    a, b = (tx.update(grads, tx.init(params), params)[0] for tx in (inside, outside))
    assert float(optax.tree.norm(a)) == pytest.approx(0.001, rel=1e-5)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)
    # Zeros are squared and added where the norm is of the entire tree: constants, folded by XLA.
    costs = [flops(tx, loss, params, x) for tx in (inside, outside)]
    assert costs[1] == pytest.approx(costs[0], rel=0.01)
    loss, _, _ = program(freeze=False)
    assert flops(outside, loss, params, x) > 1.1 * costs[0], "the count shows nothing"


@pytest.mark.nightly
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("form", ["lora", "lora_fa"])
def test_a_detached_adapter_keeps_its_alpha_and_what_its_form_freezes(form):
    """Bare, under an optimizer without decay; with decay, under `freeze`."""
    _, params, x = program()
    if form != "lora":
        nodes = {k: dataclasses.replace(params[k], form=form) for k in ("w", "head")}
        params = {**params, **nodes}
    loss = program()[0]
    base, adapter = jlora.detach(params)
    for tx in (optax.adam(0.1), jlora.freeze(optax.adamw(0.1, weight_decay=0.5))):
        state, new = tx.init(adapter), adapter
        for _ in range(3):
            grads = jax.grad(lambda a: loss(jlora.bind(base, a), x))(new)
            updates, state = tx.update(grads, state, new)
            new = optax.apply_updates(new, updates)
        assert bits(new["w"].scaling) == bits(adapter["w"].scaling)
        assert (bits(new["w"].lora_a) == bits(adapter["w"].lora_a)) == (form == "lora_fa")
        assert bits(new["w"].lora_b) != bits(adapter["w"].lora_b)


def test_freeze_of_a_tree_in_which_nothing_trains_says_attach():
    with pytest.raises(ValueError, match=r"nothing in `params` trains.*jlora.attach"):
        jlora.freeze(optax.sgd(0.1)).init({"w": jnp.ones((2, 3))})


def any_tree():
    """Leaves that `jax.value_and_grad` refuses, and a loss that uses them."""
    node = jlora.LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), jnp.ones(()), "io")
    tree = {
        "w": node,
        "minus": jnp.full(4, -0.0),
        "step": jnp.array(7),
        "mask": jnp.array([True, False, True, True]),
        "key": jax.random.key(3),
        "rank": 8,
        "none": None,
    }
    fn = lambda p, x: (x @ p["w"] + p["minus"][None]) * p["mask"].astype(x.dtype)[None] * p["rank"]
    apply = jlora.lora(fn)
    return tree, lambda p, x: (apply(p, x) ** 2).mean()


@pytest.mark.sample(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("strange", [{}, {"name": "q", "activation": jnp.tanh}])
def test_value_and_grad_trains_a_tree_of_any_leaves(strange):
    params, loss = any_tree()
    params = {**params, **strange}
    x = jnp.arange(6.0).reshape(2, 3)
    tx = jlora.freeze(optax.adam(0.1))
    value, grads = jlora.value_and_grad(loss)(params, x)
    assert value == loss(params, x)
    assert zero((grads["w"].base, grads["minus"])) and grads["step"].dtype == jnp.int32
    assert grads["key"] is None and grads["rank"] == 0
    updates, _ = tx.update(grads, tx.init(params), params)
    new = jlora.apply_updates(params, updates)
    assert bits(new["minus"]) == bits(params["minus"]) and new["key"] is params["key"]
    assert all(new[name] is params[name] for name in strange) and new["rank"] == 8
    moved = grads["w"].lora_b != 0  # a masked output's gradient is zero
    want = params["w"].lora_b - 0.1 * moved
    assert jnp.any(moved) and jnp.allclose(new["w"].lora_b, want, atol=1e-5)
    if not strange:  # optax adds to numbers
        numbers, added = ({**tree, "key": None} for tree in (params, updates))
        other = optax.apply_updates(numbers, added)
        assert jnp.array_equal(other["w"].lora_b, new["w"].lora_b)
        assert other["step"] == 7 and other["mask"].dtype == bool


def test_value_and_grad_is_jaxs_for_what_trains():
    loss, params, x = program()
    want, grads = jax.value_and_grad(loss)(params, x)
    (got, aux), (mine, dx) = jax.jit(
        jlora.value_and_grad(lambda p, x: (loss(p, x), x.shape[0]), argnums=(0, 1), has_aux=True)
    )(params, x)
    assert aux == 4 and jnp.allclose(got, want)
    assert jax.tree.structure(mine) == jax.tree.structure(params)
    close(mine, grads)
    close(dx, jax.grad(loss, 1)(params, x))
