"""Methods that merge updates, against the formulas of their papers in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, says
from updates import dense, far, matrix, node_of

import jlora
from jlora import FullArray, LoraSpec
from jlora.arithmetic import (
    add,
    breadcrumbs,
    dare,
    della,
    knots,
    magnitude,
    sce,
    slerp,
    ties,
)

KEY = jax.random.key(0)
SHAPE = (12, 10)


def drawn(shape, rank, slices=None):
    return jax.tree.map(jnp.asarray, node_of(shape, "io", slices, rank, seed=rank))


def with_base(node, shape):
    return dataclasses.replace(jax.tree.map(jnp.asarray, node), base=jnp.zeros(shape))


NODES = [with_base(node_of(SHAPE, "io", None, 3, seed=n, scalar=True), SHAPE) for n in range(3)]
ADAPTERS = [{"w": node} for node in NODES]
DELTAS = np.stack([dense(node, SHAPE) for node in NODES])
WEIGHTS = [1.0, 0.5, 2.0]


def of(adapter):
    """The update: the base is zero."""
    return np.float64(adapter["w"].value)


def top(x, part, first=0):
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    mask = np.zeros(x.size, bool)
    mask[order[first : first + int(part * x.size)]] = True
    return np.where(mask.reshape(x.shape), x, 0)


def disjoint(taus, weights):
    """The election and the disjoint mean of TIES."""
    sign = np.where(taus.sum(0) >= 0, 1, -1)
    agree = np.sign(taus) == sign
    return np.einsum("n,nio->io", weights, taus * agree) / np.maximum(agree.sum(0), 1)


def linear(taus, weights):
    return np.einsum("n,nio->io", weights, taus)


def variance_energy_sign(taus, part):
    """SCE."""
    taus = taus * (top(taus.var(0), part) != 0)
    eta = (taus**2).sum((1, 2)) / (taus**2).sum()
    left = np.sign(taus) == np.where(taus.sum(0) >= 0, 1, -1)
    return linear(taus * left, eta) / np.maximum(linear(left, eta), 1e-6)


def aligned(deltas, weights, part):
    """KnOTS-TIES by the dense decomposition, without the directions of rounding size."""
    u, s, vt = np.linalg.svd(deltas.reshape(-1, SHAPE[1]), full_matrices=False)
    u, s, vt = u[:, :9], s[:9], vt[:9]  # three updates of rank 3
    us = u.reshape(3, SHAPE[0], -1)
    merged = disjoint(np.stack([top(x, part) for x in us]), weights)
    return (merged * s) @ vt


METHODS = {
    "ties": (
        lambda xs: ties(xs, WEIGHTS, density=0.3),
        disjoint(np.stack([top(x, 0.3) for x in DELTAS]), WEIGHTS),
    ),
    "ties_all": (lambda xs: ties(xs, WEIGHTS, density=1), disjoint(DELTAS, WEIGHTS)),
    "magnitude": (
        lambda xs: magnitude(xs, WEIGHTS, density=0.3),
        linear(np.stack([top(x, 0.3) for x in DELTAS]), WEIGHTS),
    ),
    "breadcrumbs": (
        lambda xs: breadcrumbs(xs, WEIGHTS, density=0.6, outliers=0.1),
        linear(np.stack([top(x, 0.6, 12) for x in DELTAS]), WEIGHTS),
    ),
    "breadcrumbs_ties": (
        lambda xs: breadcrumbs(xs, WEIGHTS, density=0.6, outliers=0.1, elect=True),
        disjoint(np.stack([top(x, 0.6, 12) for x in DELTAS]), WEIGHTS),
    ),
    "dare_all": (lambda xs: dare(xs, WEIGHTS, density=1, key=KEY), linear(DELTAS, WEIGHTS)),
    "sce": (lambda xs: sce(xs, density=0.4), variance_energy_sign(DELTAS, 0.4)),
    "sce_all": (lambda xs: sce(xs), variance_energy_sign(DELTAS, 1.0)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(("run", "want"), METHODS.values(), ids=METHODS)
def test_is_the_papers_formula(run, want):
    assert far(of(run(ADAPTERS)), want) < 1e-5


@pytest.mark.nightly
def test_knots_is_ties_of_what_is_aligned():
    """The sign of a singular vector is arbitrary, and TIES does not depend on it."""
    got = knots(ADAPTERS, WEIGHTS, density=0.5)["w"]
    assert got.rank == 9 and far(dense(got, SHAPE), aligned(DELTAS, WEIGHTS, 0.5)) < 1e-4
    summed = knots(ADAPTERS, WEIGHTS)["w"]
    assert far(dense(summed, SHAPE), linear(DELTAS, WEIGHTS)) < 1e-5
    small = knots(ADAPTERS, WEIGHTS, density=0.5, rank=2)["w"]
    u, s, vt = np.linalg.svd(dense(got, SHAPE), full_matrices=False)
    assert small.rank == 2 and far(dense(small, SHAPE), (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5


def test_a_rank_is_the_nearest_update():
    want = disjoint(np.stack([top(x, 0.3) for x in DELTAS]), WEIGHTS)
    u, s, vt = np.linalg.svd(want, full_matrices=False)
    got = ties(ADAPTERS, WEIGHTS, density=0.3, rank=4)["w"]
    assert got.rank == 4 and got.base is None
    assert far(dense(got, SHAPE), (u[:, :4] * s[:4]) @ vt[:4]) < 1e-5


@pytest.mark.parametrize("elect", [False, True])
def test_dare_drops_and_rescales(elect):
    run = lambda by: of(dare(ADAPTERS, by, density=0.4, key=KEY, elect=elect and by == WEIGHTS))
    each = np.stack([run([float(k == n) for k in range(3)]) for n in range(3)])
    kept = each != 0
    np.testing.assert_allclose(each[kept], (DELTAS / 0.4)[kept], rtol=1e-5)
    assert abs(kept.mean() - 0.4) < 0.1 and not (kept[0] == kept[1]).all()
    assert far(run(WEIGHTS), (disjoint if elect else linear)(each, WEIGHTS)) < 1e-5
    other = of(dare(ADAPTERS, [1.0, 0, 0], density=0.4, key=jax.random.key(1)))
    assert ((other != 0) != kept[0]).any()


def test_della_drops_small_values_more_often():
    shape = (400, 3)
    node = with_base(node_of(shape, "io", None, 3, scalar=True), shape)
    run = lambda by, elect: of(
        della([{"w": node}] * 2, by, density=0.5, epsilon=0.6, key=KEY, elect=elect)
    )
    each = np.stack([run([1.0, 0.0], False), run([0.0, 1.0], False)])
    update, kept = dense(node, shape), each != 0
    place = np.argsort(np.argsort(-np.abs(update), axis=0), axis=0)
    keep = 0.5 + 0.3 - 0.6 * place / 400
    np.testing.assert_allclose(each[kept], np.stack([update / keep] * 2)[kept], rtol=1e-5)
    large, small = (kept[:, place // 200 == k].mean() for k in (0, 1))
    assert abs(large - 0.65) < 0.05 and abs(small - 0.35) < 0.05
    assert far(run(WEIGHTS[:2], True), disjoint(each, WEIGHTS[:2])) < 1e-5


def test_slerp():
    two = [{"w": drawn((2, 6, 5), r)} for r in (2, 3)]
    x, y = (matrix(t["w"], dense(t["w"], (2, 6, 5))) for t in two)
    norm = lambda z: np.linalg.norm(z, axis=(1, 2))
    angle = np.arccos((x * y).sum((1, 2)) / norm(x) / norm(y))
    one, other = (np.sin(u * angle) / np.sin(angle) for u in (0.7, 0.3))
    want = one[:, None, None] * x + other[:, None, None] * y
    got = slerp(two, 0.3)["w"]
    assert got.rank == 5 and far(dense(got, (2, 6, 5)), want) < 1e-5
    # Of parallel updates, and of one alone, it is linear.
    same = [two[0], {"w": dataclasses.replace(two[0]["w"], scaling=3 * two[0]["w"].scaling)}]
    assert far(dense(slerp(same, 0.3)["w"], (2, 6, 5)), 1.6 * x) < 1e-5
    alone = slerp([{"w": two[0]["w"], "v": None}, {"w": None, "v": two[1]["w"]}], 0.3)
    assert far(dense(alone["w"], (2, 6, 5)), 0.7 * x) < 1e-6
    assert far(dense(alone["v"], (2, 6, 5)), 0.3 * y) < 1e-6


def test_slerp_of_other_nodes():
    """Other slices, and parameters trained in full: by the dense updates."""
    base = jnp.zeros((6, 5))
    sliced = [
        {"w": dataclasses.replace(drawn((6, 5), 2, s), base=base)} for s in (((0, 2), (3, 5)), None)
    ]
    full = [{"w": FullArray(base, jnp.asarray(dense(n["w"], (6, 5)), jnp.float32))} for n in sliced]
    want = of(slerp(full, 0.3))
    assert far(dense(slerp(sliced, 0.3)["w"], (6, 5)), want) < 1e-5
    assert far(of(slerp([full[0], sliced[1]], 0.3)), want) < 1e-5
    assert np.linalg.norm(want) > 0


def test_slerp_of_a_stack_has_an_angle_for_each_element():
    """Also where one of the two is trained in full: the other has the layout."""
    shape = (2, 6, 5)
    two = [{"w": with_base(drawn(shape, r), shape)} for r in (2, 3)]
    full = {"w": FullArray(jnp.zeros(shape), jnp.asarray(dense(two[0]["w"], shape), jnp.float32))}
    want = dense(slerp(two, 0.3)["w"], shape)
    assert far(of(slerp([full, two[1]], 0.3)), want) < 1e-5


def test_no_nan_is_trimmed_away():
    bad = dataclasses.replace(NODES[0], lora_a=NODES[0].lora_a.at[0, 0].set(jnp.nan))
    assert np.isnan(of(ties([{"w": bad}, ADAPTERS[1]], [1, 1], density=0.3))).any()


def test_stacks_layouts_and_what_is_not_adapted():
    """An element of a stack is a weight of its own, and a missing update is zero."""
    shape = (2, 5, 4, 3)
    nodes = [with_base(node_of(shape, "oio", None, 2, seed=n), shape) for n in range(2)]
    got = ties([{"w": n, "v": None} for n in nodes], [1, 1], density=0.5)
    updates = [dense(n, shape) for n in nodes]
    for k in range(2):
        taus = np.stack([top(matrix(nodes[0], u)[k], 0.5) for u in updates])
        assert far(matrix(nodes[0], of(got))[k], disjoint(taus, [1, 1])) < 1e-5
    assert got["v"] is None
    alone = sce([{"w": nodes[0]}, {"w": None}][:1] * 2, density=0.5)
    assert set(alone) == {"w"}
    lone = magnitude([{"w": nodes[0], "v": None}, {"w": None, "v": nodes[1]}], [3, 1], density=1)
    assert far(of(lone), 3 * updates[0]) < 1e-5


def test_parameters_trained_in_full_are_updates_too():
    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.normal(size=20), jnp.float32)
    values = [base + jnp.asarray(rng.normal(size=20), jnp.float32) for _ in range(2)]
    got = ties([{"b": FullArray(base, v)} for v in values], [1, 1], density=0.5, rank=3)["b"]
    taus = np.stack([top(np.float64(v - base)[:, None], 0.5) for v in values])
    assert far(got.value, np.float64(base) + disjoint(taus, [1, 1])[:, 0]) < 1e-6
    narrow = FullArray(base.astype(jnp.bfloat16), values[0].astype(jnp.bfloat16))
    same = magnitude([{"b": narrow}], [1.0], density=1)["b"].value
    assert bits(same) == bits(narrow.value)


DORA = jlora.attach({"w": jnp.ones(SHAPE)}, {"w": LoraSpec(2, dora=True)}, key=KEY)
BARE = [{"w": dataclasses.replace(node, base=None)} for node in NODES]
REFUSED = {
    "density": (lambda: ties(ADAPTERS, WEIGHTS, density=0), "density=0; it must be a number"),
    "rank": (lambda: ties(ADAPTERS, WEIGHTS, density=1, rank=0), "rank=0; it must be an integer"),
    "base": (lambda: ties(BARE, WEIGHTS, density=1), "without `rank=` the result is the weight"),
    "dora": (lambda: sce([DORA, DORA], rank=2), '"w" has a magnitude (DoRA)'),
    "knots_dora": (lambda: knots([DORA, DORA], [1, 1]), '"w" has a magnitude (DoRA)'),
    "epsilon": (
        lambda: della(ADAPTERS, WEIGHTS, density=0.9, epsilon=0.3, key=KEY),
        "Pass at most 0.2",
    ),
    "outliers": (
        lambda: breadcrumbs(ADAPTERS, WEIGHTS, density=0.9, outliers=0.2),
        "in [0, 1 - density], at most 0.1",
    ),
    "ends": (lambda: slerp(ADAPTERS, 0.5), "3 adapters; an arc has two ends"),
}


@pytest.mark.parametrize(("run", "part"), REFUSED.values(), ids=REFUSED)
def test_refused(run, part):
    with pytest.raises(ValueError, match=says("`jlora.arithmetic.", part)):
        run()


def test_the_sum_is_that_of_add():
    assert (
        far(of(magnitude(ADAPTERS, WEIGHTS, density=1)), dense(add(ADAPTERS, WEIGHTS)["w"], SHAPE))
        < 1e-6
    )
