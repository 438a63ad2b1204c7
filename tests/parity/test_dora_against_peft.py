"""PEFT live, with DoRA and with a bias on lora_B."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import VARIANTS, adapt, hold, load, plain, quiet, save, tensors
from twins import Twin, attention, conv, conv1d_hf, embedding, experts, grouped, heads, linear, mlp

import jlora

LAYERS = [linear, conv1d_hf, embedding, conv(1, 2, 1), conv(2, 2, 1), conv(3, 1, 0)]
EVERY = [*LAYERS, heads, mlp]
BIASED = [linear, conv1d_hf, conv(1, 2, 1), conv(2, 2, 1), conv(3, 1, 0), grouped(2, 2)]
PATTERNS = {"plain": {}, "patterns": {"rank_pattern": {"layer": 2}, "alpha_pattern": {"^layer": 7}}}


def bare() -> torch.nn.Module:
    module = linear.make()
    module.layer = torch.nn.Linear(13, 7, bias=False)
    return module


@pytest.mark.sample(16)
@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("twin", EVERY, ids=repr)
def test_dora(twin, variant, rank, tmp_path, compare):
    """Forward, the gradients of x, A, B and m, the merged weight, the file bit for bit."""
    first = twin.targets[0]
    patterns = {"rank_pattern": {first: rank}, "alpha_pattern": {f"^{first}": 7}}
    model = adapt(twin, use_dora=True, **patterns, **VARIANTS[variant])
    hold(twin, model, tmp_path, compare, **VARIANTS[variant])
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["use_dora"] is True


@pytest.mark.nightly
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("twin", [t for t in EVERY if t not in (embedding, heads)], ids=repr)
def test_dora_and_biases(twin, bias, tmp_path, compare):
    hold(twin, adapt(twin, use_dora=True, bias=bias), tmp_path, compare)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["bias"] == (
        bias if twin is mlp else "lora_only"  # of one layer they are the same
    )


@pytest.mark.parametrize("twin", LAYERS, ids=repr)
def test_the_first_magnitude(twin, tmp_path, compare):
    """PEFT's, over a first update that is not zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, target_modules=["layer"], init_lora_weights=False, use_dora=True, **twin.config
    )
    quiet(quiet(peft.get_peft_model, twin.make(), config).save_pretrained, tmp_path)
    theirs = load(tmp_path, twin.params(plain(twin)), twin)
    (path,) = [p for p in twin.moves if not p.endswith("bias")]
    want = theirs["layer"][path.rpartition("/")[2]]

    def init(key: Any, weight: Any, rank: int, scaling: Any = 1.0, dtype: Any = None) -> Any:
        a, b = want.lora_a, want.lora_b
        return a.reshape(-1, rank), b.reshape(rank, -1)

    spec = jlora.LoraSpec(3, 8, init=init, layout=want.layout, dora=True)
    ours = jlora.attach(want.base, {"": spec}, key=jax.random.key(0))
    compare(ours.extra["magnitude"], want.extra["magnitude"], "first magnitude")


def test_dropout_with_dora(tmp_path, compare):
    """One mask for both: the one that jlora's key draws, found with an update that is the input."""
    model = adapt(linear, use_dora=True, lora_dropout=0.5)
    quiet(model.save_pretrained, tmp_path)
    params = load(tmp_path, linear.params(plain(linear)), linear)
    x, key = linear.x(np.random.default_rng(0)), jax.random.key(4)
    run = {"dropout": 0.5, "key": key, "fallback": "error"}
    eye = jlora.LoraArray(jnp.zeros((13, 13)), jnp.eye(13), jnp.eye(13), jnp.ones(()), "io")
    seen = jlora.lora(lambda p, x: x @ p, **run)(eye, x)
    assert 0.3 < float((seen == 0).mean()) < 0.7

    class Mask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor(np.asarray(seen) / linear.x(np.random.default_rng(0)))

    model.train()
    model.base_model.model.layer.lora_dropout["default"] = Mask()
    out = model(torch.tensor(x))
    (out.sum() * 0.5).backward()
    t, f = jlora.partition(params)

    def loss(t: Any) -> Any:
        y = jlora.lora(linear.fn, **run)(jlora.combine(t, f), x)
        return y.sum() * 0.5, y

    grads, y = jax.grad(loss, has_aux=True)(t)
    compare(y, out.detach().numpy(), "forward under dropout")
    layer, node = model.base_model.model.layer, grads["layer"]["kernel"]
    compare(node.lora_a.T, layer.lora_A["default"].weight.grad.numpy(), "A")
    compare(node.lora_b.T, layer.lora_B["default"].weight.grad.numpy(), "B")
    compare(
        node.extra["magnitude"], layer.lora_magnitude_vector["default"].weight.grad.numpy(), "m"
    )


