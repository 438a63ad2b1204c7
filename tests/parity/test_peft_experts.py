"""Several parameters of one module: nested by PEFT as they are declared, listed as a set."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from live import entries, quiet, tensors
from transformed import SIZES, tree

import jlora
import jlora.peft

PAIR = ["experts.up", "experts.down"]


class Experts(torch.nn.Module):
    """Two stacks of square weights, not declared in the order of the alphabet."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 6, 6))
        self.down = torch.nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return torch.relu(x[None] @ self.up.mT) @ self.down.mT


def made():
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.experts = Experts()
    net.forward = net.experts.forward
    return net


def written(folder, model, targets):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    model = quiet(peft.get_peft_model, model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape) / 3)
    quiet(model.save_pretrained, folder)
    return model


@pytest.mark.parametrize("targets", [PAIR, PAIR[::-1]])
def test_equal_shapes_are_told_by_the_order_of_names(tmp_path, compare, targets):
    model = written(tmp_path / "there", made(), targets)
    want = dict(quiet(model.merge_and_unload).named_parameters())
    net = made()
    names = {name.replace(".", "/"): name for name, _ in net.named_parameters()}
    params = {
        path: jnp.asarray(p.detach().numpy())
        for path, p in zip(names, net.parameters(), strict=True)
    }
    layouts = dict.fromkeys(params, "oi")
    read = jlora.peft.load(tmp_path / "there", params, names=names, layouts=layouts)
    for path, x in jlora.merge(read).items():
        compare(x, want[names[path]].detach().numpy(), path, 1e-6)
    listed = entries(tmp_path / "there")["target_parameters"]
    for given in (listed, listed[::-1]):
        jlora.peft.save(tmp_path / "back", read, names=names, target_parameters=given)
        first, again = tensors(tmp_path / "there"), tensors(tmp_path / "back")
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_mixtral(tmp_path):
    """Its own configuration lists down_proj first, and gate_up_proj is declared first."""
    sizes = SIZES | dict(num_key_value_heads=2, num_local_experts=3)
    model = lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**sizes))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    written(tmp_path / "there", model(), targets)
    params, names = tree(model())
    layouts = {path: "oi" for path in params if "experts" in path}
    read = jlora.peft.load(tmp_path / "there", params, names=names, layouts=layouts)
    given = entries(tmp_path / "there")["target_parameters"]
    for listed in (given, given[::-1]):
        jlora.peft.save(
            tmp_path / "back", read, names=names, layouts=layouts, target_parameters=listed
        )
        first, again = tensors(tmp_path / "there"), tensors(tmp_path / "back")
        assert first.keys() == again.keys()
        assert all(np.array_equal(first[key], again[key]) for key in first)
    quiet(peft.PeftModel.from_pretrained, model(), str(tmp_path / "back"))
