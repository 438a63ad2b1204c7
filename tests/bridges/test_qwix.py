"""Qwix's leaves, as Qwix 0.1.8 itself makes them of a Flax NNX model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import jlora
import jlora.qwix

pytestmark = [
    pytest.mark.usefixtures("usual_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(nnx.Module):
    """A query of heads and its output by einsum, experts, and a dense layer."""

    def __init__(self, rngs):
        self.q = nnx.Einsum("btd,dnh->btnh", (6, 3, 4), rngs=rngs)
        self.o = nnx.Einsum("btnh,nhd->btd", (3, 4, 6), rngs=rngs)
        self.dense = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.o(self.q(x)))


@pytest.mark.nightly
def test_the_model_of_qwix_itself():
    """The same outputs as Qwix's own model, from its leaves and the weights before it."""
    net, x = Net(nnx.Rngs(0)), jnp.ones((1, 2, 6))
    graph, state = nnx.split(net)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
    theirs = qwix.apply_lora_to_model(net, provider, x, rngs=nnx.Rngs(1))
    lora = jax.tree.map(
        lambda v: jnp.asarray(np.random.default_rng(v.size).normal(size=v.shape), v.dtype),
        nnx.state(theirs, nnx.LoRAParam),
    )
    nnx.update(theirs, lora)
    params = jlora.qwix.load(lora, state, alpha=3.0)
    layouts = {
        path: node.layout
        for path, node in jlora._boxes.leaves_with_paths(params, jlora._arrays.is_leaf)
        if isinstance(node, jlora.LoraArray)
    }
    assert layouts == {"dense/kernel": "io", "o/kernel": "iio", "q/kernel": "ioo"}
    run = jlora.lora(lambda state, x: nnx.merge(graph, state)(x), fallback="error")
    np.testing.assert_allclose(run(params, x), theirs(x), rtol=1e-5, atol=1e-5)


def leaves(a, b):
    return {"m": {"w_lora_a": np.ones(a, np.float32), "w_lora_b": np.ones(b, np.float32)}}


FIT = {
    "dense": ((4, 6), (4, 2), (2, 6), "io"),
    "heads": ((4, 3, 5), (4, 2), (2, 3, 5), "ioo"),
    "between": ((3, 4, 5), (4, 2), (2, 3, 5), "oio"),
    "flat": ((4, 3, 5), (4, 2), (2, 15), "ioo"),
    "experts": ((7, 4, 5), (7, 4, 2), (7, 2, 5), "io"),
    "shared": ((7, 4, 5), (7, 4, 2), (2, 5), "iio"),
}


@pytest.mark.parametrize(("w", "a", "b", "layout"), FIT.values(), ids=FIT)
def test_layouts(w, a, b, layout):
    node = jlora.qwix.load(leaves(a, b), {"m": {"w": jnp.ones(w)}}, alpha=2.0)["m"]["w"]
    assert node.layout == layout and float(node.scaling) == 1.0
    assert jlora.merge({"w": node})["w"].shape == w


WRONG = {
    "ambiguous": (leaves((4, 2), (2, 4, 5)), (4, 4, 5), "has 2 layouts, ioo, oio: pass `layouts=`"),
    "shapes": (leaves((4, 2), (2, 7)), (4, 6), "does not fit: is it of another model"),
    "rank": (leaves((4, 2), (3, 6)), (4, 6), "does not fit"),
    "vector": (leaves((4,), (3, 6)), (4, 6), "does not fit"),
    "half": ({"m": {"w_lora_a": np.ones((4, 2))}}, (4, 6), "has _lora_a alone"),
    "path": ({"n": {"w_lora_a": np.ones((4, 2))}}, (4, 6), 'Closest: "m/w"'),
    "leaf": ({"m": {"w": np.ones((4, 2))}}, (4, 6), "is not `_lora_a` or `_lora_b` after"),
    "empty": ({}, (4, 6), "`lora` has no leaves"),
}


@pytest.mark.parametrize(("lora", "w", "part"), WRONG.values(), ids=WRONG)
def test_wrong_leaves(lora, w, part):
    with pytest.raises(ValueError, match=part):
        jlora.qwix.load(lora, {"m": {"w": jnp.ones(w)}}, alpha=2.0)


def test_a_layout_that_is_given():
    lora, w = leaves((4, 2), (2, 4, 5)), {"m": {"w": jnp.ones((4, 4, 5))}}
    assert jlora.qwix.load(lora, w, alpha=1.0, layouts={"m/w": "oio"})["m"]["w"].layout == "oio"