def test_dora_over_bfloat16(tmp_path, compare):
    """PEFT rounds the norm's weight to bfloat16, so only the rounding is shared."""
    model = adapt(linear, use_dora=True)
    quiet(model.save_pretrained, tmp_path)
    base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), linear.params(plain(linear)))
    params = load(tmp_path, base, linear)
    x = linear.x(np.random.default_rng(0))
    y = jlora.lora(linear.fn, fallback="error")(params, x.astype(jnp.bfloat16))
    theirs = model.to(torch.bfloat16)(torch.tensor(x).bfloat16())
    compare(y, theirs.float().detach().numpy(), "bfloat16", 4 * 2.0**-8)


@pytest.mark.parametrize("twin", [attention, experts(False)], ids=repr)
def test_what_peft_itself_refuses(twin: Twin, tmp_path):
    with pytest.raises(ValueError, match=r"DoRA|use_dora"):
        adapt(twin, use_dora=True)
    params = twin.params(plain(twin))
    layouts = {p: twin.layouts.get(p, "io") for p in twin.moves if not p.endswith("bias")}
    rules = {path: jlora.LoraSpec(2, dora=True) for path in layouts}
    params = jlora.attach(params, rules, key=jax.random.key(0), layouts=layouts)
    with pytest.raises(
        ValueError, match=r"PEFT has no DoRA \(use_dora=True\) for (Multihead|a par)"
    ):
        save(tmp_path, params, twin)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("twin", [embedding, experts(False)], ids=repr)
def test_where_peft_itself_refuses_a_bias_of_lora_b(twin: Twin):
    with pytest.raises(ValueError, match="lora_bias=True"):
        adapt(twin, lora_bias=True)
    config = dict(peft_type="LORA", lora_bias=True, target_modules=list(twin.targets) or None)
    config |= dict(target_parameters=list(twin.parameters) or None)
    with pytest.raises(ValueError, match=r"lora_bias=True lora_B of \"layer\" has a bias"):
        jlora.peft.rules(config, twin.params(plain(twin)), names=twin.names)


@pytest.mark.sample(12)
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("twin", BIASED, ids=repr)
def test_a_bias_of_lora_b(twin, variant, patterns, tmp_path, compare):
    """It is a part of the layer's own bias, s·b, so its gradient is s times the bias's."""
    model = adapt(twin, lora_bias=True, **PATTERNS[patterns], **VARIANTS[variant])
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(plain(twin))
    params = load(tmp_path, base, twin)
    assert params["layer"]["bias"].base is base["layer"]["bias"]
    x = twin.x(np.random.default_rng(0))
    tx = torch.tensor(x, requires_grad=True)
    out = model(tx)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    t, f = jlora.partition(params)

    def loss(t: Any, x: Any) -> Any:
        y = jlora.lora(twin.fn, fallback="error")(jlora.combine(t, f), x)
        return (y * weight.numpy()).sum(), y

    (grads, of_x), y = jax.grad(loss, (0, 1), has_aux=True)(t, x)
    compare(y, out.detach().numpy(), "forward")
    compare(of_x, tx.grad.numpy(), "gradient of the input")
    theirs = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = quiet(peft.get_peft_model_state_dict, model, state_dict=theirs)
    ours = save(tmp_path / "gradients", jlora.combine(grads, f), twin, **VARIANTS[variant])
    s = float(params["layer"]["kernel"].scaling)
    prefix = "base_model.model.layer."
    ours[f"{prefix}lora_B.bias"] = s * ours.pop(f"{prefix}base_layer.bias")
    assert set(ours) == set(theirs) and len(ours) == 3
    for key, grad in theirs.items():
        compare(ours[key].numpy(), grad.numpy(), f"gradient of {key}")

    given = {"lora_bias": True, **VARIANTS[variant]}
    first, again = tensors(tmp_path), save(tmp_path / "again", params, twin, **given)
    assert set(again) == set(first)
    for key, tensor in first.items():
        compare(again[key], tensor, key, 1e-5 if key.endswith("bias") else 0)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "again"))
    assert config.lora_bias and config.bias == "none"
    reloaded = quiet(peft.PeftModel, plain(twin), config)
    result = reloaded.load_adapter(str(tmp_path / "again"), "default")
    assert not result.missing_keys and not result.unexpected_keys
    compare(reloaded.eval()(torch.tensor(x)).detach().numpy(), out.detach().numpy(), "PEFT")

    if not twin.merges:
        return
    merged = twin.params(quiet(model.merge_and_unload))
    ours = dict(jax.tree.leaves_with_path(jlora.merge(params)))
    for path, want in jax.tree.leaves_with_path(merged):
        compare(ours[path], want, f"merged {path}")


def test_a_bias_of_lora_b_where_the_layer_has_none(tmp_path):
    model = adapt(dataclasses.replace(linear, make=bare), lora_bias=True)
    quiet(model.save_pretrained, tmp_path)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        model.merge_and_unload()
    base = {"layer": {"kernel": jnp.ones((13, 7))}}
    names = {"layer/kernel": "layer.weight"}
    with pytest.raises(ValueError, match=r'lora_B of "layer" has a bias.*names no "layer.bias"'):
        jlora.peft.load(tmp_path, base, names=names)
