"""Where jlora means to give another answer than PEFT 0.21.2: each with both numbers.

| what | PEFT | jlora |
|---|---|---|
| an entry of target_modules that matches nothing | ignored | an error |
| "all-linear" in a plain module | takes the output head too | leaves a head of the usual names |
| `safe_merge` over bfloat16 | rounds the delta, then the sum | rounds once |
| unmerge | changes the weights | `detach` has them bit for bit |
| MultiheadAttention's output projection | adds its update twice | once |
| MultiheadAttention's lora_dropout | ignored | falls on A's input |
| several active adapters of MultiheadAttention | the last alone gets gradients | all do |
| several active DoRA adapters | in turn, by order; under dropout their sum | one gain a weight |
| lora_dropout of expert parameters | refused | falls on A's input |
| the random B of experts (`init_lora_weights=False`) | U(±1/√(r·E)) | U(±1/√r), as of a layer |
| a convolution with groups | A sees all channels, no merge | so without groups; with, its group's |
| DoRA of a convolution with groups | a norm of B A as if without | the kernel's own norm |
| a dilated convolution | fails | works |
| a convolution's padding_mode | not for A: merged is another | the program's own, for A too |
| the linear sum of adapters | has cross terms | A and B side by side are exact |
| the same, of rsLoRA | s = √r where 1 is meant | exact |
| "olora" on transformers' Conv1D | fails | works |
| "pissa_niter_4" in a file | other random numbers, another base | refused |
| "pissa" over bfloat16 | rounds A and B too (test_peft_initial) | rounds the residual alone |
| bfloat16 activations | A, B in float32 | in bfloat16, unless `dtype=` says otherwise |
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from jax import lax
from test_dora_several import Kept, at_once, in_turn, two
from test_peft_groups import grouped as whole_of_groups
from test_peft_layers import adapt, plain, quiet, randomize
from test_peft_several import together
from twins import Holder, Twin, attention, conv, conv1d_hf, experts, hwio, linear, mlp

import jlora.peft


def load(twin: Twin, model: Any, folder: Any, base: Any = None, **more: Any) -> Any:
    quiet(model.save_pretrained, folder)
    read = dict(names=twin.names, layouts=twin.layouts, kinds=twin.kinds)
    return jlora.peft.load(folder, base or twin.params(plain(twin)), **read, **more)


def distance(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_an_entry_that_matches_nothing():
    config = peft.LoraConfig(target_modules=["up", "dwon"])
    model = quiet(peft.get_peft_model, mlp.make(), config)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 1
    with pytest.raises(ValueError, match=r"\['dwon'\] of the configuration choose nothing.*down"):
        jlora.peft.rules(config.to_dict(), mlp.params(mlp.make()), names=mlp.names)


def test_all_linear_in_a_plain_module():
    module = torch.nn.Sequential()
    module.add_module("up", torch.nn.Linear(4, 4))
    module.add_module("lm_head", torch.nn.Linear(4, 9))
    config = peft.LoraConfig(target_modules="all-linear")
    model = quiet(peft.get_peft_model, module, config)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2
    params = {"up": jnp.ones((4, 4)), "lm_head": jnp.ones((4, 9))}
    entries = {"peft_type": "LORA", "target_modules": "all-linear"}
    found = jlora.peft.rules(entries, params, names=lambda path: f"{path}.weight")
    assert list(found) == ["up"]


def wide() -> Twin:
    """A linear layer large enough for its rounding to show."""
    return dataclasses.replace(linear, make=lambda: Holder(torch.nn.Linear(256, 256)))


def test_safe_merge_rounds_twice(tmp_path):
    twin = wide()
    model = adapt(twin)
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(plain(twin).to(torch.bfloat16))
    params = jlora.peft.load(tmp_path, base, names=twin.names)
    node = params["layer"]["kernel"]
    a, b = np.float64(node.lora_a), np.float64(node.lora_b)
    exact = np.float64(node.base.astype(jnp.float32)) + float(node.scaling) * a @ b
    rounded = np.float64(jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32))
    module = plain(twin).to(torch.bfloat16)
    theirs = quiet(peft.PeftModel.from_pretrained, module, str(tmp_path))
    theirs = twin.params(quiet(theirs.merge_and_unload, safe_merge=True))["layer"]["kernel"]
    ours = jlora.merge(params)["layer"]["kernel"]
    wrong = [(np.float64(w.astype(jnp.float32)) != rounded).mean() for w in (theirs, ours)]
    assert wrong[0] > 0.02 and wrong[1] < 0.001, wrong


def test_unmerge_changes_the_weights(tmp_path):
    twin = wide()
    model = adapt(twin)
    params = load(twin, model, tmp_path)
    before = model.base_model.model.layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.base_model.model.layer.base_layer.weight
    ours = jlora.detach(params)[0]["layer"]["kernel"]
    changed = [(after != before).float().mean().item(), (ours.T != before.numpy()).mean()]
    assert changed[0] > 0.1 and changed[1] == 0, changed


def test_attention_adds_its_output_update_twice(tmp_path):
    model = adapt(attention)
    params = load(attention, model, tmp_path)
    x = attention.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    meant = attention.fn(jlora.merge(params), x)
    ours = jlora.lora(attention.fn)(params, x)
    twice = jlora.lora(attention.fn)(attention.as_peft(params), x)
    errors = [distance(theirs, meant), distance(ours, meant), distance(twice, theirs)]
    assert errors[0] > 0.1 and errors[1] < 1e-5 and errors[2] < 1e-5, errors


def test_attention_trains_its_last_adapter_alone(tmp_path):
    """PEFT registers the merged weight anew for each adapter, which cuts the ones before it off."""
    model = adapt(attention)
    quiet(model.add_adapter, "other", model.peft_config["default"])
    for order in (["default", "other"], ["other", "default"]):
        quiet(model.base_model.set_adapter, order)
        randomize(model)
        model.zero_grad()
        x = attention.x(np.random.default_rng(0))
        quiet(model, torch.tensor(x)).sum().backward()
        found = {n: p.grad is not None for n, p in model.named_parameters() if "lora_" in n}
        assert found == {name: f".{order[-1]}." in name for name in found} and len(found) == 8
    adapters = [load(attention, model, tmp_path, adapter=name) for name in ("default", "other")]
    trainable, frozen = jlora.partition(adapters)

    def loss(trainable: Any) -> Any:
        return jlora.lora(attention.fn)(together(jlora.combine(trainable, frozen)), x).sum()

    slopes = jax.tree.leaves(jax.grad(loss)(trainable))
    assert len(slopes) == 8 and all(float(jnp.abs(slope).max()) > 1e-3 for slope in slopes)


def test_several_active_dora_adapters(tmp_path, compare):
    """Which model is meant PEFT says by order, and by whether there is dropout; here the user."""
    model, adapters = two(linear, tmp_path, lora_dropout=0.5)
    x = linear.x(np.random.default_rng(0))

    def run(order: list[str]) -> np.ndarray:
        quiet(model.base_model.set_adapter, order)
        return model(torch.tensor(x)).detach().numpy()

    names = ["default", "other"]
    one, other = run(names), run(names[::-1])
    for name in names:
        model.base_model.model.layer.lora_dropout[name] = Kept()
    model.train()
    summed = [run(names), run(names[::-1])]
    errors = [distance(a, one) for a in (other, *summed)]
    assert min(errors) > 0.05 and distance(*summed) < 1e-6, errors
    apply = jlora.lora(linear.fn, fallback="error")
    compare(apply(in_turn(adapters)(adapters), x), one, "the first before the second")
    turned = adapters[::-1]
    compare(apply(in_turn(turned)(turned), x), other, "the second before the first")
    compare(at_once(linear, adapters, x), summed[0], "the sum of what they add")


@pytest.mark.parametrize("twin", [attention, experts(True)], ids=repr)
def test_dropout_where_peft_has_none(twin, tmp_path):
    if twin is attention:
        model = adapt(twin, lora_dropout=0.5).train()
        x = torch.tensor(twin.x(np.random.default_rng(0)))
        assert torch.equal(model(x), model(x))
    else:
        with pytest.raises(ValueError, match="does not work with lora_dropout"):
            adapt(twin, lora_dropout=0.5)
    params = load(twin, adapt(twin), tmp_path)
    x = twin.x(np.random.default_rng(0))
    whole, some = (
        jlora.lora(twin.fn, dropout=rate, key=jax.random.key(0))(params, x) for rate in (0.0, 0.5)
    )
    assert distance(some, whole) > 0.01


def test_the_random_b_of_experts():
    """PEFT packs the experts beside the rank, and takes them for a fan-in of r·E."""
    twin, n_experts, rank = experts(True), 4, 3
    options = dict(r=rank, target_parameters=list(twin.parameters), init_lora_weights=False)
    config = peft.LoraConfig(target_modules=None, **options)
    model = quiet(peft.get_peft_model, plain(twin), config)
    theirs = [x.detach().abs().max() for name, x in model.named_parameters() if "lora_B" in name]
    base = twin.params(plain(twin))
    rules = jlora.peft.rules(config.to_dict(), base, names=twin.names)
    params = jlora.attach(base, rules, key=jax.random.key(0), layouts=twin.layouts)
    ours = [jnp.abs(x.lora_b).max() for x in params["layer"].values()]
    assert len(theirs) == len(ours) == 2
    for bound, found in (((rank * n_experts) ** -0.5, theirs), (rank**-0.5, ours)):
        for x in found:
            assert 0.9 * bound < float(x) <= bound


def test_olora_on_conv1d_of_transformers(compare):
    """PEFT takes the weight for (out, in), so A and B have each other's widths."""
    options = dict(r=4, target_modules=["layer"], init_lora_weights="olora", **conv1d_hf.config)
    config, x = peft.LoraConfig(**options), conv1d_hf.x(np.random.default_rng(0))
    with pytest.raises(RuntimeError):
        quiet(peft.get_peft_model, plain(conv1d_hf), config)(torch.tensor(x))
    base = conv1d_hf.params(plain(conv1d_hf))
    rules = jlora.peft.rules(config.to_dict(), base, names=conv1d_hf.names)
    params = jlora.attach(base, rules, key=jax.random.key(0))
    compare(jlora.lora(conv1d_hf.fn)(params, x), conv1d_hf.fn(base, x), "as it was", 1e-6)


