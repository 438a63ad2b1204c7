"""PEFT live: convolutions with groups, whose update fills the kernel of the layer without them."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import adapt, hold, load, plain, quiet, save
from twins import D_IN, D_OUT, GROUPED, Twin, dense_of_groups, grouped, hwio, linear

import jlora.peft

every = pytest.mark.parametrize("twin", GROUPED, ids=repr)


@pytest.mark.nightly
@every
@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True}, {"bias": "lora_only"}, {"rank_pattern": {"layer": 8}}],
    ids=str,
)
def test_groups(twin, more, tmp_path, compare):
    """Forward, gradients, the file again bit for bit, and PEFT's reading of it."""
    rslora = {k: v for k, v in more.items() if k == "use_rslora"}
    hold(twin, adapt(twin, **more), tmp_path, compare, **rslora)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["r"] == more.get("rank_pattern", {"layer": 4})["layer"]
    # PEFT cannot merge it; here it merges, into the kernel without groups.
    params = load(tmp_path, twin.params(plain(twin)), twin)
    x = twin.x(np.random.default_rng(0))
    merged = twin.fn(jlora.merge(params), x)
    compare(jlora.lora(twin.fn, fallback="error")(params, x), merged, "merged")


def test_two_adapters_in_one_file_folder(tmp_path, compare):
    """A grouped and an ungrouped convolution in one model keep their forms apart."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv1d(D_IN, D_OUT, 3, groups=2, bias=False),
        torch.nn.Conv1d(D_OUT, 6, 3, bias=False),
    )
    weights = [layer.weight.detach().numpy() for layer in module]
    base = {"a": jnp.asarray(dense_of_groups(weights[0], 2)), "b": jnp.asarray(hwio(weights[1]))}
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    model = quiet(peft.get_peft_model, module, config)
    quiet(model.save_pretrained, tmp_path)
    known = dict(names={"a": "0.weight", "b": "1.weight"}, layouts={"a": "iio", "b": "iio"})
    params = jlora.peft.load(tmp_path, base, **known)
    assert params["a"].slices == ((0, 6), (6, 12)) and params["b"].slices is None

    def fn(p: Any, x: Any) -> Any:
        for name in "ab":
            numbers = ("NCW", "WIO", "NCW")
            x = jax.lax.conv_general_dilated(x, p[name], (1,), "VALID", dimension_numbers=numbers)
        return x

    x = np.random.default_rng(0).normal(size=(2, D_IN, 11)).astype(np.float32)
    theirs = model.eval()(torch.tensor(x)).detach().numpy()
    compare(jlora.lora(fn, fallback="error")(params, x), theirs, "forward")


def test_saving_says_what_is_not_of_groups(tmp_path):
    twin = grouped(1, 2)
    base = twin.params(plain(twin))
    for slices in (None, ((0, 4), (4, 12)), ((0, 6),)):
        spec = jlora.LoraSpec(2, layout="iio", slices=slices)
        params = jlora.attach(base, {".*/kernel": spec}, key=jax.random.key(0))
        with pytest.raises(ValueError, match=r'kind of "layer/kernel" is "grouped".*equal slices'):
            save(tmp_path, params, twin)
    whole = jlora.attach(base, {".*/kernel": "full"}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r'kind of "layer/kernel" is "grouped".*equal slices'):
        save(tmp_path, whole, twin)


def recipe(twin: Twin, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=6, target_modules=["layer"], **more)


@pytest.mark.sample(12)
@every
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=str)
def test_a_recipe_with_groups(twin, more, tmp_path, compare):
    """Of the groups that `rules` is told, the rules attach what PEFT does; saved, PEFT loads it."""
    base = twin.params(plain(twin))
    n = plain(twin).layer.groups
    config, groups = recipe(twin, **more), {"layer/kernel": n}
    rules = jlora.peft.rules(config.to_dict(), base, names=twin.names, groups=groups)
    rules = {path: dataclasses.replace(s, init=both_random) for path, s in rules.items()}
    params = jlora.attach(base, rules, key=jax.random.key(0))
    x = twin.x(np.random.default_rng(0))
    y = jlora.lora(twin.fn, fallback="error")(params, x)
    compare(y, twin.fn(jlora.merge(params), x), "the law")
    saved = save(tmp_path, params, twin, **more)
    theirs = quiet(peft.get_peft_model, plain(twin), config)
    want = peft.get_peft_model_state_dict(theirs)
    assert {k: x.shape for k, x in saved.items()} == {k: x.shape for k, x in want.items()}
    model = quiet(peft.PeftModel, plain(twin), peft.PeftConfig.from_pretrained(str(tmp_path)))
    result = model.load_adapter(str(tmp_path), "default")
    assert not result.missing_keys and not result.unexpected_keys
    compare(model.eval()(torch.tensor(x)).detach().numpy(), y, "PEFT")
    layer, given = model.base_model.model.layer, theirs.base_model.model.layer
    assert layer.scaling["default"] == pytest.approx(given.scaling["default"], rel=1e-7)


def both_random(key: Any, weight: Any, rank: int, scaling: Any = 1.0, dtype: Any = None) -> Any:
    one, two = jax.random.split(key)
    return (
        jax.random.normal(one, (weight.shape[0], rank)),
        jax.random.normal(two, (rank, weight.shape[1])),
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_first_values_with_groups(init):
    """The same spread of A and B: 1/in and, of B and "gaussian", what the rank makes it."""
    twin = grouped(2, 4)
    config, base = recipe(twin, init_lora_weights=init), twin.params(plain(twin))
    of = dict(names=twin.names, groups={"layer/kernel": 4})
    rules = jlora.peft.rules(config.to_dict(), base, **of)
    assert rules == jlora.peft.rules(config.to_dict(), base, **of)
    found = {"lora_A": [], "lora_B": [], "lora_a": [], "lora_b": []}
    for seed in range(60):
        torch.manual_seed(seed)
        layer = quiet(peft.get_peft_model, twin.make(), config).base_model.model.layer
        node = jlora.attach(base, rules, key=jax.random.key(seed))["layer"]["kernel"]
        for name, some in found.items():
            made = getattr(node if name.islower() else layer, name)
            some.append(np.asarray(made if name.islower() else made["default"].weight.detach()))
    for theirs, ours in (("lora_A", "lora_a"), ("lora_B", "lora_b")):
        one, two = (np.ravel(found[name]) for name in (theirs, ours))
        assert one.size == two.size
        assert one.std() == pytest.approx(two.std(), rel=0.03)
        assert np.abs(one).max() == pytest.approx(np.abs(two).max(), rel=0.3 if init else 0.02)


def test_groups_that_rules_cannot_have(tmp_path):
    twin = grouped(2, 4)
    base = twin.params(plain(twin))

    def rules(groups: Any, **more: Any) -> Any:
        config = {**recipe(twin).to_dict(), **more}
        return jlora.peft.rules(config, base, names=twin.names, groups=groups)

    # 12 outputs: 8 divides the rank alone, 3 the outputs alone.
    for n, more in ((3, {}), (8, {}), (5, {}), (0, {}), (-2, {}), (4, {"r": 6})):
        with pytest.raises(ValueError, match=rf"`groups` has {n} for \"layer/kernel\".*divide"):
            rules({"layer/kernel": n}, **more)
    dense, names = linear.params(plain(linear)), linear.names
    with pytest.raises(
        ValueError, match=r"`groups` has 1 for \"layer/kernel\" \[13, 7\], of rank 8"
    ):
        config = recipe(linear).to_dict()
        jlora.peft.rules(config, dense, names=names, groups={"layer/kernel": 1})
    with pytest.raises(KeyError, match=r"`groups` has \"layer/kernal\".*layer/kernel"):
        rules({"layer/kernal": 4})
    # Untold, the rules are of a convolution without groups: right here, and refused by PEFT.
    params = jlora.attach(base, rules(None), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"equal slices.*`jlora.peft.rules\(groups=...\)`"):
        save(tmp_path, params, twin)
    save(tmp_path, params, dataclasses.replace(twin, kinds={}))
    model = quiet(peft.PeftModel, plain(twin), peft.PeftConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_B"):
        model.load_adapter(str(tmp_path), "default")


def test_a_kernel_that_has_its_groups_here_too(tmp_path, compare):
    """Its update is its own, not PEFT's: it merges, and comes back; PEFT refuses the file."""
    twin = dataclasses.replace(
        grouped(2, 2),
        moves={"layer/kernel": ("layer.weight", hwio), "layer/bias": ("layer.bias", lambda b: b)},
        kinds={"layer/kernel": "conv"},
    )
    base = twin.params(plain(twin))

    def fn(p: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, p["layer"]["kernel"], (1, 1), "VALID", None, None, ("NCHW", "HWIO", "NCHW"), 2
        )

    rules = jlora.peft.rules(recipe(twin).to_dict(), base, names=twin.names, init=both_random)
    params = jlora.attach(base, rules, key=jax.random.key(0))
    x = twin.x(np.random.default_rng(0))
    y = jlora.lora(fn, fallback="error")(params, x)
    compare(y, fn(jlora.merge(params), x), "the law")
    save(tmp_path, params, twin)
    compare(jlora.lora(fn, fallback="error")(load(tmp_path, base, twin), x), y, "again", 0)
    model = quiet(peft.PeftModel, plain(twin), peft.PeftConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A"):
        model.load_adapter(str(tmp_path), "default")
