"""VeRA live against PEFT: layers of other widths that share A and B, and what trains in each.

| what | PEFT 0.21.2 | jlora |
|---|---|---|
| s | none | `alpha=rank` says the same |
| A and B of layers of one width | the largest's leading part | the same, by `jlora.tie` |
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import into_peft, plain, save
from twins import linear

import jlora
from jlora import LoraSpec

RANK = 5


class Two(torch.nn.Module):
    """Two layers, neither of which is the wider one on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 12), torch.nn.Linear(12, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def apply(p, x):
    h = jnp.tanh(x @ p["up"] + p["up_bias"][None])
    return h @ p["down"] + p["down_bias"][None]


def twins():
    """PEFT's model and the tied tree of the same numbers."""
    torch.manual_seed(0)
    config = peft.VeraConfig(r=RANK, target_modules=["up", "down"], projection_prng_key=3)
    model = peft.get_peft_model(Two(), config)
    layers = {name: getattr(model.base_model.model, name) for name in ("up", "down")}
    a, b = (next(iter(x.values())) for x in (layers["up"].vera_A, layers["up"].vera_B))
    assert a.shape == (RANK, 12) and b.shape == (12, RANK)
    params = {}
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.vera_lambda_b["default"])
        torch.nn.init.normal_(layer.vera_lambda_d["default"])
        params[name] = jnp.asarray(layer.get_base_layer().weight.detach().numpy().T)
        params[f"{name}_bias"] = jnp.asarray(layer.get_base_layer().bias.detach().numpy())
    spec = LoraSpec(RANK, alpha=RANK, form="vera")
    params = jlora.attach(params, {"up|down": spec}, key=jax.random.key(0))
    tied = jlora.tie(params, {"up|down": ("lora_a", "lora_b")})

    def numbers(node, name, **shared):
        layer = layers[name]
        parts = {
            "lambda_d": layer.vera_lambda_d["default"],
            "lambda_b": layer.vera_lambda_b["default"],
            **shared,
        }
        parts = {k: jnp.asarray(x.detach().numpy()) for k, x in parts.items()}
        return node.with_parts(parts)

    tied["down"] = numbers(tied["down"], "down", lora_a=a.T)
    tied["up"] = numbers(tied["up"], "up", lora_b=b.T)
    return model, layers, tied


def test_vera(compare):
    model, layers, tied = twins()
    x = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32).reshape(12, 7)
    tx = torch.tensor(x, requires_grad=True)
    out = model(tx)
    (out**2).sum().backward()
    trainable, frozen = jlora.partition(tied)
    run = jlora.lora(apply, fallback="error")

    def loss(t, x):
        y = run(jlora.untie(jlora.combine(t, frozen)), x)
        return (y**2).sum(), y

    (own, of_x), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(trainable, x)
    compare(y, out.detach().numpy(), "forward")
    compare(of_x, tx.grad.numpy(), "gradient of the input")
    for name, layer in layers.items():
        compare(
            own[name].extra["lambda_d"], layer.vera_lambda_d["default"].grad.numpy(), f"{name} λ_d"
        )
        compare(
            own[name].extra["lambda_b"], layer.vera_lambda_b["default"].grad.numpy(), f"{name} λ_b"
        )
    merged = jlora.merge(jlora.untie(tied))
    whole = model.merge_and_unload()
    for name in layers:
        compare(merged[name].T, getattr(whole, name).weight.detach().numpy(), f"{name} merged")


def test_vera_begins_as_peft_begins(compare):
    """The same bounds of A and B, the same λ."""
    wide, ranks = 512, 64
    module = torch.nn.Sequential(torch.nn.Linear(wide, wide))
    layer = peft.get_peft_model(module, peft.VeraConfig(r=ranks, target_modules=["0"]))
    layer = layer.base_model.model[0]
    node = jlora.attach(
        {"w": jnp.ones((wide, wide))},
        {"w": LoraSpec(ranks, alpha=ranks, form="vera")},
        key=jax.random.key(0),
    )["w"]
    for ours, theirs in ((node.lora_a, layer.vera_A), (node.lora_b, layer.vera_B)):
        theirs = theirs["default"].numpy()
        compare(jnp.abs(ours).max(), np.abs(theirs).max(), "bound", most=1e-3)
        compare(ours.std(), theirs.std(), "spread", most=0.02)
    compare(node.extra["lambda_d"], layer.vera_lambda_d["default"].detach().numpy(), "λ_d")
    compare(node.extra["lambda_b"], layer.vera_lambda_b["default"].detach().numpy(), "λ_b")


@pytest.mark.sample(3)
@pytest.mark.parametrize("form", ["lora_fa", "lora_xs", "vera", "adalora"])
def test_what_is_saved_is_plain_lora_to_peft(form, tmp_path, compare):
    base = linear.params(plain(linear))
    rules = {".*kernel": LoraSpec(RANK, form=form)}
    trainable, frozen = jlora.partition(jlora.attach(base, rules, key=jax.random.key(0)))
    rng = np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype)
    params = jlora.combine(jax.tree.map(move, trainable), frozen)
    x = linear.x(rng)
    y = jlora.lora(linear.fn, fallback="error")(params, x)
    assert np.abs(y - linear.fn(base, x)).max() > 0.1
    save(tmp_path, jlora.detach(params)[1], linear)
    model, result = into_peft(linear, tmp_path)
    assert not result.missing_keys and not result.unexpected_keys
    compare(model(torch.tensor(x)).detach().numpy(), y, "PEFT")
