"""The optimizers' laws: their equations, what they are invariant to, and both ways of training."""

import dataclasses
import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import equations

import jlora
from jlora import LoraArray, LoraSpec
from jlora.optim import lora_fa, lora_plus, lora_rite, riemannian

S = 1.5
# name: shape, layout, slices. Sizes are unlike one another, so that a dense delta would be seen.
WEIGHTS = {
    "dense": ((13, 11), "io", None),
    "torch": ((11, 13), "oi", None),
    "attention": ((13, 3, 5), "ioo", None),
    "out": ((3, 5, 13), "iio", None),
    "gemma": ((3, 13, 5), "oio", None),
    "conv": ((3, 3, 5, 11), "iiio", None),
    "layers": ((2, 13, 11), "io", None),
    "experts": ((2, 3, 13, 11), "io", None),
    "sliced": ((13, 19), "io", ((0, 5), (9, 16))),
    "sliced_heads": ((2, 13, 9, 5), "ioo", ((1, 3), (4, 9))),
}

weights = pytest.mark.parametrize(("shape", "layout", "slices"), WEIGHTS.values(), ids=WEIGHTS)
OPTIMIZERS = {
    "lora_plus": lambda: optax.chain(optax.adamw(1e-2, weight_decay=0.1), lora_plus(16.0)),
    "riemannian": lambda: optax.chain(riemannian(1e-4), optax.adamw(1e-2, weight_decay=0.1)),
    "lora_rite": lambda: lora_rite(optax.linear_schedule(1e-2, 1e-3, 5), weight_decay=0.1),
    "lora_fa": lambda: lora_fa(optax.adamw(1e-2, weight_decay=0.1), scaling=S),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def drawn(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def attached(shape=(13, 11), layout="io", slices=None, **spec):
    """A node with random A and B, a parameter trained whole, and two that do not train."""
    base = {"w": drawn(0, shape) / 4, "bias": drawn(1, (7,)), "scale": drawn(2, (5,))}
    spec = LoraSpec(3, 3 * S, layout=layout, slices=slices, **spec)
    params = jlora.attach(base, {"w": spec, "bias": "full"}, key=jax.random.key(0))
    w = params["w"]
    b = (drawn(3, w.lora_b.shape) / 4).astype(w.lora_b.dtype)
    return {**params, "w": dataclasses.replace(w, lora_b=b)}


def noise(params, seed):
    """Random gradients, of whatever is in the tree."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten(drawn)


def trained(tx, params, steps=3):
    """Parameters after steps of random gradients."""
    state, update = tx.init(params), jax.jit(tx.update)
    for n in range(steps):
        updates, state = update(noise(params, n), state, params)
        params = optax.apply_updates(params, updates)
    return params


def apart(node):
    """The node as independent ones with layout "io" and nothing stacked or sliced."""
    ins = node.layout.count("i")
    stack = node.lora_a.shape[: node.lora_a.ndim - 1 - ins]
    parts = 1 if node.slices is None else len(node.slices)
    ends = [] if node.slices is None else np.cumsum([b - a for a, b in node.slices])[:-1]
    found = []
    for index in itertools.product(*map(range, stack)):
        a = node.lora_a[index].reshape(-1, node.lora_a.shape[-1])
        bs = np.split(np.asarray(node.lora_b[index]), ends, 1)
        for one, b in zip(np.split(np.asarray(a), parts, -1), bs, strict=True):
            b = b.reshape(b.shape[0], -1)
            found.append(LoraArray(None, jnp.asarray(one), jnp.asarray(b), None, "io"))
    return found


def close(got, want, most=2e-5):
    """Hold two trees together by the norm of the difference; return the worst."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    worst = 0.0
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.float64(g), np.float64(w)
        worst = max(worst, float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-30)))
    assert worst <= most, worst
    return worst


def moved(after, before):
    return jax.tree.map(lambda x, y: x - y, after, before)


# Geometry: a stack, a slice, a layout are bookkeeping only.


