"""Arithmetic of adapters: exact sums, the nearest update of a lower rank, and the way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases_forms import FORMS
from helpers import bits, says
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import DTYPES, dense, far, matrix, node_of, weights

import jlora
from jlora import FullArray, LoraSpec
from jlora.arithmetic import add, compress, extract, scale

KEY = jax.random.key(0)
counts = pytest.mark.parametrize(
    "count", [2, pytest.param(100, marks=pytest.mark.nightly)], ids=["day", "night"]
)


@st.composite
def several(draw):
    """Draw a weight, and of two or three updates of it what `term` takes."""
    weight = draw(weights())
    each = st.tuples(
        st.sampled_from([1.0, -0.7, 0.3, 2.0]),
        st.integers(0, 2),
        st.integers(1, 3),
        st.sampled_from(DTYPES),
        st.booleans(),
    )
    return weight, draw(st.lists(each, min_size=2, max_size=3))


def term(weight, seed, by, sliced, rank, dtype, scalar):
    """The base tells the number of outputs where only slices are adapted."""
    shape, layout, slices = weight
    base = np.zeros(shape, np.float32)
    return node_of(shape, layout, slices if sliced else None, rank, dtype, seed, scalar, base)


@counts
def test_add_is_the_sum_of_the_updates(count):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(st.lists(several(), min_size=10, max_size=10))
    def sampled(batch):
        nodes = [[term(w, n, *x) for n, x in enumerate(drawn)] for w, drawn in batch]
        bys = [[x[0] for x in drawn] for _, drawn in batch]
        run = lambda nodes, bys: [
            add([{"w": x} for x in of], by)["w"] for of, by in zip(nodes, bys, strict=True)
        ]
        for k, total in enumerate(jax.jit(run)(nodes, bys)):
            shape = batch[k][0][0]
            want = sum(w * dense(x, shape) for w, x in zip(bys[k], nodes[k], strict=True))
            assert total.base is None and far(dense(total, shape), want) < 1e-6

    sampled()


@counts
def test_compress_is_the_optimum(count):
    @settings(max_examples=count, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(weights(), st.sampled_from(DTYPES)), min_size=5, max_size=5))
    def sampled(batch):
        nodes = [node_of(*w, 3, dtype, seed) for seed, (w, dtype) in enumerate(batch)]
        run = lambda nodes: [[compress({"w": x}, rank=r) for r in (1, 9)] for x in nodes]
        for node, (w, _), ((small, kept), (same, _)) in zip(
            nodes, batch, jax.jit(run)(nodes), strict=True
        ):
            small, shape = small["w"], w[0]
            assert small.rank == 1 and small.slices == node.slices
            update, near = dense(node, shape), dense(small, shape)
            if node.slices is None:  # slices are approximated one by one
                s = np.linalg.svd(matrix(node, update), compute_uv=False)
                best, norm = np.sqrt((s[..., 1:] ** 2).sum(-1)), np.linalg.norm(s, axis=-1)
                got = np.linalg.norm(matrix(node, update - near), axis=(-2, -1))
                assert (np.abs(got - best) <= 1e-6 * norm).all()
                np.testing.assert_allclose(kept["w"], s[..., 0] / norm, atol=1e-6)
            assert far(dense(same["w"], shape), update) < 1e-6  # of full rank: the same update

    sampled()


def one(shape=(7, 5), rank=3, seed=0, **more):
    node = node_of(shape, more.pop("layout", "io"), None, rank, seed=seed, **more)
    return jax.tree.map(jnp.asarray, node)


def full(value, base=None):
    return FullArray(base, jnp.asarray(value, jnp.float32))


def test_adapters_of_different_weights():
    """A weight that one adapter alone adapts keeps its rank, form and slices."""
    sliced = node_of((3, 6), "io", ((0, 2), (4, 6)), 2)
    one_, other = {"v": one(), "w": None, "x": sliced}, {"v": None, "w": one(seed=1), "x": None}
    total = add([one_, other], [0.5, -1.0])
    assert total["v"].rank == 3 and total["w"].rank == 3 and total["x"].slices == sliced.slices
    assert far(dense(total["v"], (7, 5)), 0.5 * dense(one_["v"], (7, 5))) < 1e-6
    assert far(dense(total["w"], (7, 5)), -dense(other["w"], (7, 5))) < 1e-6
    assert bits(total["x"].lora_a) == bits(sliced.lora_a)


by_day = ("adalora", "vera")


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(name, marks=() if name in by_day else pytest.mark.nightly)
        for name in sorted(FORMS)
        if "dora" not in name
    ],
)
def test_forms_become_one_a_and_one_b(form):
    base = {"w": jnp.zeros((6, 5))}
    rules = {"w": LoraSpec(2, form=form)}
    params = [jlora.attach(base, rules, key=jax.random.key(n)) for n in range(2)]
    noise = lambda x: jnp.asarray(np.random.default_rng(3).normal(size=x.shape), x.dtype)
    params = [jax.tree.map(noise, p) for p in params]
    deltas = [jlora.forms.delta(p["w"], (6, 5), jnp.float32) for p in params]
    adapters = [jlora.detach(p)[1] for p in params]
    total = add(adapters, [0.5, 2.0])
    merged = jlora.merge(jlora.bind(base, total))["w"]
    assert far(merged, 0.5 * deltas[0] + 2 * deltas[1]) < 1e-6
    assert total["w"].form == "lora"
    half = scale(adapters[0], 0.5)["w"]
    assert half.form == form
    assert far(jlora.forms.delta(half, (6, 5), jnp.float32), 0.5 * deltas[0]) < 1e-6
    small = compress(adapters[0], rank=5)[0]
    assert far(jlora.merge(jlora.bind(base, small))["w"], deltas[0]) < 1e-5


def test_parameters_trained_in_full():
    base = {"b": jnp.asarray([1.0, 2.0, 4.0]), "w": jnp.ones((7, 5))}
    params = [{"b": full(v, base["b"]), "w": None} for v in ([2.0, 2, 2], [1.0, 4, 0])]
    params.append({"b": None, "w": dataclasses.replace(one(), base=base["w"])})
    total = add(params, [0.5, -1.0, 1.0])
    np.testing.assert_allclose(total["b"].value, [1.5, 0.0, 7.0], rtol=1e-6)
    assert total["b"].base is None and total["w"].rank == 3
    merged = jlora.merge(jlora.bind(base, total))
    np.testing.assert_allclose(merged["b"], [1.5, 0.0, 7.0], rtol=1e-6)
    # One adapter with the weight 1 is itself, bit for bit, and needs no original.
    odd = {"b": full([0.1, 1e20, -3e-9])}
    assert bits(scale(odd, 1.0)["b"].value) == bits(odd["b"].value)
    traced = jax.jit(scale)({"b": full([0.1, 1e20, -3e-9], base["b"])}, 1.0)
    assert bits(traced["b"].value) == bits(odd["b"].value)
    # A factored update of the same weight is added to the value.
    both = [{"w": full(jnp.full((7, 5), 3.0), base["w"])}, {"w": one()}]
    want = 1.0 + 0.5 * 2.0 + 2.0 * dense(one(), (7, 5))
    assert far(add(both, [0.5, 2.0])["w"].value, want) < 1e-6


def test_a_bfloat16_parameter_is_rounded_once():
    old, new = jnp.asarray([1.0, 3.0], jnp.bfloat16), jnp.asarray([1.0078125, 3.5], jnp.bfloat16)
    value = scale({"b": FullArray(old, new)}, 0.3)["b"].value
    want = np.float32([1.0, 3.0]) + np.float32(0.3) * np.float32([0.0078125, 0.5])
    assert bits(value) == bits(jnp.asarray(want, jnp.bfloat16))


def test_magnitudes():
    """DoRA's update is no product, so it stays as it is or is refused."""
    base = {"w": jnp.ones((7, 5)), "v": jnp.ones((7, 5))}
    dora = jlora.attach(base, {"w": LoraSpec(2, dora=True)}, key=KEY)
    plain = jlora.attach(base, {"v": LoraSpec(2)}, key=KEY)
    adapters = [jlora.detach(p)[1] for p in (dora, plain)]
    total = add(adapters, [1.0, 0.5])
    assert bits(total["w"].extra["magnitude"]) == bits(dora["w"].extra["magnitude"])
    small, _ = compress(adapters[0], rank=1)
    assert set(small["w"].extra) == {"magnitude"} and small["w"].rank == 1
    refused = says('"w" has a magnitude (DoRA)', "full rank", "extract(jlora.merge(params)")
    for run in (
        lambda: add([adapters[0], adapters[0]], [1.0, 1.0]),
        lambda: scale(adapters[0], 0.5),
        lambda: jax.jit(scale)(adapters[0], 1.0),
    ):
        with pytest.raises(ValueError, match=refused):
            run()


