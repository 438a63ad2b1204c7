"""PEFT live, layer by layer: its files read, the same numbers, and its files written again."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import ALPHA, RANK, VARIANTS, adapt, hold, plain, quiet, randomize, tensors
from twins import TWINS, mlp

import jlora.peft

BIASES = ("none", "lora_only", "all")


@pytest.mark.sample(24)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("twin", TWINS, ids=repr)
def test_layers(twin, variant, tmp_path, compare):
    hold(twin, adapt(twin, **VARIANTS[variant]), tmp_path, compare, **VARIANTS[variant])


@pytest.mark.sample(4)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", BIASES)
def test_biases_and_patterns(bias, variant, tmp_path, compare):
    more = {
        **VARIANTS[variant],
        "bias": bias,
        "rank_pattern": {"up": 3},
        "alpha_pattern": {"^down": 10},
    }
    hold(mlp, adapt(mlp, **more), tmp_path, compare, **VARIANTS[variant])
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    ranks = {written["r"], *written["rank_pattern"].values()}
    assert written["bias"] == bias and ranks == {3, 4}


@pytest.mark.sample(8)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", BIASES[1:])
@pytest.mark.parametrize("twin", [t for t in TWINS if t.targets and t is not mlp], ids=repr)
def test_biases(twin, bias, variant, tmp_path, compare):
    """What has no bias, an embedding, saves none."""
    model = adapt(twin, bias=bias, **VARIANTS[variant])
    hold(twin, model, tmp_path, compare, **VARIANTS[variant])
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    biased = any(name.endswith("bias") for name in plain(twin).state_dict())
    saved = {key for key in tensors(tmp_path) if key.endswith("bias")}
    # Of MultiheadAttention's two biases PEFT saves one, whichever it is asked for.
    assert written["bias"] == ("lora_only" if biased else "none") and len(saved) == biased


@pytest.mark.sample(24)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("twin", TWINS, ids=repr)
def test_patterns(twin, variant, tmp_path, compare):
    """A rank and an alpha of its own for each layer type; the first of several targets."""
    name = (twin.targets or twin.parameters)[0]
    more = {**VARIANTS[variant], "rank_pattern": {name: 2}, "alpha_pattern": {f"^{name}": 7}}
    hold(twin, adapt(twin, **more), tmp_path, compare, **VARIANTS[variant])
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert 2 in (written["r"], *written["rank_pattern"].values())
    assert 7 in (written["lora_alpha"], *written["alpha_pattern"].values())


def test_a_stack_of_layers(tmp_path, compare):
    """One leaf scanned over, three layers there, with an alpha of their own each."""
    torch.manual_seed(1)
    module = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(3)))
    stack = jnp.stack([jnp.asarray(layer.weight.detach().numpy().T) for layer in module])
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["0", "1", "2"],
        alpha_pattern={"0": 1, "2": 9},
        init_lora_weights=False,
    )
    model = quiet(peft.get_peft_model, module, config)
    randomize(model)
    quiet(model.save_pretrained, tmp_path)
    read = dict(names={"w": "{}.weight"}, layouts={"w": "io"})
    params = jlora.peft.load(tmp_path, {"w": stack}, **read)
    np.testing.assert_array_equal(params["w"].scaling, [0.25, 1.5, 2.25])

    def fn(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    y = jlora.lora(fn, fallback="error")(params, x)
    compare(y, model(torch.tensor(x)).detach().numpy(), "three layers")
    jlora.peft.save(tmp_path / "again", params, names={"w": "{}.weight"})
    first, again = tensors(tmp_path), tensors(tmp_path / "again")
    assert set(first) == set(again) and all(torch.equal(first[k], again[k]) for k in first)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {written["lora_alpha"], *written["alpha_pattern"].values()} == {1, 6, 9}