@pytest.mark.sample(24)
@weights
@optimizers
def test_every_pair_of_factors_is_updated_by_itself(make, shape, layout, slices):
    node = jlora.partition(attached(shape, layout, slices))[0]["w"]
    tx, whole, alone = make(), node, apart(node)
    state, states, update = tx.init(whole), tx.init(alone), jax.jit(tx.update)
    for n in range(3):
        grads = noise(whole, n)
        updates, state = update(grads, state, whole)
        each, states = update(apart(grads), states, alone)
        close(apart(updates), each)
        whole, alone = optax.apply_updates(whole, updates), optax.apply_updates(alone, each)


@pytest.mark.sample(12)
@weights
@optimizers
def test_no_array_of_the_deltas_shape(make, shape, layout, slices):
    params = jlora.partition(attached(shape, layout, slices))[0]
    tx = make()
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    (pair, *_) = apart(params["w"])
    dense = {pair.lora_a.shape[0], pair.lora_b.shape[1]}
    shapes = [x.aval.shape for eqn in equations(jaxpr.jaxpr) for x in eqn.outvars]
    assert len(shapes) > 10 and not [s for s in shapes if set(s[-2:]) == dense or len(s) > 5]


# Both ways of training.


def program(way, tx, loss):
    def freeze(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def partition(params, state):
        trainable, frozen = jlora.partition(params)
        grads = jax.grad(lambda t: loss(jlora.combine(t, frozen)))(trainable)
        updates, state = tx.update(grads, state, trainable)
        return jlora.combine(optax.apply_updates(trainable, updates), frozen), state

    return jax.jit({"freeze": freeze, "partition": partition}[way], donate_argnums=(0, 1))


def loss(params):
    w, bias, scale = (jlora.merge(params)[k] for k in ("w", "bias", "scale"))
    return (jnp.sin(w) ** 2).mean() + (bias**2).mean() + (scale**2).mean()


BOTH = {
    "dense": {},
    "dora": {"dora": True},
    "heads": {"shape": (2, 13, 9, 5), "layout": "ioo", "slices": ((1, 3), (4, 9))},
}


@pytest.mark.sample(12)
@pytest.mark.parametrize("given", BOTH.values(), ids=BOTH)
@optimizers
def test_both_ways_give_the_same_and_leave_the_frozen_alone(make, given):
    got = {}
    for way in ("freeze", "partition"):
        params = attached(**given)
        frozen = [np.asarray(x) for x in jax.tree.leaves(jlora.partition(params)[1])]
        first = np.asarray(params["w"].lora_b)
        tx = jlora.freeze(make()) if way == "freeze" else make()
        state = tx.init(params if way == "freeze" else jlora.partition(params)[0])
        step, begun = program(way, tx, loss), float(loss(params))
        params, state = step(params, state)
        with jax.no_tracing():
            for _ in range(7):
                params, state = step(params, state)
        assert float(loss(params)) < begun
        after = jax.tree.leaves(jlora.partition(params)[1])
        assert all(np.array_equal(a, b) for a, b in zip(frozen, after, strict=True))
        assert not np.array_equal(params["bias"].value, params["bias"].base)
        got[way] = moved(params["w"].lora_b, first), params
    close(got["freeze"], got["partition"], 1e-4)


@pytest.mark.sample(6)
@optimizers
def test_the_state_is_in_float32_and_updates_in_the_gradients_dtype(make):
    params = jlora.partition(attached(dtype=jnp.bfloat16))[0]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tx = make()
    updates, state = tx.update(params, tx.init(params), params)
    exact, _ = tx.update(wide, tx.init(wide), wide)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [x.dtype for x in jax.tree.leaves(params)]
    rite = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32 and x.shape[-2:] == (3, 3)]
    assert all(x.dtype == jnp.float32 for x in rite)
    close(jax.tree.map(lambda x: x.astype(jnp.float32), updates), exact, 0.02)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["lora_plus", "riemannian", "lora_rite"])
def test_all_else_goes_to_adam(name):
    params = attached(dora=True)
    trainable = jlora.partition({**params, "plain": drawn(5, (4, 3))})[0]
    trainable["plain"] = drawn(5, (4, 3))
    adam = {"lora_rite": optax.adamw(1e-2, weight_decay=0.1)}
    tx = OPTIMIZERS[name]() if name != "lora_rite" else lora_rite(1e-2, weight_decay=0.1)
    got = trained(tx, trainable)
    want = trained(adam.get(name, optax.adamw(1e-2, weight_decay=0.1)), trainable)
    rest = lambda p: (p["w"].extra["magnitude"], p["bias"].value, p["plain"])
    close(rest(got), rest(want), 1e-6)
    assert not np.allclose(got["w"].lora_b, want["w"].lora_b, atol=1e-4)


