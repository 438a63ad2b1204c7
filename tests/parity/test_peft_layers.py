"""PEFT live, layer by layer: its files read, the same numbers, and its files written again."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from twins import TWINS, Twin, mlp

import jlora.peft

RANK, ALPHA = 4, 6
VARIANTS = {"plain": {}, "rslora": {"use_rslora": True}}
BIASES = ("none", "lora_only", "all")


def adapt(twin: Twin, **more: Any) -> Any:
    """The module under PEFT, every trainable tensor random."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(twin.targets) or None,
        target_parameters=list(twin.parameters) or None,
        init_lora_weights=False,
        **twin.config,
        **more,
    )
    model = quiet(peft.get_peft_model, twin.make(), config)
    randomize(model)
    return model.eval()


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) / 2)


def quiet(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of biases, Conv1D and targeted embeddings, rightly or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def save(folder: Path, params: Any, twin: Twin, **config: Any) -> dict[str, torch.Tensor]:
    given = {"target_parameters": list(twin.parameters)} if twin.parameters else {}
    jlora.peft.save(
        folder,
        params,
        names=twin.names,
        layouts=twin.layouts,
        kinds=twin.kinds,
        **given,
        **twin.config,
        **config,
    )
    return tensors(folder)


def load(folder: Path, base: Any, twin: Twin) -> Any:
    return jlora.peft.load(folder, base, names=twin.names, layouts=twin.layouts, kinds=twin.kinds)


def hold(twin: Twin, model: Any, folder: Path, compare: Any, **config: Any) -> None:
    """Forward, every gradient, the merged weights; and the file written again, bit for bit."""
    quiet(model.save_pretrained, folder)
    base = twin.params(plain(twin))
    params = load(folder, base, twin)
    computed = twin.as_peft(params)
    x = twin.x(np.random.default_rng(0))
    floating = x.dtype == np.float32
    tx = torch.tensor(x, requires_grad=True) if floating else torch.tensor(x)
    out = model(tx)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()

    apply = jlora.lora(twin.fn, fallback="error")
    trainable, frozen = jlora.partition(computed)

    def loss(trainable: Any, x: Any) -> Any:
        y = apply(jlora.combine(trainable, frozen), x)
        return (y * weight.numpy()).sum(), y

    argnums = (0, 1) if floating else (0,)
    grads, y = jax.grad(loss, argnums, has_aux=True)(trainable, x)
    compare(y, out.detach().numpy(), "forward")
    if floating:
        compare(grads[1], tx.grad.numpy(), "gradient of the input")
    gradients = jlora.combine(grads[0], jlora.partition(params)[1])
    gradients = save(folder / "gradients", gradients, twin, **config)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = quiet(peft.get_peft_model_state_dict, model, state_dict=theirs)
    assert set(gradients) == set(theirs)
    for key, grad in theirs.items():
        slope = next((s for part, s in twin.slopes.items() if part in key), 1.0)
        compare(slope * gradients[key].numpy(), grad.numpy(), f"gradient of {key}")

    again = save(folder / "again", params, twin, **config)
    first = tensors(folder)
    assert set(again) == set(first)
    for key, tensor in first.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key
    reloaded, result = into_peft(twin, folder / "again")
    assert not result.missing_keys and not result.unexpected_keys
    # MultiheadAttention's forward pass merges and unmerges, which is not exact.
    compare(reloaded(tx).detach().numpy(), out.detach().numpy(), "PEFT", 1e-6 if twin.slopes else 0)

    if not twin.merges:
        return
    merged = twin.params(quiet(model.merge_and_unload))
    ours = dict(jax.tree.leaves_with_path(jlora.merge(computed)))
    for path, want in jax.tree.leaves_with_path(merged):
        compare(ours[path], want, f"merged {path}")


def plain(twin: Twin) -> torch.nn.Module:
    """The module before PEFT, always the same."""
    torch.manual_seed(1)
    return twin.make()


def into_peft(twin: Twin, folder: Path) -> tuple[Any, Any]:
    """Load a folder into PEFT on fresh base weights; every warning of PEFT's is an error."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    model = quiet(peft.PeftModel, plain(twin), config)
    result = model.load_adapter(str(folder), "default")
    return model.eval(), result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("twin", TWINS, ids=repr)
def test_layers(twin, variant, tmp_path, compare):
    hold(twin, adapt(twin, **VARIANTS[variant]), tmp_path, compare, **VARIANTS[variant])


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
    params = jlora.peft.load(tmp_path, {"w": stack}, names={"w": "{}.weight"})
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
