"""PEFT live: bfloat16 base weights under a float32 adapter, within one rounding."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import VARIANTS, adapt, load, plain, quiet
from twins import (
    GROUPED,
    TWINS,
    Twin,
    attention,
    conv,
    conv1d_hf,
    embedding,
    experts,
    heads,
    linear,
    mlp,
)

import jlora

LAYERS = [linear, conv1d_hf, *(conv(n, 2, 1) for n in (1, 2, 3))]
SEVERAL = [attention, heads, experts(False), experts(True), mlp]  # products one after another
DORA: dict[str, dict[str, Any]] = {**VARIANTS, "dora": {"use_dora": True}}


def unbiased(twin: Twin) -> Twin:
    """The layer with a bias of zeros: in JAX one is added to what is rounded, in PyTorch before."""

    def make() -> torch.nn.Module:
        module = twin.make()
        torch.nn.init.zeros_(module.layer.bias)
        return module

    return dataclasses.replace(twin, make=make)


def float32(x: Any) -> np.ndarray:
    return np.asarray(x.detach().float().numpy() if isinstance(x, torch.Tensor) else x, np.float32)


def one_rounding(*sizes: np.ndarray) -> np.ndarray:
    """The distance between neighboring bfloat16 numbers, at the largest of what was summed."""
    largest = np.max([np.abs(s) for s in sizes], axis=0)
    return 2.0 ** (np.floor(np.log2(np.maximum(largest, 2.0**-100))) - 7)


def in_bfloat16(twin: Twin, folder: Path, **more: Any) -> tuple[Any, Any, Any]:
    """PEFT's model and ours over one bfloat16 base, with a float32 adapter; and the base."""
    quiet(adapt(twin, **more).save_pretrained, folder)
    module = plain(twin).to(torch.bfloat16)
    model = quiet(peft.PeftModel.from_pretrained, module, str(folder)).eval()
    base = twin.params(plain(twin).to(torch.bfloat16))
    return model, load(folder, base, twin), base


def inputs(twin: Twin) -> tuple[Any, Any]:
    """An input of the layer's, for PyTorch and for JAX; numbers in bfloat16."""
    x = twin.x(np.random.default_rng(0))
    if x.dtype != np.float32:
        return torch.tensor(x), jnp.asarray(x)
    return torch.tensor(x).to(torch.bfloat16), jnp.asarray(x, jnp.bfloat16)


EACH = [
    (twin, variant)
    for twin in (*map(unbiased, (*LAYERS, *GROUPED)), embedding)
    for variant in DORA
    if variant != "dora" or twin.merges  # of a convolution with groups PEFT has no DoRA
]


@pytest.mark.sample(16)
@pytest.mark.parametrize(("twin", "variant"), EACH, ids=str)
def test_a_layer(twin: Twin, variant: str, tmp_path):
    model, params, _ = in_bfloat16(twin, tmp_path, **DORA[variant])
    tx, jx = inputs(twin)
    theirs = float32(model(tx))
    with model.disable_adapter():
        without = float32(model(tx))
    y = jlora.lora(twin.fn, dtype=jnp.float32, fallback="error")(params, jx)
    assert y.dtype == jnp.bfloat16
    sizes = theirs, without, theirs - without
    assert (np.abs(float32(y) - theirs) <= one_rounding(*sizes)).all()


@pytest.mark.sample(8)
@pytest.mark.parametrize("twin", SEVERAL, ids=repr)
def test_products_one_after_another(twin: Twin, tmp_path):
    """Each rounds what it gives on, and not in one order: so both are held to what is exact."""
    model, params, _ = in_bfloat16(twin, tmp_path)
    params = twin.as_peft(params)
    tx, jx = inputs(twin)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = np.float64(jlora.lora(twin.fn)(wide, jx.astype(jnp.float32)))
    y = jlora.lora(twin.fn, dtype=jnp.float32, fallback="error")(params, jx)
    assert y.dtype == jnp.bfloat16
    theirs, ours = (np.linalg.norm(float32(z) - exact) for z in (model(tx), y))
    assert ours <= theirs + 2.0**-8 * np.linalg.norm(exact)


# PEFT rounds the delta of these before it adds it, and the sum again.
ROUNDED_TWICE = ("embedding", "MultiheadAttention", "experts_out_in", "experts_in_out")
MERGED = [
    (twin, variant)
    for twin in TWINS
    for variant in DORA
    if variant != "dora" or (twin.targets and twin is not attention)  # PEFT has none of the others
]


@pytest.mark.sample(16)
@pytest.mark.parametrize(("twin", "variant"), MERGED, ids=str)
def test_merging(twin: Twin, variant: str, tmp_path, compare):
    model, params, base = in_bfloat16(twin, tmp_path, **DORA[variant])
    merged = jlora.merge(twin.as_peft(params))
    ours, weights = (dict(jax.tree.leaves_with_path(t)) for t in (merged, base))
    for path, want in jax.tree.leaves_with_path(twin.params(quiet(model.merge_and_unload))):
        assert ours[path].dtype == want.dtype == jnp.bfloat16
        got, want, before = float32(ours[path]), float32(want), float32(weights[path])
        assert (np.abs(got - want) <= one_rounding(want, before, want - before)).all()
        twice = twin.name in ROUNDED_TWICE
        assert (got == want).mean() > (0.5 if twice else 0.99)
        compare(got, want, f"merged {path}", 2**-8)


@pytest.mark.sample(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("twin", GROUPED, ids=repr)
def test_merging_groups(twin: Twin, variant: str, tmp_path, compare):
    """PEFT merges none; its A and B are asked for what they make of each input alone."""
    model, params, base = in_bfloat16(twin, tmp_path, **VARIANTS[variant])
    layer = model.base_model.model.layer
    a, b = (x["default"].double() for x in (layer.lora_A, layer.lora_B))
    a.padding, a.stride = (tuple(n for _ in a.stride) for n in (0, 1))
    kernel = a.weight.shape[1:]
    each = torch.eye(kernel.numel(), dtype=torch.float64).reshape(-1, *kernel)
    delta = layer.scaling["default"] * b(a(each)).flatten(1)  # (in · k..., out)
    delta = np.moveaxis(delta.detach().numpy().reshape(*kernel, -1), 0, -2)
    before = float32(base["layer"]["kernel"])
    want = float32(torch.tensor(before.astype(np.float64) + delta).to(torch.bfloat16))
    got = jlora.merge(params)["layer"]["kernel"]
    assert got.dtype == jnp.bfloat16
    got = float32(got)
    assert (np.abs(got - want) <= one_rounding(want, before, want - before)).all()
    assert (got == want).mean() > 0.99
    compare(got, want, "merged", 2**-8)
