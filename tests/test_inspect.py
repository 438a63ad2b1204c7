"""What is reported of adapters, against the dense matrices in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says
from updates import dense, far, matrix, node_of

import jlora
from jlora import FullArray
from jlora.arithmetic import inspect, similarity

SHAPE, LAYOUT = (2, 9, 4, 3), "ioo"


def node(shape=SHAPE, layout=LAYOUT, rank=3, seed=0, slices=None):
    made = node_of(shape, layout, slices, rank, seed=seed)
    return dataclasses.replace(made, **{k: jnp.asarray(v) for k, v in made.parts.items()})


def spectrum(update):
    return np.linalg.svd(update, compute_uv=False)


def test_norms_and_spectra():
    one, base = node(), jnp.asarray(np.random.default_rng(5).normal(size=SHAPE), jnp.float32)
    update = matrix(one, dense(one, SHAPE))
    for found in (inspect({"w": one}), inspect({"w": one}, {"w": base})):
        found = found["w"]
        s = spectrum(update)[:, :3]
        assert far(found["singular_values"], s) < 1e-6
        assert far(found["norm"], np.linalg.norm(update, axis=(1, 2))) < 1e-6
        p = s / s.sum(1, keepdims=True)
        assert far(found["effective_rank"], np.exp(-(p * np.log(p)).sum(1))) < 1e-5
    w = matrix(one, np.float64(base))
    want = np.linalg.norm(update, axis=(1, 2)) / np.linalg.norm(w, axis=(1, 2))
    assert far(found["relative"], want) < 1e-6
    # The vectors of the outputs: of every stack element by itself.
    vs, ours = (np.linalg.svd(x, full_matrices=False)[2] for x in (w, w + update))
    for k in (1, 10):
        found = inspect({"w": one}, {"w": base}, top=k, threshold=0.9)["w"]
        cosines = np.abs(np.einsum("sjo,sio->sji", ours[:, :k], vs)).max(-1)
        np.testing.assert_array_equal(found["intruders"], (cosines < 0.9).sum(1))
    assert found["intruders"].sum() > 0


def test_an_intruder_is_a_new_direction():
    base = {"w": jnp.diag(jnp.arange(8.0, 0, -1))}
    new = jnp.zeros((8, 1)).at[7].set(1.0)
    turned = jlora.LoraArray(None, new, jnp.ones((1, 8)), 30.0, "io")  # as all outputs: none's
    along = dataclasses.replace(turned, lora_b=new.T)  # the last direction, only stronger
    assert inspect({"w": turned}, base, top=1)["w"]["intruders"] == 1
    assert inspect({"w": along}, base, top=1)["w"]["intruders"] == 0


@pytest.mark.nightly
def test_slices_and_parameters_trained_in_full():
    sliced = node((6, 9), "io", 2, slices=((0, 3), (5, 9)))
    base = {"w": jnp.ones((6, 9)), "b": jnp.asarray([3.0, 4.0])}
    full = FullArray(None, jnp.asarray([3.0, 6.0]))
    found = inspect({"w": sliced, "b": full}, base)
    assert far(found["w"]["singular_values"], spectrum(dense(sliced, (6, 9)))[:4]) < 1e-6
    assert found["b"]["norm"] == 2 and found["b"]["relative"] == np.float32(0.4)
    zero = inspect({"b": FullArray(jnp.zeros(2), jnp.ones(2))})["b"]["relative"]
    assert zero == np.inf


@pytest.mark.nightly
def test_cosines_and_overlaps():
    adapters = [
        {"w": node(seed=1), "v": node((7, 5), "io", 2, seed=2)},
        {"w": node(rank=2, seed=3), "v": None},
        {"w": None, "v": node((7, 5), "io", 1, seed=4)},
    ]
    shapes = {"w": SHAPE, "v": (7, 5)}
    flat = [
        np.concatenate(
            [
                np.ravel(dense(a[p], s) if a[p] is not None else np.zeros(s))
                for p, s in shapes.items()
            ]
        )
        for a in adapters
    ]
    cosine = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in flat] for x in flat]
    found = similarity(adapters)
    np.testing.assert_allclose(found["cosine"], cosine, atol=1e-6)

    def bases(x, shape):
        u, _, vt = np.linalg.svd(matrix(x, dense(x, shape)), full_matrices=False)
        r = x.rank
        return u[..., :r], np.swapaxes(vt[..., :r, :], -1, -2)

    def overlap(i, j, side):
        each = []
        for path, shape in shapes.items():
            pair = [adapters[k][path] for k in (i, j)]
            if None not in pair:
                x, y = (bases(a, shape)[side] for a in pair)
                inner = np.swapaxes(x, -1, -2) @ y
                least = min(a.rank for a in pair)
                each.append(((inner**2).sum((-2, -1)) / least).mean())
        return np.mean(each) if each else 0

    for side, name in enumerate(("inputs", "outputs")):
        want = [[overlap(i, j, side) for j in range(3)] for i in range(3)]
        np.testing.assert_allclose(found[name], want, atol=1e-5)
    np.testing.assert_allclose(np.diagonal(found["inputs"]), 1, atol=1e-5)


def test_a_parameter_trained_in_full_counts():
    base = jnp.zeros((7, 5))
    one = node((7, 5), "io", 2)
    full = {"w": FullArray(base, jnp.asarray(dense(one, (7, 5)), jnp.float32))}
    found = similarity([full, {"w": one}, {"w": dataclasses.replace(one, scaling=-one.scaling)}])
    want = [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    np.testing.assert_allclose(found["cosine"], want, atol=1e-5)
    np.testing.assert_allclose(found["inputs"], [[0, 0, 0], [0, 1, 1], [0, 1, 1]], atol=1e-5)


REFUSED = {
    "original": (lambda: inspect({"b": FullArray(None, jnp.ones(2))}), "a detached adapter lacks"),
    "shape": (lambda: inspect({"w": node()}, {"w": jnp.ones((2, 9, 4, 5))}), "needs lora_a"),
    "paths": (lambda: inspect({"w": node()}, {"v": jnp.ones(3)}), "the trees differ"),
    "top": (lambda: inspect({"w": node()}, top=0), "`top` is 0"),
    "threshold": (lambda: inspect({"w": node()}, threshold=5.0), "a cosine, a number in (0, 1)"),
}


@pytest.mark.parametrize(("run", "part"), REFUSED.values(), ids=REFUSED)
def test_refused(run, part):
    with pytest.raises(ValueError, match=says("`jlora.", part)):
        run()
