"""Each wrapper of optax inside and outside of `freeze` trains the adapter as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jlora


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax adds integers to floats, and arrays of other ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def program():
    keys = jax.random.split(jax.random.key(0), 4)
    base = {"a": jax.random.normal(keys[0], (6, 8)), "b": jax.random.normal(keys[1], (8, 4))}
    base["bias"] = jnp.ones(4)
    rules = {"a|b": jlora.LoraSpec(2, init=jlora.initializers.orthogonal)}
    params = jlora.attach(base, rules, key=keys[2])
    apply = jlora.lora(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + p["bias"])
    x = jax.random.normal(keys[3], (5, 6))
    return params, lambda p: jnp.square(apply(p, x)).mean()


def extras(name, loss, params, grads):
    """What some transformations need beside gradients; each may depend on the parameters."""
    if name in ("lbfgs", "linesearch"):
        return {"value": loss(params), "grad": grads, "value_fn": loss}
    if name == "sam":
        return {"grad_fn": lambda p, _: jax.grad(loss)(p)}
    if name == "sophia":
        return {"obj_fn": loss}
    return {}


def trained(name, tx, params, loss, steps=4):
    step = jax.jit(lambda p, s: _step(name, tx, loss, p, s))
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def _step(name, tx, loss, params, state):
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params, **extras(name, loss, params, grads))
    return optax.apply_updates(params, updates), state


def chain(*txs):
    return optax.with_extra_args_support(optax.chain(*txs))


ADAM = optax.adamw(0.05, weight_decay=0.1)
INSIDE = {
    "clip": chain(optax.clip_by_global_norm(0.1), ADAM),
    "multi_steps": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "ema": chain(ADAM, optax.ema(0.5)),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
    "masked": optax.masked(ADAM, lambda p: jax.tree.map(lambda _: True, p)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(0.05),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.05), 0.05, b1=0.9),
    "muon": optax.contrib.muon(0.05),
    "lbfgs": optax.lbfgs(),
    "linesearch": chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "sophia": optax.contrib.sophia(0.01),
    "sam": optax.contrib.sam(
        optax.sgd(0.05), chain(optax.contrib.normalize(), optax.sgd(0.02)), opaque_mode=True
    ),
    "adafactor": optax.adafactor(0.05),
    "lamb": optax.lamb(0.05),
    "galore": optax.contrib.galore(0.05, rank=1),
    "decay": chain(optax.add_decayed_weights(0.1), optax.sgd(0.05)),
}
FROZEN = jlora.freeze(ADAM)
# Each wrapper outside, and what it is the same as.
OUTSIDE = {
    "clip": (optax.chain(optax.clip_by_global_norm(0.1), FROZEN), INSIDE["clip"]),
    "multi_steps": (optax.MultiSteps(FROZEN, 2).gradient_transformation(), INSIDE["multi_steps"]),
    "ema": (optax.chain(FROZEN, optax.ema(0.5)), INSIDE["ema"]),
    "apply_if_finite": (optax.apply_if_finite(FROZEN, 3), INSIDE["apply_if_finite"]),
    "inject_hyperparams": (
        optax.inject_hyperparams(lambda rate: jlora.freeze(optax.adamw(rate)))(0.05),
        INSIDE["inject_hyperparams"],
    ),
    "masked": (
        optax.masked(FROZEN, lambda p: jax.tree.map(lambda _: True, p)),
        INSIDE["masked"],
    ),
    "schedule_free": (
        optax.contrib.schedule_free(jlora.freeze(optax.sgd(0.05)), 0.05, b1=0.9),
        INSIDE["schedule_free"],
    ),
    "decay": (
        optax.chain(optax.add_decayed_weights(0.1), jlora.freeze(optax.sgd(0.05))),
        INSIDE["decay"],
    ),
    "linesearch": (
        chain(jlora.freeze(optax.sgd(1.0)), optax.scale_by_backtracking_linesearch(5)),
        INSIDE["linesearch"],
    ),
    "sam": (
        optax.contrib.sam(
            jlora.freeze(optax.sgd(0.05)),
            chain(optax.contrib.normalize(), optax.sgd(0.02)),
            opaque_mode=True,
        ),
        INSIDE["sam"],
    ),
}


def alone(name, tx, params, loss):
    """Train a dictionary of the trainable leaves, which knows nothing of nodes or holes."""
    trainable, frozen = jlora.partition(params)
    leaves, tree = jax.tree.flatten(trainable)
    names = [f"leaf{k}" for k in range(len(leaves))]
    back = lambda t: jlora.combine(tree.unflatten([t[k] for k in names]), frozen)
    return back(trained(name, tx, dict(zip(names, leaves, strict=True)), lambda t: loss(back(t))))


def same(got, want, before):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    frozen = [jlora.partition(t)[1] for t in (got, before)]
    # An interpolation, (1 - c) z + c z, rounds; nothing else may touch what is frozen.
    for a, b in zip(*map(jax.tree.leaves, frozen), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (got, before)), strict=True))


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", INSIDE)
def test_inside_of_freeze_it_trains_the_adapter_as_alone(name):
    params, loss = program()
    got = trained(name, jlora.freeze(INSIDE[name]), params, loss)
    same(got, alone(name, INSIDE[name], params, loss), params)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_freeze_it_trains_the_adapter_as_alone(name):
    params, loss = program()
    outside, inside = OUTSIDE[name]
    same(trained(name, outside, params, loss), alone(name, inside, params, loss), params)


@pytest.mark.nightly
def test_lookahead_synchronizes_the_trainable_tree():
    """It has two copies of the parameters of its own, so it takes the trainable tree."""
    params, loss = program()
    trainable, frozen = jlora.partition(params)
    tx = optax.lookahead(optax.sgd(0.05), 2, 0.5)
    pair = optax.LookaheadParams.init_synced(trainable)
    state = tx.init(pair)
    for _ in range(2):
        grads = jax.grad(lambda t: loss(jlora.combine(t, frozen)))(pair.fast)
        updates, state = tx.update(grads, state, pair)
        pair = optax.apply_updates(pair, updates)
    whole = optax.LookaheadParams.init_synced(params)
    frozen_tx = optax.lookahead(jlora.freeze(optax.sgd(0.05)), 2, 0.5)
    state = frozen_tx.init(whole)
    for _ in range(2):
        updates, state = frozen_tx.update(jax.grad(loss)(whole.fast), state, whole)
        whole = optax.apply_updates(whole, updates)
    same(whole.slow, jlora.combine(pair.slow, frozen), params)


def test_the_state_is_that_of_training_the_adapter_alone():
    params, _ = program()
    tx = optax.chain(optax.clip_by_global_norm(1.0), ADAM)
    frozen, alone = jlora.freeze(tx).init(params), tx.init(jlora.partition(params)[0])
    same = jax.tree.map(jnp.array_equal, jax.tree.leaves(frozen), jax.tree.leaves(alone))
    assert type(frozen) is type(alone) and all(same)
