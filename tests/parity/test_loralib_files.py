"""loralib live: the files of its merged layers and its convolutions, and where it goes wrong.

| what | loralib 0.1.2 | jlora |
|---|---|---|
| Conv1d, Conv3d with a window above 1 | fails | refused with the reason |
| lora_state_dict(bias="lora_only") of a convolution | leaves its bias out | loads what is there |
| a convolution's lora_dropout | ignored | falls on A's input |
| eval() and train() again | changes the weights | `detach` has them bit for bit |
| MergedLinear without an enabled part | fails when it is called | refused when it is asked for |
"""

from pathlib import Path
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


def model_of(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer in a model, with A, B and its bias other than they began."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "bias" in name:
                p.copy_(torch.randn_like(p))
    return model


def write(folder: Path, model: torch.nn.Module, bias: str = "all") -> set[str]:
    state = loralib.lora_state_dict(model, bias=bias)
    save_file(
        {k: x.contiguous().clone() for k, x in state.items()}, folder / "adapter_model.safetensors"
    )
    return set(state)


def gradients(fn: Any, params: Any, x: np.ndarray) -> tuple[Any, Any, Any]:
    """The output, the gradient of A, B and full parameters, and that of the input."""
    trainable, frozen = jlora.partition(params)

    def loss(trainable: Any, x: Any) -> Any:
        y = jlora.lora(fn, fallback="error")(jlora.combine(trainable, frozen), x)
        return (y**2).sum(), y

    (own, of_x), y = jax.grad(loss, (0, 1), has_aux=True)(trainable, x)
    return y, own, of_x


MERGED = {
    "query_value": ([True, False, True], ((0, 4), (8, 12))),
    "all": ([True, True], None),
    "last": ([False, True], ((4, 8),)),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("turned", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize(("enabled", "slices"), MERGED.values(), ids=MERGED)
def test_merged_linear(enabled, slices, turned, tmp_path, compare):
    layer = loralib.MergedLinear(
        *(7, 4 * len(enabled)),
        r=RANK,
        lora_alpha=ALPHA,
        enable_lora=enabled,
        fan_in_fan_out=turned,
    )
    model = model_of(layer)
    assert write(tmp_path, model) == {"layer.lora_A", "layer.lora_B", "layer.bias"}
    w = layer.weight.detach().numpy()
    base = {"w": jnp.asarray(w if turned else w.T), "b": jnp.zeros(layer.out_features)}
    names = {"w": "layer.weight", "b": "layer.bias"}
    given = {"slices": {"w": slices}} if slices else {}
    params = jlora.peft.load(tmp_path, base, names=names, alpha=ALPHA, **given)
    node = params["w"]
    assert node.rank == RANK and float(node.scaling) == pytest.approx(ALPHA / RANK)
    assert node.slices == (slices or ((0, 4), (4, 8)))

    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    tx = torch.tensor(x, requires_grad=True)
    out = model(tx)
    out.square().sum().backward()
    y, own, of_x = gradients(lambda p, x: x @ p["w"] + p["b"][None], params, x)
    compare(y, out.detach().numpy(), "forward")
    compare(of_x, tx.grad.numpy(), "gradient of the input")
    compare(own["w"].lora_a.T, layer.lora_A.grad.numpy(), "gradient of A")
    compare(own["w"].lora_b.T, layer.lora_B.grad.numpy(), "gradient of B")
    compare(own["b"].value, layer.bias.grad.numpy(), "gradient of the bias")
    layer.eval()
    merged = layer.weight.detach().numpy()
    compare(jlora.merge(params)["w"], merged if turned else merged.T, "merged")


def test_a_merged_linear_needs_to_be_told_which(tmp_path):
    layer = loralib.MergedLinear(7, 12, r=RANK, enable_lora=[True, False, True])
    write(tmp_path, model_of(layer), "none")
    base, names = {"w": jnp.ones((7, 12))}, {"w": "layer.weight"}
    load = lambda **more: jlora.peft.load(tmp_path, base, names=names, alpha=1, **more)
    with pytest.raises(
        ValueError, match=r'MergedLinear of loralib with 2 adapted parts.*`slices=\{"w"'
    ):
        load()
    with pytest.raises(ValueError, match=r'2 keys have another shape: "layer.lora_A" \[6, 7\]'):
        load(slices={"w": ((0, 4),)})
    with pytest.raises(ValueError, match=r"increasing order that do not overlap"):
        load(slices={"w": ((8, 12), (0, 4))})
    with pytest.raises(KeyError, match=r'`slices` has "v", which is no parameter'):
        load(slices={"v": ((0, 4),)})
    write(tmp_path, model_of(loralib.Linear(7, 13, r=RANK)), "none")
    with pytest.raises(ValueError, match=r'1 keys have another shape: "layer.lora_B" \[13, 3\]'):
        load()
    write(tmp_path, model_of(loralib.Linear(7, 12, r=RANK)), "none")
    for given in (((0, 4), (8, 12)), ((0, 4),)):
        with pytest.raises(ValueError, match=r"2 keys have another shape|1 keys have another"):
            load(slices={"w": given})
    file = {"layer.lora_A.weight": torch.ones(2, 7), "layer.lora_B.weight": torch.ones(12, 2)}
    save_file(file, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r'`slices` has "w", which the file does not adapt in'):
        load(slices={"w": ((0, 4), (8, 12))})


def conv(p: Any, x: Any, groups: int, stride: int, padding: int) -> Any:
    dims = x.ndim - 2
    letters = "DHW"[3 - dims :]
    y = lax.conv_general_dilated(
        jnp.moveaxis(x, 1, -1),
        p["w"],
        (stride,) * dims,
        [(padding, padding)] * dims,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )
    return jnp.moveaxis(y + p["b"].reshape((1,) * (dims + 1) + (-1,)), -1, 1)


CONVOLUTIONS = {
    "Conv2d": (loralib.Conv2d, 2, 3, {}),
    "Conv2d_stride": (loralib.Conv2d, 2, 3, {"stride": 2, "padding": 1}),
    "Conv2d_groups": (loralib.Conv2d, 2, 3, {"groups": 2}),
    "Conv2d_depthwise": (loralib.Conv2d, 2, 5, {"groups": 4, "padding": 2}),
    "Conv2d_pointwise": (loralib.Conv2d, 2, 1, {}),
    "Conv1d_pointwise": (loralib.Conv1d, 1, 1, {}),
    "Conv3d_pointwise": (loralib.Conv3d, 3, 1, {"groups": 2}),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("make", "dims", "window", "more"), CONVOLUTIONS.values(), ids=CONVOLUTIONS
)
def test_convolutions(make, dims, window, more, tmp_path, compare):
    """Its B·A is a matrix (out·k, in·k) read as a kernel; here a kernel's A and a pointwise B."""
    layer = make(4, 8, window, r=RANK, lora_alpha=ALPHA, **more)
    model = model_of(layer)
    assert write(tmp_path, model) == {"layer.lora_A", "layer.lora_B", "layer.conv.bias"}
    base = {"w": jnp.asarray(hwio(layer.conv.weight.detach().numpy())), "b": jnp.zeros(8)}
    names = {"w": "layer.conv.weight", "b": "layer.conv.bias"}
    layouts = {"w": "i" * (dims + 1) + "o"}
    params = jlora.peft.load(tmp_path, base, names=names, layouts=layouts, alpha=ALPHA)
    x = np.random.default_rng(0).normal(size=(2, 4, *(9, 8, 7)[:dims])).astype(np.float32)
    tx = torch.tensor(x, requires_grad=True)
    out = model(tx)
    out.square().sum().backward()
    options = [more.get(name, k) for name, k in (("groups", 1), ("stride", 1), ("padding", 0))]
    y, own, of_x = gradients(lambda p, x: conv(p, x, *options), params, x)
    compare(y, out.detach().numpy(), "forward")
    compare(of_x, tx.grad.numpy(), "gradient of the input")
    compare(own["b"].value, layer.conv.bias.grad.numpy(), "gradient of the bias")
    model.eval()
    merged = hwio(layer.conv.weight.detach().numpy())
    compare(jlora.merge(params)["w"], merged, "merged")


@pytest.mark.parametrize("shape", [(9, 4), (10, 12), (9, 16)], ids=str)
def test_a_convolution_of_another_shape(shape, tmp_path):
    file = {"layer.lora_A": torch.ones(shape), "layer.lora_B": torch.ones(24, 9)}
    save_file(file, tmp_path / "adapter_model.safetensors")
    base, names = {"w": jnp.ones((3, 3, 4, 8))}, {"w": "layer.conv.weight"}
    with pytest.raises(ValueError, match=r"keys? have another shape|keys have another shape"):
        jlora.peft.load(tmp_path, base, names=names, alpha=1)


@pytest.mark.parametrize("make", [loralib.Conv1d, loralib.Conv3d])
def test_only_square_windows(make, tmp_path):
    dims = 1 if make is loralib.Conv1d else 3
    layer = make(4, 8, 3, r=RANK)
    x = torch.ones(2, 4, *(9, 8, 7)[:dims])
    with pytest.raises(RuntimeError, match="shape"):
        layer(x)
    write(tmp_path, model_of(layer), "none")
    base = {"w": jnp.asarray(hwio(layer.conv.weight.detach().numpy()))}
    names, layouts = {"w": "layer.conv.weight"}, {"w": "i" * (dims + 1) + "o"}
    with pytest.raises(ValueError, match=r'a window of k · k or of 1 only; "w" \[.*\] has \['):
        jlora.peft.load(tmp_path, base, names=names, layouts=layouts, alpha=1)


def test_the_bias_of_a_convolution_is_left_out(tmp_path):
    layer = loralib.Conv2d(4, 8, 3, r=RANK)
    assert write(tmp_path, model_of(layer), "lora_only") == {"layer.lora_A", "layer.lora_B"}
    base = {"w": jnp.ones((3, 3, 4, 8)), "b": jnp.zeros(8)}
    names = {"w": "layer.conv.weight", "b": "layer.conv.bias"}
    params = jlora.peft.load(tmp_path, base, names=names, alpha=1)
    assert isinstance(params["w"], jlora.LoraArray) and params["b"] is base["b"]


def test_a_convolution_has_no_dropout(tmp_path):
    layer = loralib.Conv2d(4, 8, 3, r=RANK, lora_dropout=0.5)
    model = model_of(layer)
    write(tmp_path, model)
    x = np.random.default_rng(0).normal(size=(2, 4, 9, 8)).astype(np.float32)
    theirs = [model.train()(torch.tensor(x)) for _ in range(2)]
    assert torch.equal(*theirs)
    base = {"w": jnp.asarray(hwio(layer.conv.weight.detach().numpy())), "b": jnp.zeros(8)}
    names = {"w": "layer.conv.weight", "b": "layer.conv.bias"}
    params = jlora.peft.load(tmp_path, base, names=names, alpha=1)
    fn = lambda p, x: conv(p, x, 1, 1, 0)
    whole, some = (
        jlora.lora(fn, dropout=rate, key=jax.random.key(0))(params, x) for rate in (0.0, 0.5)
    )
    np.testing.assert_allclose(whole, theirs[0].detach().numpy(), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(whole - some).max()) > 0.1


def test_eval_and_train_change_the_weights():
    torch.manual_seed(0)
    layer = loralib.Linear(64, 64, r=RANK)
    for p in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(p)
    before = layer.weight.detach().clone()
    layer.eval()
    layer.train()
    w = jnp.asarray(before.numpy().T)
    spec = jlora.LoraSpec(RANK)
    ours = jlora.detach(jlora.attach({"w": w}, {"w": spec}, key=jax.random.key(0)))[0]["w"]
    changed = [(layer.weight != before).float().mean().item(), (ours.T != before.numpy()).mean()]
    assert changed[0] > 0.1 and changed[1] == 0, changed


def test_no_part_enabled():
    layer = loralib.MergedLinear(7, 12, r=RANK, enable_lora=[False, False])
    with pytest.raises(AttributeError, match="lora_A"):
        layer(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"slices=\(\)"):
        jlora.LoraSpec(RANK, slices=())
