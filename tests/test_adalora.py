"""AdaLoRA's choice: over stacks as over single weights, in fixed shapes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import LoraSpec, optim
from jlora.forms.adalora import VALUES

X = jax.random.normal(jax.random.key(3), (16, 7))
SETTINGS = {"target_rank": 1, "total_steps": 12, "warmup_steps": 2, "final_steps": 4, "every": 2}


def params(stacked: bool):
    """Three layers of one shape, in one leaf or in three."""
    w = jax.random.normal(jax.random.key(0), (3, 7, 7)) / 3
    spec = LoraSpec(4, alpha=8, layout="io", form="adalora")
    tree = jlora.attach({"w": w}, {"w": spec}, key=jax.random.key(1))
    if stacked:
        return tree
    return {str(k): jax.tree.map(lambda x, k=k: x[k], tree["w"]) for k in range(3)}


def stacked_loss(p, x):
    return (jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] ** 2).sum()


def single_loss(p, x):
    for k in range(3):
        x = jnp.tanh(x @ p[str(k)])
    return (x**2).sum()


def train(tree, loss, steps=12, **settings):
    """Train through the whole tree, donated; return the singular values after every step."""
    tx = jlora.freeze(optim.adalora(optax.adam(3e-2), **(SETTINGS | settings)))
    run, traces = jlora.lora(loss, fallback="error"), []

    def step(tree, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(run)(tree, X), state, tree)
        return optax.apply_updates(tree, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    tree, cores = jax.tree.map(jnp.copy, tree), []
    state = tx.init(tree)
    with jax.numpy_dtype_promotion("standard"):  # optax's powers of a step count
        for _ in range(steps):
            tree, state = step(tree, state)
            nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jlora.LoraArray))
            cores.append(np.concatenate([np.array(n.extra[VALUES]).reshape(-1, 4) for n in nodes]))
    assert len(traces) == 1
    return cores


@pytest.mark.nightly
def test_a_stack_is_chosen_from_as_single_weights_are():
    stacked, single = train(params(True), stacked_loss), train(params(False), single_loss)
    for k, (one, other) in enumerate(zip(stacked, single, strict=True)):
        np.testing.assert_array_equal(one == 0, other == 0, err_msg=str(k))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_budget_falls_and_then_stands():
    kept = [int((core != 0).sum()) for core in train(params(True), stacked_loss)]
    assert kept[:2] == [12, 12]  # the warmup
    assert kept[7:] == [3] * 5  # one a weight from the eighth step on
    falls = kept[3:8:2]  # the steps that choose
    assert falls == sorted(falls, reverse=True) and falls[0] < 12
    last = [core != 0 for core in train(params(True), stacked_loss)[7:]]
    assert all((x == last[0]).all() for x in last)


def test_between_choices_a_value_may_come_back():
    kept = [core != 0 for core in train(params(True), stacked_loss, every=3)]
    assert kept[2].sum() < kept[3].sum() == 12


def test_the_most_important_stay():
    """The gradient of one singular value is far above the others'."""
    tree = params(False)
    trainable, _ = jlora.partition(tree)
    tx = optim.adalora(optax.sgd(1.0), target_rank=1, total_steps=2)
    state = tx.init(trainable)

    def large(x):
        return x.at[2].mul(100.0) if x.ndim == 1 else x

    grads = jax.tree.map(lambda x: large(jnp.full_like(x, 1e-3)), trainable)
    for _ in range(2):
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    for node in trainable.values():
        np.testing.assert_array_equal(node.extra[VALUES] != 0, [False, False, True, False])


@pytest.mark.nightly
def test_a_gradient_that_is_passed_over_is_forgotten():
    """One NaN would stay in the mean importance, and drop every singular value."""
    tree = params(True)
    inner = optax.chain(optax.zero_nans(), optax.adam(3e-2))
    tx = jlora.freeze(optim.adalora(inner, **SETTINGS))
    state = tx.init(tree)
    gradient = jax.jit(jax.grad(jlora.lora(stacked_loss, fallback="error")))
    with jax.numpy_dtype_promotion("standard"):
        for step in range(12):
            grads = gradient(tree, X)
            if step == 3:
                grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads)
            updates, state = tx.update(grads, state, tree)
            tree = optax.apply_updates(tree, updates)
    assert int((tree["w"].extra[VALUES] != 0).sum()) == 3  # the target rank in each of three layers


def test_orthogonality_is_the_mean_distance():
    got = optim.orthogonality(params(True))
    want = []
    for node in params(False).values():
        for x in (np.array(node.lora_a), np.array(node.lora_b).T):
            want.append(np.linalg.norm(x.T @ x - np.eye(4)))
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-6)


def plain():
    return jlora.attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))


def tx(**settings):
    return optim.adalora(optax.sgd(0.1), **(SETTINGS | settings))


ERRORS = {
    "rank": (lambda: tx(target_rank=0), r"`target_rank` is 0\. Give an integer of at least 1"),
    "phases": (lambda: tx(final_steps=11), r"final_steps=11: the phases must fit into"),
    "every": (lambda: tx(every=0), r"`every` is 0\. Give an integer of at least 1"),
    "beta": (lambda: tx(beta2=1.0), r"`beta2` is 1\.0\. Give a number in \(0, 1\)"),
    "plain": (lambda: tx().init(plain()), r'no weight has singular values.*form="adalora"'),
    "above": (
        lambda: tx(target_rank=5).init(params(True)),
        r'the target rank 5 is above the rank of "w", 4',
    ),
    "params": (
        lambda: tx().update(params(True), tx().init(params(True))),
        r"Pass the parameters: `tx.update\(grads, state, params\)`",
    ),
    "orthogonality": (
        lambda: optim.orthogonality(plain()),
        r"`jlora.optim.orthogonality\(params\)`: no weight has singular values",
    ),
}


@pytest.mark.parametrize(("make", "match"), ERRORS.values(), ids=ERRORS)
def test_what_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
