"""PEFT live: several adapters at once."""

import dataclasses
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from live import adapt, plain, quiet, randomize, save
from several import slopes_of_several, together
from twins import TWINS, conv, conv1d_hf, grouped, linear, mlp

import jlora.peft

# PEFT lets one adapter alone have biases.
CASES = [(twin, "none") for twin in (*TWINS, grouped(2, 2))]
CASES += [(linear, "lora_only"), (conv(2, 2, 1), "lora_only"), (mlp, "all")]


@pytest.mark.sample(16)
@pytest.mark.parametrize(("twin", "bias"), CASES, ids=str)
def test_several_active_adapters(twin, bias, tmp_path, compare):
    model = adapt(twin, bias=bias)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=True,
        target_modules=list(twin.targets) or None,
        target_parameters=list(twin.parameters) or None,
        init_lora_weights=False,
        **twin.config,
    )
    quiet(model.add_adapter, "other", config)
    quiet(model.base_model.set_adapter, ["default", "other"])
    randomize(model)
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(plain(twin))
    read = dict(names=twin.names, layouts=twin.layouts, kinds=twin.kinds)
    adapters = [
        jlora.peft.load(tmp_path, base, adapter=name, **read) for name in ("default", "other")
    ]
    join = lambda trees: together([twin.as_peft(tree) for tree in trees])
    apply = jlora.lora(twin.fn, fallback="error")
    fn = lambda trees, x: apply(join(trees), x)
    slopes_of_several(twin, model, adapters, fn, tmp_path, compare)
    if not twin.merges:
        return
    merged = dict(jax.tree.leaves_with_path(jlora.merge(join(adapters))))
    theirs = twin.params(quiet(model.merge_and_unload))
    for path, want in jax.tree.leaves_with_path(theirs):
        compare(merged[path], want, f"merged {path}")


@pytest.mark.parametrize("twin", [linear, conv1d_hf, conv(2, 2, 1)], ids=repr)
def test_several_biases_of_lora_b(twin, tmp_path, compare):
    """What they add to the layer's bias adds up, as the updates of its weight do."""
    model = adapt(twin, lora_bias=True)
    options = dict(r=2, lora_alpha=5, use_rslora=True, lora_bias=True, init_lora_weights=False)
    config = peft.LoraConfig(target_modules=list(twin.targets), **options, **twin.config)
    names = ("default", "other")
    quiet(model.add_adapter, "other", config)
    quiet(model.base_model.set_adapter, list(names))
    randomize(model)
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(plain(twin))
    read = dict(names=twin.names, layouts=twin.layouts, kinds=twin.kinds)
    adapters = [jlora.peft.load(tmp_path, base, adapter=name, **read) for name in names]

    def join(trees: list[Any]) -> Any:
        first, added = (tree["layer"]["bias"] for tree in trees)
        bias = dataclasses.replace(first, value=first.value + added.value - added.base)
        return {"layer": {**together(trees)["layer"], "bias": bias}}

    x = twin.x(np.random.default_rng(0))
    tx = torch.tensor(x, requires_grad=True)
    out = model(tx)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    trainable, frozen = jlora.partition(adapters)

    def loss(trainable: Any, x: Any) -> Any:
        y = jlora.lora(twin.fn, fallback="error")(join(jlora.combine(trainable, frozen)), x)
        return (y * weight.numpy()).sum(), y

    (grads, of_x), y = jax.grad(loss, (0, 1), has_aux=True)(trainable, x)
    compare(y, out.detach().numpy(), "forward")
    compare(of_x, tx.grad.numpy(), "gradient of the input")
    theirs = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, own, tree in zip(names, jlora.combine(grads, frozen), adapters, strict=True):
        ours = save(tmp_path / f"gradients of {name}", own, twin, use_rslora=name == "other")
        prefix, s = "base_model.model.layer.", float(tree["layer"]["kernel"].scaling)
        ours[f"{prefix}lora_B.bias"] = s * ours.pop(f"{prefix}base_layer.bias")
        find = peft.get_peft_model_state_dict
        want = quiet(find, model, state_dict=theirs, adapter_name=name)
        assert set(ours) == set(want) and len(want) == 3
        for key, grad in want.items():
            compare(ours[key].numpy(), grad.numpy(), f"{name}: gradient of {key}")
    merged = dict(jax.tree.leaves_with_path(jlora.merge(join(adapters))))
    for path, want in jax.tree.leaves_with_path(twin.params(quiet(model.merge_and_unload))):
        compare(merged[path], want, f"merged {path}")