def test_energy_and_error_choose_a_rank_per_weight():
    def of(values):
        q = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 4)))[0]
        return jlora.LoraArray(
            None, jnp.asarray(q * np.float32(values), jnp.float32), jnp.eye(4, 6), 1.0, "io"
        )

    adapter = {"a": of([8.0, 4, 1, 1]), "b": of([2.0, 2, 2, 2]), "c": full(np.ones(3))}
    small, kept = compress(adapter, energy=0.97)  # 80 of 82, 16 of 16
    assert (small["a"].rank, small["b"].rank) == (2, 4)
    np.testing.assert_allclose(kept["a"], np.sqrt(80 / 82), rtol=1e-6)
    assert set(kept) == {"a", "b"} and small["c"].value is adapter["c"].value
    small, kept = compress(adapter, error=0.5)  # √(18/82) = 0.47, √(4/16) = 0.5
    assert (small["a"].rank, small["b"].rank) == (1, 3)
    zero = {"w": dataclasses.replace(adapter["a"], lora_b=jnp.zeros((4, 6)))}
    small, kept = compress(zero, energy=1.0)
    assert small["w"].rank == 1 and kept["w"] == 1 and not small["w"].lora_b.any()


def test_the_rank_of_a_stack_is_the_largest_needed():
    a = jnp.stack([jnp.diag(jnp.asarray([1.0, 0, 0])), jnp.eye(3)])
    node = jlora.LoraArray(None, a, jnp.stack([jnp.eye(3)] * 2), jnp.ones(2), "io")
    small, kept = compress({"w": node}, energy=0.999)
    assert small["w"].rank == 3 and kept["w"].shape == (2,)


