"""A fused kernel with updates on some of its output slices only: loralib's MergedLinear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import LoraSpec, checkpoint, peft

SLICES = ((0, 7), (14, 18))  # of unequal widths, as with grouped queries
SHAPES = {
    "kernel": ("io", (11, 21), "ti,io->to"),
    "stack": ("io", (3, 11, 21), "ti,sio->tso"),
    "heads": ("ioo", (11, 21, 2), "ti,iod->tod"),
    "torch": ("oi", (21, 11), "ti,oi->to"),
}
every = pytest.mark.parametrize(("layout", "shape", "formula"), SHAPES.values(), ids=SHAPES)
X = jax.random.normal(jax.random.key(3), (4, 11))


def tree(layout, shape, slices=SLICES):
    base = {"w": jax.random.normal(jax.random.key(0), shape)}
    spec = LoraSpec(2, slices=slices, layout=layout)
    params = jlora.attach(base, {"w": spec}, key=jax.random.key(1))
    return base, jax.tree.map(lambda x: x + 0.1, params)


@pytest.mark.sample(3)
@every
def test_only_the_slices_are_updated(layout, shape, formula):
    _, params = tree(layout, shape)
    axis = shape.index(21)
    delta = np.moveaxis(np.asarray(jlora.merge(params)["w"] - params["w"].base), axis, 0)
    assert (delta[7:14] == 0).all() and (delta[18:] == 0).all()
    assert (delta[:7] != 0).all() and (delta[14:18] != 0).all()
    node = params["w"]
    assert node.rank == 2 and node.lora_a.shape[-1] == 4
    trained = jlora.summary(params).split()[2]
    stack, rest = (shape[0] if len(shape) > len(layout) else 1), shape[-1] if layout == "ioo" else 1
    assert trained == f"{stack * (11 * 4 + 2 * 11 * rest):,}"


@pytest.mark.sample(6)
@every
def test_the_law_and_its_gradient(layout, shape, formula):
    _, params = tree(layout, shape)
    trainable, frozen = jlora.partition(params)

    def fn(p, x):
        return jnp.einsum(formula, x, p["w"])

    def by(f):
        return jax.value_and_grad(lambda t: jnp.sin(f(jlora.combine(t, frozen), X)).sum())

    got = by(jlora.lora(fn, fallback="error"))(trainable)
    want = by(lambda p, x: fn(jlora.merge(p), x))(trainable)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4)


def test_each_slice_is_a_weight_of_its_own():
    base, params = tree("io", (11, 21))
    node = params["w"]
    merged = jlora.merge(params)["w"]
    for n, (start, stop) in enumerate(SLICES):
        first = sum(b - a for a, b in SLICES[:n])
        alone = jlora.LoraArray(
            node.base[:, start:stop],
            node.lora_a[:, 2 * n : 2 * n + 2],
            node.lora_b[:, first : first + stop - start],
            node.scaling,
            "io",
        )
        np.testing.assert_allclose(merged[:, start:stop], jlora.merge(alone), rtol=1e-6)
    fresh = jlora.attach(base, {"w": LoraSpec(2, slices=SLICES)}, key=jax.random.key(1))["w"]
    assert not jnp.array_equal(fresh.lora_a[:, :2], fresh.lora_a[:, 2:])


def test_one_slice_over_all_is_the_plain_update():
    _, params = tree("io", (11, 21), slices=((0, 21),))
    node = params["w"]
    plain = jlora.LoraArray(node.base, node.lora_a, node.lora_b, node.scaling, "io")
    assert jnp.array_equal(jlora.merge(node), jlora.merge(plain))


@pytest.mark.sample(3)
@every
def test_a_checkpoint_keeps_them(layout, shape, formula, tmp_path):
    _, params = tree(layout, shape)
    checkpoint.save(tmp_path / "a", params)
    again = checkpoint.restore(tmp_path / "a", jlora.detach(params)[0])
    assert jax.tree.structure(again) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True)
    assert all(jnp.array_equal(a, b) for a, b in pairs)


def test_pefts_files_have_them_as_one_update(tmp_path):
    base, params = tree("io", (11, 21))
    base, params = {"w": {"kernel": base["w"]}}, {"w": {"kernel": params["w"]}}
    names = {"w/kernel": "w.weight"}
    peft.save(tmp_path / "a", params, names=names)
    again = peft.load(tmp_path / "a", jlora.detach(params)[0], names=names)
    assert again["w"]["kernel"].slices is None and again["w"]["kernel"].rank == 4
    np.testing.assert_allclose(
        jlora.merge(again)["w"]["kernel"], jlora.merge(params)["w"]["kernel"], rtol=1e-6
    )
    with pytest.raises(ValueError, match=r'"w/kernel" is adapted on some slices.*jlora.bind'):
        peft.save(tmp_path / "b", jlora.detach(params)[1], names=names)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "slices", [(), ((3, 3),), ((0, 4), (2, 6)), ((4, 6), (0, 2)), ((-1, 3),), ((5, 2),)]
)
def test_ranges_that_make_no_sense(slices):
    with pytest.raises(
        ValueError, match=r"`LoraSpec\(slices=.*increasing order that do not overlap"
    ):
        LoraSpec(2, slices=slices)


def test_ranges_beyond_the_weight():
    with pytest.raises(ValueError, match=r"slices \(\(0, 22\),\) exceed the 21 outputs of"):
        tree("io", (11, 21), slices=((0, 22),))


def test_a_rank_above_the_narrowest_slice():
    with pytest.warns(UserWarning, match=r"rank 2 is above min\(in, out\) = min\(11, 1\)"):
        _, params = tree("io", (11, 21), slices=((0, 7), (9, 10)))
    assert params["w"].lora_b.shape == (2, 8)


def test_an_update_of_other_slices_does_not_fit():
    _, params = tree("io", (11, 21))
    node = params["w"]
    other = jlora.LoraArray(
        node.base, node.lora_a, node.lora_b, node.scaling, "io", ((0, 7), (14, 19))
    )
    with pytest.raises(ValueError, match=r"needs lora_a \(11, 4\) and lora_b \(2, 12\)"):
        jlora.merge({"w": other})