# LoRA+.


@pytest.mark.nightly
def test_plus_scales_the_update_of_b():
    params = attached(dora=True)
    before = optax.adamw(1e-2, weight_decay=0.1)
    tx, state = optax.chain(before, lora_plus(8.0)), before.init(params)
    updates, _ = before.update(noise(params, 0), state, params)
    got, _ = tx.update(noise(params, 0), tx.init(params), params)
    w = dataclasses.replace(updates["w"], lora_b=8 * updates["w"].lora_b)
    close(got, {**updates, "w": w}, 1e-6)


# Riemannian preconditioning.


def test_riemannian_is_its_equation():
    node = attached()["w"]
    grad = noise(node, 0)
    got, _ = riemannian(0.3).update(grad, optax.EmptyState(), node)
    a, b, ga, gb = (np.float64(x) for x in (node.lora_a, node.lora_b, grad.lora_a, grad.lora_b))
    close(got.lora_a, ga @ np.linalg.inv(b @ b.T + 0.3 * np.eye(3)), 1e-6)
    close(got.lora_b, np.linalg.inv(a.T @ a + 0.3 * np.eye(3)) @ gb, 1e-6)
    assert got.base is grad.base and got.scaling is grad.scaling


def path(tx, a, b, steps=10):
    """A B before and after every step towards a target, in the dtype of A and B."""
    target = jnp.asarray(drawn(7, (13, 11)), a.dtype)
    weight = jnp.asarray(np.random.default_rng(8).uniform(0.2, 2.0, (13, 11)), a.dtype)

    def loss(node):
        return jnp.sum(weight * (node.lora_a @ node.lora_b - target) ** 2)

    node = LoraArray(None, a, b, None, "io")

    @jax.jit
    def step(node, state):
        updates, state = tx.update(jax.grad(loss)(node), state, node)
        return optax.apply_updates(node, updates), state

    state, seen = tx.init(node), [a @ b]
    for _ in range(steps):
        node, state = step(node, state)
        seen.append(node.lora_a @ node.lora_b)
    return np.asarray(jnp.stack(seen))


def spread(tx, dtype, steps=10):
    """How far the paths of A B from (A, B) and (A R, R⁻¹ B) are apart, over how far they went."""
    r = jnp.array([[2.0, 1.0, 0.0], [0.0, 0.25, -1.0], [0.5, 0.0, 3.0]], dtype)
    a, b = drawn(0, (13, 3), dtype), drawn(1, (3, 11), dtype)
    one, other = path(tx, a, b, steps), path(tx, a @ r, jnp.linalg.inv(r) @ b, steps)
    went = np.linalg.norm(one[1:] - one[0], axis=(1, 2))
    return float((np.linalg.norm(other[1:] - one[1:], axis=(1, 2)) / went).max())


@pytest.mark.nightly
def test_what_is_invariant_to_how_a_b_is_factored():
    with jax.enable_x64(True):
        precise = {
            "riemannian": spread(optax.chain(riemannian(1e-14), optax.sgd(0.05)), jnp.float64),
            "lora_rite": spread(lora_rite(0.1), jnp.float64, 30),
            "lora_rite, decayed": spread(lora_rite(0.1, weight_decay=0.1), jnp.float64, 30),
            "sgd": spread(optax.sgd(0.001), jnp.float64),
            "adam": spread(optax.adam(0.1), jnp.float64),
            "riemannian, adam": spread(
                optax.chain(riemannian(1e-14), optax.adam(0.1)), jnp.float64
            ),
        }
    single = {
        "riemannian": spread(optax.chain(riemannian(1e-7), optax.sgd(0.05)), jnp.float32),
        "lora_rite": spread(lora_rite(0.1), jnp.float32),
    }
    print({k: f"{v:.1e}" for k, v in precise.items()}, {k: f"{v:.1e}" for k, v in single.items()})
    for name in ("riemannian", "lora_rite", "lora_rite, decayed"):
        assert precise[name] < 1e-9, (name, precise[name])
    for name in ("sgd", "adam", "riemannian, adam"):
        assert precise[name] > 0.1, (name, precise[name])
    assert single["riemannian"] < 1e-4 and single["lora_rite"] < 1e-4, single


