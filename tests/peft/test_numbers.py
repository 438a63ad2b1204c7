"""Dtypes of what is loaded, saved and merged, and leaves that are no arrays."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import FullArray, LoraSpec, initializers, peft

KEY = jax.random.key(0)
NAMES = {"q": "q.weight", "norm": "norm.weight"}


def base(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "q": jnp.asarray(rng.normal(size=(8, 6)), dtype),
        "norm": jnp.asarray(rng.normal(size=8), dtype),
    }


def trained(dtype=jnp.float32, dora=False):
    spec = LoraSpec(2, init=initializers.uniform, dora=dora)
    params = jlora.attach(base(dtype), {"q": spec, "norm": "full"}, key=KEY)
    return {**params, "norm": FullArray(params["norm"].base, params["norm"].value * 1.3)}


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
def test_a_narrow_file_trains_in_float32_and_is_saved_as_it_was(narrow, tmp_path):
    peft.save(tmp_path / "1", trained(dora=True), names=NAMES, dtype=narrow)
    stored = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(narrow)} and len(stored) == 4
    params = peft.load(tmp_path / "1", base(), names=NAMES)
    node, m = params["q"], params["q"].extra["magnitude"]
    assert {x.dtype for x in (node.lora_a, node.lora_b, m)} == {jnp.dtype(jnp.float32)}
    assert params["norm"].value.dtype == jnp.float32
    np.testing.assert_array_equal(
        node.lora_a, stored["base_model.model.q.lora_A.weight"].T.astype(np.float32)
    )
    peft.save(tmp_path / "2", params, names=NAMES, dtype=narrow)
    files = [(tmp_path / k / "adapter_model.safetensors").read_bytes() for k in "12"]
    assert files[0] == files[1]
    kept = peft.load(tmp_path / "1", base(), names=NAMES, dtype=None)["q"]
    assert kept.lora_a.dtype == kept.extra["magnitude"].dtype == jnp.dtype(narrow)


def test_what_is_trained_whole_has_the_wider_dtype(tmp_path):
    peft.save(tmp_path, trained(), names=NAMES)
    assert peft.load(tmp_path, base(jnp.bfloat16), names=NAMES)["norm"].value.dtype == jnp.float32
    peft.save(tmp_path, trained(jnp.bfloat16), names=NAMES)
    assert peft.load(tmp_path, base(jnp.bfloat16), names=NAMES)["norm"].value.dtype == jnp.bfloat16
    assert peft.load(tmp_path, base(), names=NAMES)["norm"].value.dtype == jnp.float32


def test_dtypes_that_do_not_hold_an_adapter(tmp_path):
    large = trained()
    large["q"] = jax.tree.map(lambda x: x * 1e6, large["q"])
    with pytest.raises(ValueError, match="beyond the range of float16"):
        peft.save(tmp_path, large, names=NAMES, dtype=jnp.float16)
    with pytest.raises(ValueError, match="would be of dtype int8"):
        peft.save(tmp_path, trained(), names=NAMES, dtype=jnp.int8)
    assert not any(tmp_path.iterdir())
    peft.save(tmp_path, trained(), names=NAMES)
    with pytest.raises(TypeError, match="dtype=int8 is not a floating type"):
        peft.load(tmp_path, base(), names=NAMES, dtype=jnp.int8)


def lost(params):
    """The share of the update that a merge loses, in float64."""
    node = params["q"]
    a, b, w = (np.asarray(x, np.float64) for x in (node.lora_a, node.lora_b, node.base))
    update = float(node.scaling) * a @ b
    kept = np.asarray(jlora.merge(params)["q"], np.float64) - w
    return float(np.linalg.norm(kept - update) / np.linalg.norm(update))


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_a_merge_that_loses_the_update_says_so(dtype):
    spec = LoraSpec(2, init=initializers.uniform)
    node = jlora.attach(base(dtype), {"q": spec}, key=KEY)["q"]
    eps = float(jnp.finfo(dtype).eps)
    small, large = (
        {"q": dataclasses.replace(node, scaling=jnp.float32(s))} for s in (eps / 5, 100 * eps)
    )
    with pytest.warns(UserWarning, match=r'loses \d+% of the update of "q"') as caught:
        share = lost(small)
    said = int(str(caught[0].message).partition("%")[0].rpartition(" ")[2]) / 100
    assert share > 0.5 and abs(said - share) < 0.01
    jax.jit(jlora.merge)(small)  # says nothing, and so do these, or they would raise
    assert lost(large) < 0.5
    jlora.merge(jlora.attach(base(dtype), {"q": LoraSpec(2, dora=True)}, key=KEY))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_a_float8_saturates(dtype):
    top = float(jnp.finfo(dtype).max)
    params = jlora.attach({"w": jnp.full((4, 4), top, dtype)}, {"w": LoraSpec(1)}, key=KEY)
    node = params["w"]
    up = {"w": jax.tree.map(lambda x: jnp.full_like(x, 100.0), jlora.detach(params)[1]["w"])}
    params = jlora.bind({"w": node.base}, up)
    with pytest.warns(UserWarning, match=r"loses 100% of the update"):  # it has no room above
        merged = jlora.merge(params)["w"]
    assert merged.dtype == dtype and (np.asarray(merged, np.float32) == top).all()
    turned = jlora.bind({"w": -node.base}, {"w": jax.tree.map(jnp.negative, up["w"])})
    assert (np.asarray(jax.jit(jlora.merge)(turned)["w"], np.float32) == -top).all()
    back = jlora.unmerge({"w": -node.base}, params)["w"].base
    assert (np.asarray(back, np.float32) == -top).all()


TREES = {
    "int": {"n_heads": 4},
    "string": {"act": "gelu"},
    "float": {"eps": 1e-5},
    "key": {"k": KEY},
    "none": {"b": None},
    "numpy": {"c": np.float32(3)},
    "function": {"f": jax.nn.relu},
}


@pytest.mark.parametrize("kind", TREES)
def test_leaves_that_are_no_arrays_stay_as_they_are(kind, tmp_path):
    plain = {"q": base()["q"], **TREES[kind]}
    spec = LoraSpec(2, init=initializers.uniform)
    params = jlora.attach(plain, {"q": spec}, key=KEY)
    peft.save(tmp_path, params, names={"q": "q.weight"})
    loaded = peft.load(tmp_path, plain, names={"q": "q.weight"}, layouts={"q": "io"})
    (name,) = TREES[kind]
    assert loaded[name] is plain[name]
    np.testing.assert_array_equal(loaded["q"].lora_b, params["q"].lora_b)
    assert list(peft.rules(tmp_path, plain, names={"q": "q.weight"})) == ["q"]
    rest = {"c": None} if kind == "numpy" else None
    assert peft.match(plain, {"q.weight": np.asarray(plain["q"])}, names=rest) == (
        {"q": "q.weight"},
        {"q": "oi"},
    )


def test_equinox_modules_hold_functions(tmp_path):
    model = eqx.nn.MLP(6, 3, 8, 2, key=KEY)
    layouts = {f"layers/{k}/weight": "oi" for k in range(3)}
    spec = LoraSpec(2, init=initializers.uniform)
    params = jlora.attach(model, {r".*/weight": spec}, key=KEY, layouts=layouts)
    names = lambda p: p.replace("/", ".") if p.endswith(("weight", "bias")) else None
    peft.save(tmp_path, params, names=names)
    loaded = peft.load(tmp_path, model, names=names, layouts=layouts)
    assert loaded.activation is model.activation
    np.testing.assert_array_equal(loaded.layers[1].weight.lora_b, params.layers[1].weight.lora_b)


def test_a_name_of_what_is_no_array(tmp_path):
    plain = {"q": base()["q"], "n_heads": 4}
    peft.save(tmp_path, jlora.attach(plain, {"q": LoraSpec(2)}, key=KEY), names={"q": "q.weight"})
    names = {"q": "q.weight", "n_heads": "heads"}
    with pytest.raises(TypeError, match="`names` gives 'heads' to \"n_heads\" int, which is no"):
        peft.load(tmp_path, plain, names=names)
