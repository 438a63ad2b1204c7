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
from test_peft_layers import adapt, hold, load, plain, quiet, save
from twins import Holder, Twin, conv, hwio

import jlora.peft

D_IN, D_OUT = 8, 12


def dense(w: np.ndarray, groups: int) -> np.ndarray:
    """A kernel (out, in/g, k...) with zeros between one group's inputs and another's outputs."""
    out, channels = w.shape[:2]
    whole = np.zeros((out, groups * channels, *w.shape[2:]), w.dtype)
    for g in range(groups):
        rows = slice(g * out // groups, (g + 1) * out // groups)
        whole[rows, g * channels : (g + 1) * channels] = w[rows]
    return hwio(whole)


def grouped(dims: int, groups: int, stride: int = 1, padding: int = 0) -> Twin:
    layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
    twin, options = conv(dims, stride, padding), dict(stride=stride, padding=padding)
    return dataclasses.replace(
        twin,
        name=f"Conv{dims}d_{groups}_groups",
        make=lambda: Holder(layer(D_IN, D_OUT, 3, groups=groups, **options)),
        x=lambda rng: rng.normal(size=(2, D_IN, *(9, 8, 7)[:dims])).astype(np.float32),
        moves=twin.moves | {"layer/kernel": ("layer.weight", lambda w: dense(w, groups))},
        kinds={"layer/kernel": "grouped"},
        merges=False,
    )


GROUPED = [grouped(1, 2, 2, 1), grouped(1, 4), grouped(2, 2), grouped(2, 4, 2, 1), grouped(3, 2)]
every = pytest.mark.parametrize("twin", GROUPED, ids=repr)


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
    base = {"a": jnp.asarray(dense(weights[0], 2)), "b": jnp.asarray(hwio(weights[1]))}
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