# LoRA-RITE.


def rite_by_hand(a, b, gradients, lr, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 1 in numpy's float64, with Q and R of a QR decomposition for U and R."""
    a, b = np.float64(a), np.float64(b).T
    memory = [None, None]
    escapes = []
    for t, (ga, gb) in enumerate(gradients, 1):
        sides, news = [(np.float64(ga), b), (np.float64(gb).T, a)], []
        for n, (gradient, other) in enumerate(sides):
            u, r = np.linalg.qr(other)
            g = gradient @ np.linalg.inv(r)
            zero = np.zeros_like(other), np.zeros_like(g), np.zeros((len(r), len(r))), 0.0
            last, m, v, rho = memory[n] or zero
            p = u.T @ last
            moved = p @ v @ p.T
            escape = max(0.0, (np.linalg.eigvalsh(v) - np.linalg.eigvalsh(moved)).max())
            rho = b2 * (rho + escape)
            v = b2 * moved + (1 - b2) * g.T @ g / len(g)
            values, vectors = np.linalg.eigh(v / (1 - b2**t))
            roots = 1 / (np.sqrt(values + rho / (1 - b2**t)) + eps)
            m = b1 * m @ p.T + (1 - b1) * g @ (vectors * roots) @ vectors.T
            news.append(-lr * m / (1 - b1**t) @ np.linalg.inv(r).T)
            memory[n] = u, m, v, rho
            escapes.append(rho)
        a, b = a + news[0], b + news[1]
    return a, b.T, escapes


def test_rite_is_its_algorithm():
    a, b = drawn(0, (13, 3)), drawn(1, (3, 11))
    gradients = [(drawn(10 + n, (13, 3)), drawn(20 + n, (3, 11))) for n in range(6)]
    node, tx = LoraArray(None, a, b, None, "io"), lora_rite(0.3)
    state = tx.init(node)
    for ga, gb in gradients:
        updates, state = tx.update(LoraArray(None, ga, gb, None, "io"), state, node)
        node = optax.apply_updates(node, updates)
    want_a, want_b, escapes = rite_by_hand(a, b, gradients, 0.3)
    assert max(escapes) > 1e-4, "no mass escaped"
    worst = close((node.lora_a - a, node.lora_b - b), (want_a - a, want_b - b), 1e-4)
    (sides,) = [s.sides for s in jax.tree.leaves(state, is_leaf=is_rite) if is_rite(s)]
    assert [float(side.escaped) for side in sides[0]] == pytest.approx(escapes[-2:], rel=1e-3)
    print(f"worst relative error: {worst:.1e}")


def is_rite(x):
    return hasattr(x, "sides")


def test_rite_begins_where_b_is_zero():
    tx = lora_rite(0.1)
    node = LoraArray(None, drawn(0, (13, 3)), jnp.zeros((3, 11)), None, "io")
    target = drawn(7, (13, 3)) @ drawn(8, (3, 11))

    def loss(n):
        return jnp.mean((n.lora_a @ n.lora_b - target) ** 2)

    @jax.jit
    def step(node, state):
        updates, state = tx.update(jax.grad(loss)(node), state, node)
        return optax.apply_updates(node, updates), state

    state, first = tx.init(node), float(loss(node))
    after, state = step(node, state)
    assert np.array_equal(after.lora_a, node.lora_a) and np.abs(after.lora_b).max() > 0
    for _ in range(80):
        after, state = step(after, state)
    assert float(loss(after)) < 0.05 * first


def test_rite_leaves_out_directions_that_a_factor_lacks():
    """A of rank 1: B's side has one direction, and nothing is divided by zero."""
    a = jnp.concatenate([drawn(0, (13, 1))] * 3, 1)
    node = LoraArray(None, a, drawn(1, (3, 11)), None, "io")
    tx, grad = lora_rite(0.1), drawn(2, (13, 11))
    state = tx.init(node)
    for _ in range(5):
        grads = dataclasses.replace(node, lora_a=grad @ node.lora_b.T, lora_b=a.T @ grad)
        updates, state = tx.update(grads, state, node)
        assert np.linalg.matrix_rank(np.float64(updates.lora_b), 1e-3) == 1
        assert all(np.abs(x).max() < 2.0 for x in jax.tree.leaves(updates))
        node = dataclasses.replace(node, lora_b=node.lora_b + updates.lora_b)


def test_rite_has_an_orthonormal_basis_of_an_ill_conditioned_factor():
    values = np.diag([1.0, 0.03, 0.002])
    q, r = (np.linalg.qr(np.float64(drawn(n, (m, 3))))[0] for n, m in ((0, 11), (1, 3)))
    b = jnp.asarray((q @ values @ r.T).T, jnp.float32)
    node = LoraArray(None, drawn(2, (13, 3)), b, None, "io")
    tx = lora_rite(0.1)
    _, state = tx.update(node, tx.init(node), node)
    (sides,) = [s.sides for s in jax.tree.leaves(state, is_leaf=is_rite) if is_rite(s)]
    u = np.float64(sides[0][0].basis)
    close(u.T @ u, np.eye(3), 1e-5)
    close(u @ (u.T @ q), q, 1e-3)


def test_rite_makes_no_step_of_noise():
    """A gradient of one row is of rank 1, and so is its step: of one size, √in · η."""
    tx = lora_rite(1.0)
    for n in range(20):
        node = LoraArray(None, drawn(n, (13, 3)), drawn(n + 20, (3, 11)), None, "io")
        dense = 1e4 * drawn(n + 40, (13, 1)) @ drawn(n + 60, (1, 11))
        grads = dataclasses.replace(
            node, lora_a=dense @ node.lora_b.T, lora_b=node.lora_a.T @ dense
        )
        updates, _ = tx.update(grads, tx.init(node), node)
        size = np.linalg.norm(updates.lora_a @ node.lora_b)
        assert size == pytest.approx(13**0.5, rel=1e-2)


# LoRA-FA.


def test_fa_moves_the_weight_nearest_to_its_gradient():
    """`s A ∇B` is the weight's gradient, projected on what A reaches, and A stays."""
    params = jlora.partition(attached())[0]["w"]
    tx, dense = lora_fa(optax.sgd(1.0), scaling=S, delta=1e-9), np.float64(drawn(4, (13, 11)))
    a, b = np.float64(params.lora_a), np.float64(params.lora_b)
    grads = dataclasses.replace(
        params, lora_a=jnp.float32(S * dense @ b.T), lora_b=jnp.float32(S * a.T @ dense)
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    close(-S * a @ np.float64(updates.lora_b), a @ np.linalg.lstsq(a, dense)[0], 1e-5)
    assert not np.any(updates.lora_a)


def test_fa_has_no_state_for_a():
    params = attached(dora=True)
    state = jlora.freeze(OPTIMIZERS["lora_fa"]()).init(params)
    w = params["w"]
    each = w.lora_b.size + w.extra["magnitude"].size + params["bias"].value.size
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * each + 1


@pytest.mark.nightly
def test_fa_takes_each_nodes_own_scaling_from_the_whole_tree():
    shape, layout = (2, 13, 11), "io"
    params = attached(shape, layout)
    w = dataclasses.replace(params["w"], scaling=jnp.array([0.5, 3.0]))
    params = {**params, "w": w}
    tx = lora_fa(jlora.freeze(optax.sgd(1.0)))
    updates, _ = tx.update(noise(params, 0), tx.init(params), params)
    trainable, grads = (jlora.partition(p)[0] for p in (params, noise(params, 0)))
    for n, s in enumerate((0.5, 3.0)):
        given = lora_fa(optax.sgd(1.0), scaling=s)
        want, _ = given.update(grads, given.init(trainable), trainable)
        close(updates["w"].lora_b[n], want["w"].lora_b[n], 1e-6)
    close(updates["w"].base, jnp.zeros(shape), 0)


# Errors.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tree_without_lora_arrays(name):
    says = rf"`jlora.optim.{name}\(.*\)`: there is no `LoraArray` in the parameters.*`jlora.attach`"
    with pytest.raises(ValueError, match=says):
        OPTIMIZERS[name]().init({"w": jnp.ones((3, 4))})


@pytest.mark.parametrize("name", ["riemannian", "lora_rite", "lora_fa"])
@pytest.mark.parametrize("form", ["lora_xs", "vera", "adalora"])
def test_what_stands_between_the_factors(name, form):
    says = rf'`jlora.optim.{name}\(.*\)`: the update of "w" has other parts between A and B'
    with pytest.raises(ValueError, match=says):
        OPTIMIZERS[name]().init(attached(form=form))


def test_the_form_whose_a_is_frozen():
    """Over the whole tree the optimizer sees A, and steps as it does over the form "lora"."""
    tx = lora_fa(jlora.freeze(optax.adam(1e-2)))
    got, want = (trained(tx, attached(form=form)) for form in ("lora_fa", "lora"))
    close(got["w"].lora_b, want["w"].lora_b, 1e-6)
    assert (got["w"].lora_a == attached()["w"].lora_a).all()


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["none", "masked"])
@pytest.mark.parametrize("part", ["lora_a", "lora_b"])
@pytest.mark.parametrize("name", ["riemannian", "lora_rite", "lora_fa"])
def test_a_factor_that_is_taken_out(name, part, hole):
    node = dataclasses.replace(attached()["w"], **{part: hole})
    says = rf'`jlora.optim.{name}\(.*\)`: {part} of "layer/w" is missing.*`jlora.freeze\(tx\)`'
    with pytest.raises(ValueError, match=says):
        OPTIMIZERS[name]().init({"layer": {"w": node}})


@pytest.mark.parametrize("name", ["riemannian", "lora_rite", "lora_fa"])
def test_an_update_without_parameters(name):
    params = jlora.partition(attached())[0]
    tx = {
        "riemannian": riemannian,
        "lora_rite": functools.partial(lora_rite, 0.1),
        "lora_fa": functools.partial(lora_fa, optax.sgd(0.1), scaling=2.0),
    }[name]()
    says = rf"`jlora.optim.{name}\(.*\)`: the update.*`tx.update\(grads, state, params\)`"
    with pytest.raises(ValueError, match=says):
        tx.update(params, tx.init(params))


def test_a_scaling_that_is_not_known():
    params, tx = attached(), lora_fa(optax.sgd(0.1))
    says = r'`jlora.optim.lora_fa\(tx\)`: the scaling of "w".*scaling=spec.s.*lora_fa\(jlora.freeze'
    with pytest.raises(ValueError, match=says):
        tx.init(jlora.partition(params)[0])
    with pytest.raises(ValueError, match=says):
        jlora.freeze(tx).init(params)


# What beartype would refuse first under this suite's import hook is asked of a plain Python.
PLAIN = {
    "lora_plus(optax.adam(0.1))": (
        "`jlora.optim.lora_plus(ratio)`: this does not wrap an optimizer. Use it in a chain: "
        "`optax.chain(tx, jlora.optim.lora_plus(16.0))`."
    ),
    "riemannian(optax.adam(0.1))": (
        "`jlora.optim.riemannian(delta)`: this does not wrap an optimizer. Use it in a chain: "
        "`optax.chain(jlora.optim.riemannian(), tx)`."
    ),
    "lora_fa(0.1)": (
        "`jlora.optim.lora_fa(0.1)`: pass the optimizer to wrap: "
        "`jlora.optim.lora_fa(optax.adamw(1e-4))`."
    ),
}


def test_an_optimizer_where_a_number_belongs_and_the_reverse():
    code = "import jlora, optax\n" + "".join(
        f"try: jlora.optim.{expression}\nexcept TypeError as e: print(e)\n" for expression in PLAIN
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == list(PLAIN.values())


def test_a_delta_of_zero():
    with pytest.raises(ValueError, match=r"riemannian\(delta=0\)`: give a delta above 0.*B is"):
        riemannian(0)


def test_tied_parameters_are_refused():
    params = {"q": jnp.ones((4, 6)), "k": jnp.ones((4, 6))}
    params = jlora.attach(params, {".*": LoraSpec(2)}, key=jax.random.key(0))
    tied = jlora.tie(params, {".*": ("lora_a",)})
    for tx in (riemannian(), lora_rite(1e-3), lora_fa(optax.adam(1e-3))):
        with pytest.raises(ValueError, match=r'lora_a of "q" is another node\'s'):
            jlora.freeze(tx).init(tied)