def test_a_randomized_decomposition_is_not_in_its_file(tmp_path):
    options = dict(r=4, target_modules=["layer"], init_lora_weights="pissa_niter_4")
    model = quiet(peft.get_peft_model, wide().make(), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1)
    x = torch.randn(3, 256)
    quiet(model.save_pretrained, tmp_path)
    with torch.no_grad():
        module = wide().make()
        layer = model.base_model.model.layer
        module.layer.weight.copy_(layer.base_layer.weight + layer.get_delta_weight("default"))
        module.layer.bias.copy_(layer.base_layer.bias)
        again = quiet(peft.PeftModel.from_pretrained, module, str(tmp_path)).eval()
        assert distance(again(x), model(x)) > 0.01
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4', which moves the base"):
        load(wide(), model, tmp_path)


def grouped(groups: int) -> Twin:
    """A grouped convolution as it is, HWIO with in/groups input channels."""

    def fn(p: Any, x: Any) -> Any:
        y = lax.conv_general_dilated(
            jnp.moveaxis(x, 1, -1),
            p["layer"]["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.moveaxis(y, -1, 1)

    twin = conv(2, 1, 0)
    return dataclasses.replace(
        twin,
        name="grouped",
        make=lambda: Holder(torch.nn.Conv2d(4, 6, 3, groups=groups, bias=False)),
        fn=fn,
        x=lambda rng: rng.normal(size=(2, 4, 8, 7)).astype(np.float32),
        moves={"layer/kernel": ("layer.weight", hwio)},
    )


def test_a_convolution_with_groups(tmp_path, compare):
    """PEFT's update is none of the grouped kernel; test_peft_groups has it on the whole one."""
    twin = grouped(2)
    model = adapt(twin)
    with pytest.raises(ValueError, match=r"has 2 groups.*sees the 4 channels.*has 2\. Write the"):
        load(twin, model, tmp_path)
    with pytest.raises(NotImplementedError):
        quiet(model.merge_and_unload)
    x = twin.x(np.random.default_rng(0))
    one = x.copy()
    one[:, 2:] = 0  # what the second group sees
    whole, half = (model(torch.tensor(v)).detach().numpy()[:, :3] for v in (x, one))
    assert distance(half, whole) > 0.1, "the first group's outputs hang on the second's inputs"
    # jlora's own grouped form: each group's A sees its own channels, and it merges.
    base = twin.params(plain(twin))
    rules = {".*": jlora.LoraSpec(2, init=lambda k, w, rank, **_: (w[:, :rank], w[:rank]))}
    own = jlora.attach(base, rules, key=jax.random.key(0))
    apply = jlora.lora(twin.fn, fallback="error")
    compare(apply(own, x), twin.fn(jlora.merge(own), x), "merged")
    compare(apply(own, one)[:, :3], apply(own, x)[:, :3], "the first group's outputs")


def test_dora_of_a_convolution_with_groups(tmp_path, compare):
    """PEFT reads B (out, r/g) as (out/g, r), of which B A has as many numbers as the kernel."""
    twin = whole_of_groups(2, 2)
    model = adapt(twin, use_dora=True)
    params = load(twin, model, tmp_path)
    x = twin.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    ours = jlora.lora(twin.fn, fallback="error")(params, x)
    node = params["layer"]["kernel"]
    w = np.float64(jlora.merge(dataclasses.replace(node, magnitude=None)))
    w *= np.float64(node.magnitude) / np.linalg.norm(w.reshape(-1, w.shape[-1]), axis=0)
    meant = twin.fn({"layer": {**params["layer"], "kernel": jnp.asarray(w, jnp.float32)}}, x)
    assert distance(theirs, meant) > 0.05
    compare(ours, meant, "DoRA of the kernel without groups")


def spatial(**options: Any) -> Twin:
    """A convolution with options that PEFT does not hand on to A."""

    def fn(p: Any, x: Any) -> Any:
        if options.get("padding_mode") == "circular":
            x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
        dilation = options.get("dilation", 1)
        y = lax.conv_general_dilated(
            jnp.moveaxis(x, 1, -1),
            p["layer"]["kernel"],
            (1, 1),
            "VALID",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.moveaxis(y, -1, 1)

    make = lambda: Holder(torch.nn.Conv2d(5, 7, 3, bias=False, **options))  # noqa: E731
    moves = {"layer/kernel": ("layer.weight", hwio)}
    return dataclasses.replace(conv(2, 1, 0), make=make, fn=fn, moves=moves)


def test_a_dilated_convolution(tmp_path, compare):
    twin = spatial(dilation=2)
    model = adapt(twin)
    params = load(twin, model, tmp_path)
    x = twin.x(np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="must match"):
        model(torch.tensor(x))
    meant = quiet(model.merge_and_unload)(torch.tensor(x)).detach().numpy()
    compare(jlora.lora(twin.fn, fallback="error")(params, x), meant, "dilated")


def test_a_padding_mode(tmp_path, compare):
    twin = spatial(padding=1, padding_mode="circular")
    model = adapt(twin)
    params = load(twin, model, tmp_path)
    x = twin.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    meant = quiet(model.merge_and_unload)(torch.tensor(x)).detach().numpy()
    assert distance(theirs, meant) > 0.05
    compare(jlora.lora(twin.fn, fallback="error")(params, x), meant, "circular padding")


@pytest.mark.parametrize(("kind", "rslora"), [("linear", False), ("cat", True)])
def test_the_sum_of_two_adapters(tmp_path, compare, kind, rslora):
    model = adapt(linear, use_rslora=rslora)
    config = model.peft_config["default"]
    quiet(model.add_adapter, "other", config)
    quiet(model.base_model.set_adapter, ["default", "other"])
    randomize(model)
    x = linear.x(np.random.default_rng(0))
    meant = model(torch.tensor(x)).detach().numpy()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=kind)
    params = together(
        [load(linear, model, tmp_path, adapter=name) for name in ("default", "other")]
    )
    model.base_model.set_adapter("sum")
    theirs = model(torch.tensor(x)).detach().numpy()
    assert distance(theirs, meant) > 0.1
    compare(jlora.lora(linear.fn)(params, x), meant, "the exact sum")


def test_bfloat16_activations(tmp_path):
    """Both are a rounding away from the exact result; PEFT's narrow products are in float32."""
    twin = dataclasses.replace(
        linear,
        make=lambda: Holder(torch.nn.Linear(13, 7, bias=False)),
        fn=lambda p, x: x @ p["layer"]["kernel"],
        moves={"layer/kernel": ("layer.weight", lambda w: w.T)},
    )
    quiet(adapt(twin).save_pretrained, tmp_path)
    base = twin.params(plain(twin).to(torch.bfloat16))
    params = jlora.peft.load(tmp_path, base, names=twin.names)
    x = jnp.asarray(twin.x(np.random.default_rng(0)), jnp.bfloat16)
    node = params["layer"]["kernel"]
    w, a, b = (np.float64(t.astype(jnp.float32)) for t in (node.base, node.lora_a, node.lora_b))
    exact = np.float64(x.astype(jnp.float32)) @ (w + float(node.scaling) * a @ b)
    module = plain(twin).to(torch.bfloat16)
    model = quiet(peft.PeftModel.from_pretrained, module, str(tmp_path))
    theirs = model(torch.tensor(np.float32(x)).bfloat16()).detach().float().numpy()
    ours = [jlora.lora(twin.fn, dtype=dtype)(params, x) for dtype in (None, jnp.float32)]
    errors = [distance(theirs, exact), *(distance(np.float32(y), exact) for y in ours)]
    assert errors[0] < 2**-8 and errors[1] < 2**-7 and errors[2] < 2**-8, errors
