"""PEFT live: first values that are parts of the weight, the residual, and the way to plain LoRA."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import ALPHA, RANK, decaying, into_peft, nodes, plain, quiet, randomize, tensors
from twins import Twin, conv1d_hf, linear, mlp

import jlora.peft
from jlora import arithmetic, initializers

MOVING = [
    (twin, init)
    for twin in (linear, conv1d_hf, mlp)
    for init in ("pissa", "pissa_niter_16", "olora")
    if (twin, init) != (conv1d_hf, "olora")  # PEFT's own cannot run: test_peft_differences
]
moving = pytest.mark.parametrize(("twin", "init"), MOVING, ids=repr)


def config(twin: Twin, init: Any, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(twin.targets),
        init_lora_weights=init,
        **twin.config,
        **more,
    )


def attach(twin: Twin, theirs: peft.LoraConfig) -> tuple[Any, Any]:
    base = twin.params(decaying(twin))
    rules = jlora.peft.rules(theirs.to_dict(), base, names=twin.names)
    return base, jlora.attach(base, rules, key=jax.random.key(0))


@pytest.mark.sample(8)
@moving
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_the_same_product_and_the_same_residual(twin, init, rslora, compare):
    """Of both, A·B and the base: singular vectors may differ in sign."""
    theirs = config(twin, init, use_rslora=rslora)
    model = quiet(peft.get_peft_model, decaying(twin), theirs)
    _, ours = attach(twin, theirs)
    layers = dict(model.base_model.model.named_modules())
    for path, node in nodes(ours).items():
        name, turn = twin.moves[path]
        layer = layers[name.removesuffix(".weight")]
        a, b = (x["default"].weight.detach().numpy() for x in (layer.lora_A, layer.lora_B))
        assert float(node.scaling) == pytest.approx(layer.scaling["default"])
        compare(node.lora_a @ node.lora_b, (b @ a).T, f"A · B of {path}")
        compare(node.base, turn(layer.base_layer.weight.detach().numpy()), f"residual of {path}")
        assert node.residual


def test_over_bfloat16_the_factors_keep_their_precision(compare):
    """PEFT rounds A and B to bfloat16 as well, so its start is farther from the weight."""
    theirs = config(linear, "pissa")
    module = decaying(linear, lambda k: 2.0**-k).to(torch.bfloat16)  # little for it to round
    base = linear.params(module)
    model = quiet(peft.get_peft_model, module, theirs)
    rules = jlora.peft.rules(theirs.to_dict(), base, names=linear.names)
    node = jlora.attach(base, rules, key=jax.random.key(0))["layer"]["kernel"]
    layer = model.base_model.model.layer
    a, b = (np.float64(x["default"].weight.detach().numpy()) for x in (layer.lora_A, layer.lora_B))
    w = np.float64(base["layer"]["kernel"].astype(jnp.float32))
    there = np.float64(layer.base_layer.weight.detach().float().numpy()).T + 1.5 * (b @ a).T
    a, b, rest = (np.float64(x.astype(jnp.float32)) for x in (node.lora_a, node.lora_b, node.base))
    here = rest + 1.5 * a @ b
    error = [np.linalg.norm(x - w) / np.linalg.norm(w) for x in (there, here)]
    assert error[0] > 1e-3 and error[1] < 1e-4, error


@pytest.mark.sample(4)
@moving
def test_files_that_began_so(twin, init, tmp_path, compare):
    """PEFT saves A and B as they are and, loading, takes them out of the base weights again."""
    model = quiet(peft.get_peft_model, decaying(twin), config(twin, init))
    randomize(model)
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(decaying(twin))
    read = functools.partial(jlora.peft.load, tmp_path, base, names=twin.names)
    if "niter" in init:
        with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
            read()
        return
    params = read()
    x = twin.x(np.random.default_rng(0))
    out = model.eval()(torch.tensor(x)).detach().numpy()
    y = jlora.lora(twin.fn, fallback="error")(params, x)
    compare(y, out, "forward")
    again = quiet(peft.PeftModel.from_pretrained, decaying(twin), str(tmp_path))
    compare(y, again.eval()(torch.tensor(x)).detach().numpy(), "forward of PEFT's own loading")
    assert all(node.residual for node in nodes(params).values()) and nodes(params)
    merged = dict(jax.tree.leaves_with_path(jlora.merge(params)))
    theirs = twin.params(quiet(model.merge_and_unload))
    for path, want in jax.tree.leaves_with_path(theirs):
        compare(merged[path], want, f"merged {path}")


@pytest.mark.sample(4)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_what_peft_converted(init, rslora, tmp_path, compare):
    """Its file of rank 2r, and ours from the same A and B, are the same update of the weights."""
    twin = mlp
    model = quiet(peft.get_peft_model, decaying(twin), config(twin, init, use_rslora=rslora))
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for
    quiet(model.save_pretrained, tmp_path / "begun")
    randomize(model)
    quiet(model.save_pretrained, tmp_path / "trained")
    begun = tmp_path / "begun"
    (begun / "begun").mkdir()  # PEFT wants it as the sub-folder of an adapter
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (begun / "begun" / file).write_bytes((begun / file).read_bytes())
    x = twin.x(np.random.default_rng(0))
    out = model.eval()(torch.tensor(x)).detach().numpy()
    quiet(
        model.save_pretrained,
        tmp_path / "plain",
        path_initial_model_for_weight_conversion=str(begun / "begun"),
    )

    base = twin.params(decaying(twin))
    read = functools.partial(jlora.peft.load, params=base, names=twin.names)
    theirs = read(tmp_path / "plain")
    compare(jlora.lora(twin.fn, fallback="error")(theirs, x), out, "what PEFT converted")
    # PEFT's tensors, said to stand over a residual, which is what they do.
    started, ended = (over_residual(read(tmp_path / x)) for x in ("begun", "trained"))
    ours = arithmetic.residual_to_lora(ended, started, base)
    for (path, got), want in zip(nodes(ours).items(), nodes(theirs).values(), strict=True):
        assert got.rank == want.rank == 2 * RANK
        compare(got.lora_a, want.lora_a, f"A of {path}", 0)
        compare(got.lora_b, want.lora_b, f"B of {path}", 0)
        compare(got.scaling, want.scaling, f"scaling of {path}", 1e-6)


def over_residual(params: Any) -> Any:
    is_leaf = lambda x: isinstance(x, jlora.LoraArray)
    mark = lambda x: dataclasses.replace(x, residual=True) if is_leaf(x) else x
    return jax.tree.map(mark, params, is_leaf=is_leaf)


@pytest.mark.sample(3)
@moving
def test_ours_converted_load_in_peft(twin, init, tmp_path, compare):
    """Trained here over a residual, converted, saved: PEFT on the original weights agrees."""
    base, initial = attach(twin, config(twin, init))
    rng = np.random.default_rng(1)
    trainable, frozen = jlora.partition(initial)
    move = lambda x: x + jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype)
    params = jlora.combine(jax.tree.map(move, trainable), frozen)
    x = twin.x(np.random.default_rng(0))
    y = jlora.lora(twin.fn, fallback="error")(params, x)
    converted = arithmetic.residual_to_lora(params, initial, base)
    compare(jlora.lora(twin.fn, fallback="error")(converted, x), y, "plain LoRA of rank 2r")
    jlora.peft.save(tmp_path, converted, names=twin.names, **twin.config)
    assert all(RANK * 2 in t.shape for t in tensors(tmp_path).values())
    same = dataclasses.replace(twin, make=lambda: decaying(twin))
    reloaded, result = into_peft(same, tmp_path)
    assert not result.missing_keys and not result.unexpected_keys
    compare(reloaded(torch.tensor(x)).detach().numpy(), y, "PEFT on the original weights")


def test_minor_components(tmp_path, compare):
    """PEFT's MiCA: A is zero, B the last output directions; its files are plain LoRA."""
    model = quiet(peft.get_peft_model, decaying(linear), config(linear, "mica"))
    layer = model.base_model.model.layer
    base = linear.params(decaying(linear))
    a, b = initializers.mica(jax.random.key(0), base["layer"]["kernel"], RANK)
    assert not a.any() and not layer.lora_A["default"].weight.any()
    want = layer.lora_B["default"].weight.detach().numpy()
    compare(b.T @ b, want @ want.T, "the directions of B")
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_()
    quiet(model.save_pretrained, tmp_path)
    params = jlora.peft.load(tmp_path, base, names=linear.names)
    x = linear.x(np.random.default_rng(0))
    out = model.eval()(torch.tensor(x)).detach().numpy()
    compare(jlora.lora(linear.fn, fallback="error")(params, x), out, "forward")


def test_the_smallest_parts_of_a_weight(compare):
    """MiLoRA, which PEFT has not: against PyTorch's own decomposition."""
    base = linear.params(plain(linear))["layer"]["kernel"]
    u, s, vt = torch.linalg.svd(torch.tensor(np.asarray(base)), full_matrices=False)
    part = ((u[:, -RANK:] * s[-RANK:]) @ vt[-RANK:]).numpy()
    a, b, rest = initializers.milora(jax.random.key(0), base, RANK, 1.5)
    compare(1.5 * a @ b, part, "s · A · B")
    compare(rest, np.asarray(base) - part, "residual")
