"""PEFT live: what is saved whole, `modules_to_save`; and adapters in other dtypes than float32."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import VARIANTS, adapt, hold, into_peft, load, plain, quiet, save, tensors
from safetensors.torch import save_file
from twins import TWINS, Twin, conv1d_hf, linear, mlp

import jlora.peft

LAYERS = [twin for twin in TWINS if twin.targets and twin is not mlp]
DTYPES = {torch.float16: np.float16, torch.bfloat16: jnp.bfloat16, torch.float32: np.float32}
MORE: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_modules_to_save(more, tmp_path, compare):
    """Forward, every gradient, the merged weights, the file again, and PEFT's reading of it."""
    rslora = {k: v for k, v in more.items() if k == "use_rslora"}
    model = adapt(mlp, modules_to_save=["head", "norm"], **more)
    hold(mlp, model, tmp_path, compare, **rslora)
    saved = {key.removeprefix("base_model.model.") for key in tensors(tmp_path)}
    assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} < saved
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["head", "norm"]


def test_modules_to_save_and_all_biases(tmp_path, compare):
    """PEFT writes the biases of a module to save three times, of which one is to be read."""
    model = adapt(mlp, modules_to_save=["head", "norm"], bias="all")
    quiet(model.save_pretrained, tmp_path)
    params = load(tmp_path, mlp.params(plain(mlp)), mlp)
    x = mlp.x(np.random.default_rng(0))
    want = model(torch.tensor(x)).detach().numpy()
    compare(jlora.lora(mlp.fn, fallback="error")(params, x), want, "forward")
    merged = dict(jax.tree.leaves_with_path(jlora.merge(params)))
    first, again = tensors(tmp_path), save(tmp_path / "again", params, mlp)
    reloaded, result = into_peft(mlp, tmp_path / "again")
    assert not result.missing_keys and not result.unexpected_keys
    compare(reloaded(torch.tensor(x)).detach().numpy(), want, "PEFT", 0)
    for path, weight in jax.tree.leaves_with_path(mlp.params(quiet(model.merge_and_unload))):
        compare(merged[path], weight, f"merged {path}")
    copies = {k for k in first if ".modules_to_save." in k or ".original_module." in k}
    assert set(again) == set(first) - copies and len(copies) == 4
    assert all(torch.equal(again[key], first[key]) for key in again)

    # What is not a copy is not taken for one.
    for key, value in (
        ("base_model.model.head.modules_to_save.bias", torch.ones(9)),
        ("base_model.model.tail.original_module.bias", torch.ones(9)),
        ("base_model.model.head.original_module.weight", torch.ones(9, 5)),
    ):
        save_file({**first, key: value}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=rf"1 keys are unexpected: \"{key}\""):
            load(tmp_path, mlp.params(plain(mlp)), mlp)


@pytest.mark.parametrize("twin", LAYERS, ids=repr)
def test_every_layer_whole(twin, tmp_path, compare):
    """A layer of every type beside an adapted one: its tensors in the leaves' orientation."""
    torch.manual_seed(1)
    module = torch.nn.ModuleDict({"whole": twin.make(), "one": torch.nn.Linear(4, 3, bias=False)})
    # MultiheadAttention's own projection is a module that PEFT does not look into.
    whole = [f"whole.{name}" for name in twin.targets]
    base = {"whole": twin.params(module["whole"]), "one": jnp.ones((4, 3))}
    names = {f"whole/{path}": f"whole.{name}" for path, name in twin.names.items()}
    names["one"] = "one.weight"
    config = peft.LoraConfig(r=2, target_modules=["one"], modules_to_save=whole)
    model = quiet(peft.get_peft_model, module, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    quiet(model.save_pretrained, tmp_path)
    read = {
        "layouts": {f"whole/{path}": x for path, x in twin.layouts.items()},
        "kinds": {f"whole/{path}": x for path, x in twin.kinds.items()},
        "names": names,
    }
    params = jlora.peft.load(tmp_path, base, **read)
    after = twin.params(quiet(model.merge_and_unload)["whole"])
    ours = dict(jax.tree.leaves_with_path(jlora.merge(params)["whole"]))
    for path, want in jax.tree.leaves_with_path(after):
        compare(ours[path], want, f"{path}", 0)
    jlora.peft.save(tmp_path / "again", params, **read)
    first, again = tensors(tmp_path), tensors(tmp_path / "again")
    assert set(first) == set(again) and len(first) == 2 + len(twin.moves)
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.sample(3)
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("twin", [linear, conv1d_hf, mlp], ids=repr)
def test_the_dtype_of_the_file(twin: Twin, dtype: torch.dtype, more, tmp_path):
    """It is kept, bit for bit, here and in the file that is written again."""
    model = adapt(twin, **more)
    model = model.to(dtype)
    quiet(model.save_pretrained, tmp_path)
    first = tensors(tmp_path)
    assert {x.dtype for x in first.values()} == {dtype}
    base = jax.tree.map(lambda w: w.astype(DTYPES[dtype]), twin.params(plain(twin)))
    params = load(tmp_path, base, twin, dtype=None)
    adapter = jax.tree.leaves(jlora.partition(params)[0])
    assert {x.dtype for x in adapter} == {np.dtype(DTYPES[dtype])}
    rslora = {k: v for k, v in more.items() if k == "use_rslora"}
    again = save(tmp_path / "again", params, twin, **rslora)
    assert set(again) == set(first)
    for key, x in first.items():
        assert again[key].dtype == dtype and torch.equal(again[key], x), key
    result = into_peft(twin, tmp_path / "again")[1]
    assert not result.missing_keys and not result.unexpected_keys


class Head(torch.nn.Module):
    """A head of two layers, as a classifier of RoBERTa's has."""

    def __init__(self):
        super().__init__()
        self.dense, self.out = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.dense(x)))


def test_a_module_to_save_of_several_modules_and_all_biases(tmp_path, compare):
    """Of the biases of such a module PEFT leaves the adapter's name in the keys of the copies."""
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("query", torch.nn.Linear(4, 6))
    net.add_module("classifier", Head())
    names = {
        f"{path}/{part}": f"{path.replace('/', '.')}.{part}"
        for path in ("query", "classifier/dense", "classifier/out")
        for part in ("weight", "bias")
    }
    base = {}
    for name, value in net.state_dict().items():
        *parents, part = name.split(".")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[part] = jnp.asarray(value.numpy().T)

    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], bias="all")
    model = quiet(peft.get_peft_model, net, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    quiet(model.save_pretrained, tmp_path)
    copies = [key for key in tensors(tmp_path) if ".modules_to_save.default." in key]
    assert copies

    def fn(p, x):
        x = x @ p["query"]["weight"] + p["query"]["bias"][None]
        head = p["classifier"]
        x = jnp.tanh(x @ head["dense"]["weight"] + head["dense"]["bias"][None])
        return x @ head["out"]["weight"] + head["out"]["bias"][None]

    layouts = {path: "io" for path in names if path.endswith("weight")}
    params = jlora.peft.load(tmp_path, base, names=names, layouts=layouts)
    x = np.float32(np.random.default_rng(0).normal(size=(5, 4)))
    compare(jlora.lora(fn)(params, x), model(torch.tensor(x)).detach().numpy(), "forward")
