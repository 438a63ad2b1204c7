"""Training the Flax/optax way: two ways, one program, and the frozen weights left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

MODEL = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(48), nn.gelu, nn.Dense(24)])
X, Y = jnp.ones((16, 32)) * 0.1, jnp.zeros((16, 24))
FROZEN_SHAPES = {(32, 64), (64, 48), (48, 24), (64,), (48,), (24,)}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def attached(extra=None):
    base = MODEL.init(jax.random.key(0), X)
    rules = {r".*/kernel": jlora.LoraSpec(3, init=jlora.initializers.a_zero), **(extra or {})}
    return jlora.attach(base, rules, key=jax.random.key(1))


def program(way: str, params):
    """Return a donating step, its first state, and how to read whole parameters from the state."""
    apply = jlora.lora(MODEL.apply, fallback="error")
    tx = optax.adamw(1e-2)
    if way == "freeze":
        tx = jlora.freeze(tx)

    def loss(p):
        return ((apply(p, X) - Y) ** 2).mean()

    def freeze_step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def partition_step(params, state):
        trainable, frozen = jlora.partition(params)
        value, grads = jax.value_and_grad(lambda t: loss(jlora.combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return jlora.combine(optax.apply_updates(trainable, updates), frozen), state, value

    if way == "freeze":
        return jax.jit(freeze_step, donate_argnums=(0, 1)), tx.init(params)
    return jax.jit(partition_step, donate_argnums=(0, 1)), tx.init(jlora.partition(params)[0])


def copy(tree):
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


@pytest.mark.nightly
def test_both_ways_are_one_program():
    params = attached()
    compiled = {}
    for way in ("freeze", "partition"):
        step, state = program(way, params)
        compiled[way] = step.lower(params, state).compile()
    flops = {way: c.cost_analysis()["flops"] for way, c in compiled.items()}
    temp = {way: c.memory_analysis().temp_size_in_bytes for way, c in compiled.items()}
    assert flops["freeze"] == pytest.approx(flops["partition"], rel=0.01)
    assert temp["freeze"] == pytest.approx(temp["partition"], rel=0.02)

    full = jax.jit(jax.grad(lambda p: ((MODEL.apply(p, X) - Y) ** 2).mean()))
    full_flops = full.lower(jlora.merge(params)).compile().cost_analysis()["flops"]
    assert flops["freeze"] < full_flops, "the frozen gradients must be dropped"


@pytest.mark.parametrize("way", ["freeze", "partition"])
def test_frozen_weights_are_aliased_not_copied(way):
    params = attached()
    step, state = program(way, params)
    compiled = step.lower(params, state).compile()
    size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
    for m, n in [s for s in FROZEN_SHAPES if len(s) == 2]:
        assert not any(f"f32[{m},{n}]" in line.split(" copy(")[0] for line in copies)


@pytest.mark.parametrize("way", ["freeze", "partition"])
def test_frozen_leaves_are_bit_identical_and_have_no_state(way):
    params = attached()
    before = [np.asarray(x) for x in jax.tree.leaves(jlora.partition(params)[1])]
    step, state = program(way, params)
    assert not {x.shape for x in jax.tree.leaves(state)} & FROZEN_SHAPES
    tuned, losses = copy(params), []
    for _ in range(20):
        tuned, state, loss = step(tuned, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    after = [np.asarray(x) for x in jax.tree.leaves(jlora.partition(tuned)[1])]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_both_ways_give_the_same_adapter():
    got = {}
    for way in ("freeze", "partition"):
        params = attached()
        step, state = program(way, params)
        for _ in range(3):
            params, state, _ = step(params, state)
        got[way] = jax.tree.leaves(params)
    for a, b in zip(got["freeze"], got["partition"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_full_parameters_train_and_survive_donation():
    params = attached({r".*/bias": "full"})
    base = jlora.detach(copy(params))[0]
    step, state = program("freeze", params)
    for _ in range(2):
        params, state, _ = step(params, state)
    bias = params["params"]["layers_0"]["bias"]
    assert np.array_equal(bias.base, base["params"]["layers_0"]["bias"])
    assert not np.array_equal(bias.value, bias.base)
    assert jnp.array_equal(jlora.merge(params)["params"]["layers_0"]["bias"], bias.value)


def test_the_second_step_never_retraces():
    params = attached()
    step, state = program("freeze", params)
    params, state, _ = step(params, state)
    with jax.no_tracing():
        params, state, _ = step(params, state)
        step(params, state)
