"""Square weights: both ways round fit, so the side that is input is told, and never guessed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says
from peft_cases import KEY, entries, write

import jlora
from jlora import LoraSpec, peft

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def lora(folder, a, b, **more):
    file = {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}
    return write(folder, {"base_model.model." + k: x for k, x in file.items()}, entries(**more))


def read(folder, path, weight, parameter="weight", **more):
    got = peft.load(folder, {path: weight}, names={path: f"m.q.{parameter}"}, **more)
    return np.asarray(jlora.merge(got)[path])


ASKED = says("which axes of", "are input", "Give `layouts=", '"io"', '"oi"')


@pytest.mark.parametrize("path", ["q/weight", "q", "q/w", "q/A"])
def test_a_square_weight_is_asked_for(tmp_path, path):
    w, a, b = drawn(8, 8), drawn(2, 8), drawn(8, 2)
    lora(tmp_path, a, b, lora_alpha=2)
    with pytest.raises(ValueError, match=ASKED):
        read(tmp_path, path, w)
    np.testing.assert_allclose(read(tmp_path, path, w, layouts={path: "oi"}), w + b @ a, rtol=1e-5)
    np.testing.assert_allclose(
        read(tmp_path, path, w, layouts={path: "io"}), w + (b @ a).T, rtol=1e-5
    )
    adapted = jlora.attach({path: w}, {path: LoraSpec(2, layout="oi")}, key=KEY)
    again = peft.load(tmp_path, adapted, names={path: "m.q.weight"})
    np.testing.assert_allclose(jlora.merge(again)[path], w + b @ a, rtol=1e-5)


@pytest.mark.parametrize("path", ["q/kernel", "query_kernel"])
def test_a_kernel_says_its_side(tmp_path, path):
    w, a, b = drawn(8, 8), drawn(2, 8), drawn(8, 2)
    lora(tmp_path, a, b, lora_alpha=2)
    np.testing.assert_allclose(read(tmp_path, path, w), w + (b @ a).T, rtol=1e-5)


def test_a_weight_of_other_sides_says_layouts(tmp_path):
    lora(tmp_path, drawn(2, 8), drawn(6, 2))
    with pytest.raises(ValueError, match=says("another shape", "`layouts=jlora.layouts(fn,")):
        read(tmp_path, "q/weight", drawn(6, 8))
    assert read(tmp_path, "q/weight", drawn(8, 6)).shape == (8, 6)


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (3, 3, 3)])
def test_a_convolution_that_fits_both_ways(tmp_path, shape):
    n = len(shape) - 1
    lora(tmp_path, drawn(2, *shape[1:]), drawn(3, 2, *(1,) * (n - 1)))
    with pytest.raises(ValueError, match=says("are input", f'"{"i" * n}o"', f'"o{"i" * n}"')):
        read(tmp_path, "q/weight", drawn(*shape))
    w = drawn(*shape)
    first, last = (read(tmp_path, "q/weight", w, layouts={"q/weight": x}) for x in LAYOUTS[n])
    assert np.abs(first - last).max() > 0.1
    np.testing.assert_array_equal(read(tmp_path, "q/kernel", w), first)


LAYOUTS = {3: ("iiio", "oiii"), 2: ("iio", "oii")}


@pytest.mark.parametrize("parameter", ["up", "w"])
def test_square_experts_are_asked_for(tmp_path, parameter):
    lora(tmp_path, drawn(6, 4), drawn(4, 6), target_parameters=[f"m.q.{parameter}"])
    with pytest.raises(ValueError, match=ASKED):
        read(tmp_path, "q/up", drawn(3, 4, 4), parameter)
    w = drawn(3, 4, 4)
    first, last = (read(tmp_path, "q/up", w, parameter, layouts={"q/up": x}) for x in ("io", "oi"))
    np.testing.assert_allclose(first - w, np.swapaxes(last - w, 1, 2), atol=1e-5)


def saved_whole(folder, tensor, name):
    file = {"m.q.lora_A.weight": drawn(2, 4), "m.q.lora_B.weight": drawn(4, 2), name: tensor}
    return write(folder, {"base_model.model." + k: x for k, x in file.items()}, entries())


def whole(folder, path, shape, name, **more):
    params = {"q/kernel": np.zeros((4, 4), np.float32), path: np.zeros(shape, np.float32)}
    got = peft.load(folder, params, names={"q/kernel": "m.q.weight", path: name}, **more)
    return np.asarray(jlora.merge(got)[path])


def test_a_raw_parameter_has_its_axes_where_its_shape_says_so(tmp_path):
    for shape in ((8, 4), (1, 3, 8), (2, 3, 4, 5), (1, 2, 3, 4, 5)):
        x = drawn(*shape)
        saved_whole(tmp_path, x, "m.head.proj")
        np.testing.assert_array_equal(whole(tmp_path, "head/proj", shape, "m.head.proj"), x)
    x = drawn(8, 4)
    saved_whole(tmp_path, x, "m.head.proj")
    np.testing.assert_array_equal(whole(tmp_path, "head/proj", (4, 8), "m.head.proj"), x.T)


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)])
def test_a_square_raw_parameter_is_asked_for(tmp_path, shape):
    x = drawn(*shape)
    saved_whole(tmp_path, x, "m.head.proj")
    args = tmp_path, "head/proj", shape, "m.head.proj"
    with pytest.raises(
        ValueError, match=says("is no layer's weight", '"parameter"}` where', "`x @")
    ):
        whole(*args)
    np.testing.assert_array_equal(whole(*args, kinds={"head/proj": "parameter"}), x)
    turned = whole(*args, kinds={"head/proj": "linear"}, layouts={"head/proj": "io"})
    np.testing.assert_array_equal(turned, np.swapaxes(x, -1, -2))


def test_a_square_head_is_asked_for(tmp_path):
    x = drawn(8, 8)
    saved_whole(tmp_path, x, "m.head.weight")
    args = tmp_path, "head/weight", (8, 8), "m.head.weight"
    with pytest.raises(ValueError, match=ASKED):
        whole(*args)
    np.testing.assert_array_equal(whole(*args, layouts={"head/weight": "oi"}), x)
    np.testing.assert_array_equal(whole(*args, layouts={"head/weight": "io"}), x.T)
    np.testing.assert_array_equal(whole(*args, kinds={"head/weight": "embedding"}), x)


@pytest.mark.parametrize(("name", "kind"), [("m.head.weight", "oi"), ("m.head.proj", "parameter")])
def test_saving_a_whole_parameter_asks_too(tmp_path, name, kind):
    """There is no file whose shape could tell, so a weight that is not square is asked for too."""
    params = {"q/kernel": jnp.ones((4, 4)), "head/weight": jnp.asarray(drawn(8, 6))}
    names = {"q/kernel": "m.q.weight", "head/weight": name}
    rules = {"q/kernel": LoraSpec(2), "head/weight": "full"}
    adapted = jlora.attach(params, rules, key=KEY)
    with pytest.raises(ValueError, match=r"are input|is no layer's weight"):
        peft.save(tmp_path, adapted, names=names)
    given = {"kinds" if kind == "parameter" else "layouts": {"head/weight": kind}}
    peft.save(tmp_path, adapted, names=names, **given)
    got = peft.load(tmp_path, params, names=names, **given)
    np.testing.assert_array_equal(got["head/weight"].value, params["head/weight"])


@pytest.mark.parametrize("shape", [(4, 6), (6, 6), (6, 5, 3, 3)])
def test_attach_asks_for_a_weight(shape):
    """Equinox's and PyTorch's name: A would be on the side of the outputs."""
    params = {"q": {"weight": jnp.ones(shape)}}
    match = says("which axes of", '"q/weight"', "Equinox and PyTorch store", "Pass `layouts=")
    with pytest.raises(ValueError, match=match):
        jlora.attach(params, {".*": LoraSpec(2)}, key=KEY)
    layout = "oi" + "i" * (len(shape) - 2)
    node = jlora.attach(params, {".*": LoraSpec(2, layout=layout)}, key=KEY)["q"]["weight"]
    assert node.lora_a.shape == (*shape[1:], 2) and node.lora_b.shape == (2, shape[0])
    given = jlora.attach(params, {".*": LoraSpec(2)}, key=KEY, layouts={"q/weight": layout})
    assert jax.tree.structure(given["q"]["weight"]) == jax.tree.structure(node)


def test_rules_leave_a_stacked_weight_to_be_asked_for():
    params = {"q/weight": jnp.ones((3, 4, 6))}
    rules = peft.rules(
        entries(target_modules=["q"]), params, names={"q/weight": "layers.{}.q.weight"}
    )
    with pytest.raises(ValueError, match=says("Equinox and PyTorch store")):
        jlora.attach(params, rules, key=KEY)
    node = jlora.attach(params, rules, key=KEY, layouts={"q/weight": "oi"})["q/weight"]
    assert node.lora_a.shape == (3, 6, 2)