LAYOUTS = [
    ((7, 5), "io"),
    ((5, 7), "oi"),
    ((2, 6, 5), "io"),
    ((4, 2, 3), "ioo"),
    ((3, 2, 5), "iio"),
]


@pytest.mark.parametrize(
    ("shape", "layout", "niter"),
    [(*LAYOUTS[1], None), (*LAYOUTS[2], 4)]
    + [
        pytest.param(*weight, niter, marks=pytest.mark.nightly)
        for weight in LAYOUTS
        for niter in (None, 4)
    ],
    ids=str,
)
def test_extract_gives_the_update_back(shape, layout, niter):
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32), "n": jnp.arange(3)}
    update = dense(node_of(shape, layout, None, 2), shape)
    tuned = {**base, "w": base["w"] + jnp.asarray(update, jnp.float32)}
    rules = {"w": LoraSpec(2, alpha=8, layout=layout)}
    adapter, errors = extract(tuned, base, rules, niter=niter)
    assert adapter["w"].scaling.ravel()[0] == 4 and adapter["n"] is None and set(errors) == {"w"}
    assert far(dense(adapter["w"], shape), update) < 1e-5 and errors["w"] < 1e-5
    merged = jlora.merge(jlora.bind(base, adapter))
    assert far(merged["w"], tuned["w"]) < 1e-5 and merged["n"] is base["n"]


def test_what_extract_reports():
    rng = np.random.default_rng(0)
    base = {k: jnp.asarray(rng.normal(size=(8, 6)), jnp.float32) for k in "vwx"}
    base |= {"b": jnp.zeros(4), "c": jnp.zeros(4)}
    noise = lambda x: x + jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    tuned = {**{k: noise(x) for k, x in base.items()}, "v": base["v"]}
    rules = {"[vw]": LoraSpec(6), "b": "full"}
    adapter, errors = extract(tuned, base, rules, error=0.5)
    assert {k: float(e) for k, e in errors.items() if k in "vbcx"} == {
        "v": 0,
        "b": 0,
        "c": 1,
        "x": 1,
    }
    s = np.linalg.svd(np.float64(tuned["w"] - base["w"]), compute_uv=False)
    left = np.sqrt(np.append(np.cumsum((s**2)[::-1])[::-1], 0) / (s**2).sum())
    rank = adapter["w"].rank
    assert left[rank] <= 0.5 < left[rank - 1] and abs(errors["w"] - left[rank]) < 1e-5
    assert adapter["v"].rank == 1 and adapter["b"].value is tuned["b"] and adapter["x"] is None
    sliced = {"w": LoraSpec(3, slices=((0, 3), (4, 6))), ".*": None}
    adapter, errors = extract(tuned, base, sliced)
    lost = np.float64(tuned["w"] - base["w"])[:, 3]
    want = np.linalg.norm(lost) / np.linalg.norm(np.float64(tuned["w"] - base["w"]))
    assert errors["w"] > want - 1e-6 and adapter["w"].slices == ((0, 3), (4, 6))


