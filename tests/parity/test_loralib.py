"""loralib live: its four layers, in its own factors, with their gradients and merged weights."""

from typing import Any

import jax
import jax.numpy as jnp
import loralib
import numpy as np
import pytest
import torch
from jax import lax
from safetensors.torch import save_file
from twins import hwio

import jlora.peft

RANK, ALPHA = 3, 5
S = jnp.float32(ALPHA / RANK)


def factors(layer: Any) -> tuple[Any, Any]:
    return tuple(jnp.asarray(p.detach().numpy()) for p in (layer.lora_A, layer.lora_B))


def hold(layer: Any, fn: Any, node: Any, x: np.ndarray, turn: Any, compare: Any) -> None:
    """`node(a, b)` is the LoraArray of loralib's factors, `turn` orients its weight as here."""
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p.copy_(torch.randn_like(p))
    floating = x.dtype == np.float32
    tx = torch.tensor(x, requires_grad=True) if floating else torch.tensor(x)
    layer.train()  # loralib's returns nothing
    out = layer(tx)
    out.square().sum().backward()
    apply = jlora.lora(fn, fallback="error")

    def loss(a: Any, b: Any, x: Any) -> Any:
        y = apply(node(a, b), x)
        return (y**2).sum(), y

    argnums = (0, 1, 2) if floating else (0, 1)
    grads, y = jax.grad(loss, argnums, has_aux=True)(*factors(layer), x)
    compare(y, out.detach().numpy(), "forward")
    tensors = [layer.lora_A, layer.lora_B, *([tx] if floating else [])]
    for grad, tensor in zip(grads, tensors, strict=True):
        compare(grad, tensor.grad.numpy(), "gradient")
    merged = jlora.merge({"w": node(*factors(layer))})["w"]
    layer.eval()
    weight = layer.conv.weight if hasattr(layer, "conv") else layer.weight
    compare(merged, turn(weight.detach().numpy()), "merged")


def test_linear(compare):
    torch.manual_seed(0)
    layer = loralib.Linear(7, 5, r=RANK, lora_alpha=ALPHA)
    w, bias = jnp.asarray(layer.weight.detach().numpy().T), layer.bias.detach().numpy()
    node = lambda a, b: jlora.LoraArray(w, a.T, b.T, S, "io")
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    hold(layer, lambda w, x: x @ w + bias[None], node, x, np.transpose, compare)


def test_embedding(compare):
    torch.manual_seed(0)
    layer = loralib.Embedding(11, 5, r=RANK, lora_alpha=ALPHA)
    w = jnp.asarray(layer.weight.detach().numpy())
    node = lambda a, b: jlora.LoraArray(w, a.T, b.T, S, "io")
    x = np.random.default_rng(0).integers(0, 11, (3, 4)).astype(np.int32)
    hold(layer, lambda w, x: jnp.take(w, x, axis=0), node, x, lambda w: w, compare)


@pytest.mark.sample(3)
@pytest.mark.parametrize("enabled", [[True, False, True], [True, True], [False, True]], ids=str)
def test_merged_linear(enabled, compare):
    """One LoRA for each enabled slice of the outputs: A side by side, B a block diagonal."""
    torch.manual_seed(0)
    h = 4
    layer = loralib.MergedLinear(7, h * len(enabled), r=RANK, lora_alpha=ALPHA, enable_lora=enabled)
    w, bias = jnp.asarray(layer.weight.detach().numpy().T), layer.bias.detach().numpy()

    def node(a: Any, b: Any) -> Any:
        slots = [k for k, on in enumerate(enabled) if on]
        wide = jnp.zeros((RANK * len(slots), h * len(enabled)))
        for n, slot in enumerate(slots):
            block = b[n * h : (n + 1) * h].T
            wide = wide.at[n * RANK : (n + 1) * RANK, slot * h : (slot + 1) * h].set(block)
        return jlora.LoraArray(w, a.T, wide, S, "io")

    x = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    hold(layer, lambda w, x: x @ w + bias[None, None], node, x, np.transpose, compare)


@pytest.mark.nightly
def test_conv2d(compare):
    """loralib's B·A is a (out·k, in·k) matrix read as a kernel: here of rank k·(r·k)."""
    torch.manual_seed(0)
    k, d_in, d_out = 3, 4, 6
    layer = loralib.Conv2d(d_in, d_out, k, r=RANK, lora_alpha=ALPHA)
    w = jnp.asarray(hwio(layer.conv.weight.detach().numpy()))
    bias = layer.conv.bias.detach().numpy()

    def node(a: Any, b: Any) -> Any:
        blocks = jnp.kron(jnp.eye(k), a.T).reshape(d_in, k, k, k * RANK * k)
        wide = b.reshape(d_out, k * RANK * k).T
        return jlora.LoraArray(w, jnp.transpose(blocks, (1, 2, 0, 3)), wide, S, "iiio")

    def fn(w: Any, x: Any) -> Any:
        y = lax.conv_general_dilated(
            jnp.moveaxis(x, 1, -1), w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.moveaxis(y + bias[None, None, None], -1, 1)

    x = np.random.default_rng(0).normal(size=(2, d_in, 8, 7)).astype(np.float32)
    hold(layer, fn, node, x, hwio, compare)


def test_a_model_s_flat_keys_load(tmp_path, compare):
    torch.manual_seed(0)
    layers = {
        "embed": loralib.Embedding(11, 7, r=RANK, lora_alpha=ALPHA),
        "fc": loralib.Linear(7, 5, r=RANK, lora_alpha=ALPHA),
    }
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    save_file(
        {
            key: x.contiguous()
            for key, x in loralib.lora_state_dict(model, bias="lora_only").items()
        },
        tmp_path / "adapter_model.safetensors",
    )
    base = {
        "embed": jnp.asarray(layers["embed"].weight.detach().numpy()),
        "fc": jnp.asarray(layers["fc"].weight.detach().numpy().T),
        "bias": jnp.zeros(5),
    }
    names = {"embed": "embed.weight", "fc": "fc.weight", "bias": "fc.bias"}
    params = jlora.peft.load(tmp_path, base, names=names, alpha=ALPHA)
    fn = lambda p, x: jnp.take(p["embed"], x, axis=0) @ p["fc"] + p["bias"][None]
    x = np.arange(6, dtype=np.int32)
    theirs = model(torch.tensor(x)).detach().numpy()
    compare(jlora.lora(fn, fallback="error")(params, x), theirs, "a model of loralib's")
