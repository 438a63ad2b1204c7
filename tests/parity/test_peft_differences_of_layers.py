"""Where a layer is meant to compute another thing than PEFT's: of test_peft_differences's table."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from jax import lax
from live import adapt, distance, plain, quiet, randomize, save, through_files
from several import Kept, at_once, in_turn, together, two
from twins import Holder, Twin, attention, conv, experts, hwio, linear
from twins import grouped as in_groups

import jlora


@pytest.mark.nightly
def test_attention_adds_its_output_update_twice(tmp_path):
    model = adapt(attention)
    params = through_files(attention, model, tmp_path)
    x = attention.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    meant = attention.fn(jlora.merge(params), x)
    ours = jlora.lora(attention.fn)(params, x)
    twice = jlora.lora(attention.fn)(attention.as_peft(params), x)
    errors = [distance(theirs, meant), distance(ours, meant), distance(twice, theirs)]
    assert errors[0] > 0.1 and errors[1] < 1e-5 and errors[2] < 1e-5, errors


@pytest.mark.nightly
def test_attention_trains_its_last_adapter_alone(tmp_path, compare):
    """PEFT registers the merged weight anew for each adapter, which cuts the ones before it off.

    So each adapter's gradients are PEFT's where it is the last.
    """
    model = adapt(attention)
    quiet(model.add_adapter, "other", model.peft_config["default"])
    names = ["default", "other"]
    quiet(model.base_model.set_adapter, names)
    randomize(model)
    x = attention.x(np.random.default_rng(0))
    adapters = [through_files(attention, model, tmp_path, adapter=name) for name in names]
    trainable, frozen = jlora.partition(adapters)

    def loss(trainable: Any) -> Any:
        trees = [attention.as_peft(tree) for tree in jlora.combine(trainable, frozen)]
        return jlora.lora(attention.fn)(together(trees), x).sum()

    slopes = jlora.combine(jax.grad(loss)(trainable), frozen)
    for order in (names, names[::-1]):
        quiet(model.base_model.set_adapter, order)
        model.zero_grad()
        quiet(model, torch.tensor(x)).sum().backward()
        theirs = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        found = {name: grad is not None for name, grad in theirs.items()}
        assert found == {name: f".{order[-1]}." in name for name in found} and len(found) == 8
        ours = save(tmp_path / order[-1], slopes[names.index(order[-1])], attention)
        want = peft.get_peft_model_state_dict(model, state_dict=theirs, adapter_name=order[-1])
        assert set(ours) == set(want) and len(want) == 4
        for key, grad in want.items():
            slope = next((s for part, s in attention.slopes.items() if part in key), 1.0)
            compare(slope * ours[key].numpy(), grad.numpy(), f"{order[-1]}: gradient of {key}")


def test_attention_does_not_train_a_bias_of_lora_b(tmp_path):
    """PEFT makes, adds and saves two, which no gradient reaches."""
    model, x = adapt(attention, lora_bias=True), attention.x(np.random.default_rng(0))
    before = model(torch.tensor(x))
    before.sum().backward()
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    biases = [p for name, p in found.items() if name.endswith("lora_B.default.bias")]
    assert len(found) == 6 and len(biases) == 2
    assert all((p.grad is None) == (p in set(biases)) for p in found.values())
    for p in biases:
        torch.nn.init.zeros_(p.data)
    assert distance(model(torch.tensor(x)).detach(), before.detach()) > 0.1
    config = model.peft_config["default"].to_dict()
    refuses = r"PEFT trains no bias of lora_B .* for MultiheadA"
    with pytest.raises(ValueError, match=refuses):
        through_files(attention, model, tmp_path)
    names = {**attention.names, "mha/in_proj/bias": "mha.bias"}
    with pytest.raises(ValueError, match=refuses):
        jlora.peft.rules(config, attention.params(plain(attention)), names=names)


@pytest.mark.nightly
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
    params = through_files(twin, adapt(twin), tmp_path)
    x = twin.x(np.random.default_rng(0))
    whole, some = (
        jlora.lora(twin.fn, dropout=rate, key=jax.random.key(0))(params, x) for rate in (0.0, 0.5)
    )
    assert distance(some, whole) > 0.01


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
    with pytest.raises(ValueError, match=r"has 2 groups.*reads the 4 channels.*has 2\. Write the"):
        through_files(twin, model, tmp_path)
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


@pytest.mark.nightly
def test_dora_of_a_convolution_with_groups(tmp_path, compare):
    """PEFT reads B (out, r/g) as (out/g, r), of which B A has as many numbers as the kernel."""
    twin = in_groups(2, 2)
    model = adapt(twin, use_dora=True)
    params = through_files(twin, model, tmp_path)
    x = twin.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    ours = jlora.lora(twin.fn, fallback="error")(params, x)
    node = params["layer"]["kernel"]
    w = np.float64(jlora.merge(dataclasses.replace(node, extra={})))
    w *= np.float64(node.extra["magnitude"]) / np.linalg.norm(w.reshape(-1, w.shape[-1]), axis=0)
    meant = twin.fn({"layer": {**params["layer"], "kernel": jnp.asarray(w, jnp.float32)}}, x)
    assert distance(theirs, meant) > 0.05
    compare(ours, meant, "DoRA of the kernel without groups")


def test_dora_of_an_output_of_zeros(tmp_path, compare):
    def make() -> torch.nn.Module:
        module = linear.make()
        torch.nn.init.zeros_(module.layer.weight[2].data)
        return module

    twin = dataclasses.replace(linear, make=make)
    model = adapt(twin, use_dora=True)
    for p in (model.base_model.model.layer.lora_B["default"].weight,):
        torch.nn.init.zeros_(p.data)
    params, x = through_files(twin, model, tmp_path), twin.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    ours = np.asarray(jlora.lora(twin.fn, fallback="error")(params, x))
    assert not np.isfinite(theirs[..., 2]).any() and np.isfinite(ours).all()
    others = [k for k in range(7) if k != 2]
    compare(ours[..., others], theirs[..., others], "the other outputs")
    compare(ours[..., 2], np.full((2, 5), params["layer"]["bias"][2]), "its bias alone", 0)


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

    make = lambda: Holder(torch.nn.Conv2d(5, 7, 3, bias=False, **options))
    moves = {"layer/kernel": ("layer.weight", hwio)}
    return dataclasses.replace(conv(2, 1, 0), make=make, fn=fn, moves=moves)


def test_a_dilated_convolution(tmp_path, compare):
    twin = spatial(dilation=2)
    model = adapt(twin)
    params = through_files(twin, model, tmp_path)
    x = twin.x(np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="must match"):
        model(torch.tensor(x))
    meant = quiet(model.merge_and_unload)(torch.tensor(x)).detach().numpy()
    compare(jlora.lora(twin.fn, fallback="error")(params, x), meant, "dilated")


def test_a_padding_mode(tmp_path, compare):
    twin = spatial(padding=1, padding_mode="circular")
    model = adapt(twin)
    params = through_files(twin, model, tmp_path)
    x = twin.x(np.random.default_rng(0))
    theirs = model(torch.tensor(x)).detach().numpy()
    meant = quiet(model.merge_and_unload)(torch.tensor(x)).detach().numpy()
    assert distance(theirs, meant) > 0.05
    compare(jlora.lora(twin.fn, fallback="error")(params, x), meant, "circular padding")