SLICED = node_of((3, 6), "io", ((0, 2), (4, 6)), 2)
OTHER = node_of((3, 6), "io", ((0, 2), (2, 4)), 2)
WIDER = dataclasses.replace(node_of((3, 7), "io", ((0, 3), (4, 6)), 2), slices=SLICED.slices)
REFUSED = {
    "none": (lambda: add([], []), "there are no adapters"),
    "counts": (lambda: add([{"w": one()}], [1.0, 2.0]), "for 1 adapters. Pass one number for each"),
    "a_matrix": (lambda: add([{"w": one()}], [np.ones(2)]), "Pass one number for each"),
    "no_list": (lambda: add([{"w": one()}], 1.0), "Pass one number for each"),
    "nan": (lambda: scale({"w": one()}, np.nan), "every weight must be finite"),
    "too_large": (lambda: scale({"w": one()}, 1e39), "must be finite in float32"),
    "text": (lambda: add([{"w": one()}], ["1"]), "Pass one number for each"),
    "no_scale": (
        lambda: extract({"w": WEIGHT}, {"w": WEIGHT}, {"w": LoraSpec(1, alpha=-2)}),
        "alpha=-2, so the update s A B has no scale",
    ),
    "paths": (lambda: add([{"w": one()}, {"v": one()}], [1, 1]), "differ in 2 places"),
    "empty": (lambda: add([{"w": one()}, {"w": None}], [1, 1]), "adapters[1]`: there is no"),
    "residual": (
        lambda: scale({"w": dataclasses.replace(one(), residual=True)}, 2),
        "is a residual",
    ),
    "shapes": (lambda: add([{"w": one()}, {"w": one((7, 4))}], [1, 1]), "different models"),
    "layouts": (
        lambda: add([{"w": one((5, 5))}, {"w": one((5, 5), layout="oi")}], [1, 1]),
        "layouts ['io', 'oi']",
    ),
    "slices": (lambda: add([{"w": SLICED}, {"w": OTHER}], [1, 1]), "only its base tells"),
    "sliced_shapes": (
        lambda: add(
            [{"w": SLICED}, {"w": dataclasses.replace(WIDER, slices=SLICED.slices)}], [1, 1]
        ),
        'disagree on "w"',
    ),
    "original": (lambda: scale({"b": full([1.0])}, 2), "a detached adapter lacks"),
    "two": (lambda: compress({"w": one()}, rank=1, energy=0.5), "exactly one of `rank`, `energy`"),
    "neither": (lambda: compress({"w": one()}), "got []"),
    "rank": (lambda: compress({"w": one()}, rank=0), "rank=0; it must be an integer"),
    "energy": (lambda: compress({"w": one()}, energy=1.5), "it must be in (0, 1]"),
    "error": (lambda: compress({"w": one()}, error=-0.1), "it must be in [0, 1)"),
    "traced": (
        lambda: jax.jit(lambda x: compress(x, energy=0.5)[0])({"w": one()}),
        "the adapter is traced",
    ),
    "extract_two": (
        lambda: extract({"w": WEIGHT}, {"w": WEIGHT}, {}, energy=0.5, error=0.5),
        "at most one of `energy`, `error`",
    ),
    "extract_traced": (
        lambda: jax.jit(lambda x: extract(x, x, {}, energy=0.5)[0])({"w": WEIGHT}),
        "the parameters are traced",
    ),
    "adapted": (lambda: extract({"w": one()}, {"w": WEIGHT}, {}), "in `tuned` is adapted"),
    "grown": (
        lambda: extract({"w": jnp.ones((8, 5))}, {"w": WEIGHT}, {}),
        "has the shape (8, 5) in `tuned`",
    ),
    "dora": (
        lambda: extract({"w": WEIGHT}, {"w": WEIGHT}, {"w": LoraSpec(1, dora=True)}),
        "dora=True, and only plain LoRA",
    ),
    "form": (
        lambda: extract({"w": WEIGHT}, {"w": WEIGHT}, {"w": LoraSpec(1, form="vera")}),
        "form='vera', and only plain LoRA",
    ),
}
WEIGHT = jnp.ones((7, 5))


@pytest.mark.parametrize(("run", "part"), REFUSED.values(), ids=REFUSED)
def test_refused(run, part):
    with pytest.raises(ValueError, match=says("`jlora.arithmetic.", part)):
        run()
