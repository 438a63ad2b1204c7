"""AdaLoRA live against PEFT: the same choice at every step, and the same numbers after it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import jlora
from jlora import LoraSpec, optim
from jlora.forms.adalora import VALUES

RANK, TARGET, STEPS, WARMUP, FINAL, EVERY, ALPHA = 6, 2, 20, 3, 5, 2, 6.0


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 12), torch.nn.Linear(12, 9)

    def forward(self, x):
        y = self.down(torch.tanh(self.up(x)))
        return types.SimpleNamespace(y=y, loss=(torch.sin(y) ** 2).sum())


def loss_of(p, x):
    h = jnp.tanh(x @ p["up"] + p["up_bias"][None])
    return (jnp.sin(h @ p["down"] + p["down_bias"][None]) ** 2).sum()


def twins(orthogonal):
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=WARMUP,
        tfinal=FINAL,
        deltaT=EVERY,
        total_step=STEPS,
        lora_alpha=ALPHA,
        orth_reg_weight=orthogonal,
        target_modules=["up", "down"],
    )
    model = peft.get_peft_model(Two(), config)
    layers = {name: getattr(model.base_model.model, name) for name in ("up", "down")}
    params = {}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        params[name] = jnp.asarray(base.weight.detach().numpy().T)
        params[f"{name}_bias"] = jnp.asarray(base.bias.detach().numpy())
    spec = LoraSpec(RANK, alpha=ALPHA, form="adalora")
    params = jlora.attach(params, {"up|down": spec}, key=jax.random.key(0))
    for name, layer in layers.items():
        a, e, b = (
            x["default"].detach().numpy() for x in (layer.lora_A, layer.lora_E, layer.lora_B)
        )
        parts = {"lora_a": a.T, VALUES: e[:, 0], "lora_b": b.T}
        params[name] = params[name].with_parts({k: jnp.asarray(x) for k, x in parts.items()})
    return model, layers, params


@pytest.mark.nightly
@pytest.mark.parametrize("orthogonal", [0.0, 0.5], ids=["plain", "penalty"])
@pytest.mark.parametrize("whole", [False, True], ids=["partition", "freeze"])
def test_the_same_choices(orthogonal, whole, compare):
    model, layers, params = twins(orthogonal)
    by = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tx = optim.adalora(
        optax.sgd(0.05),
        target_rank=TARGET,
        total_steps=STEPS,
        warmup_steps=WARMUP,
        final_steps=FINAL,
        every=EVERY,
    )
    tx = jlora.freeze(tx) if whole else tx
    own, frozen = (params, None) if whole else jlora.partition(params)
    state = tx.init(own)
    run, traces = jlora.lora(loss_of, fallback="error"), []

    @jax.jit
    def step(own, state, x):
        traces.append(1)

        def loss(t):
            p = t if whole else jlora.combine(t, frozen)
            return run(p, x) + orthogonal * optim.orthogonality(t)

        updates, state = tx.update(jax.grad(loss)(own), state, own)
        return optax.apply_updates(own, updates), state

    random, counts = np.random.default_rng(0), []
    with jax.numpy_dtype_promotion("standard"):
        for k in range(1, STEPS + 1):
            x = random.normal(size=(16, 7)).astype(np.float32)
            by.zero_grad()
            model.base_model(torch.tensor(x)).loss.backward()
            by.step()
            model.base_model.update_and_allocate(k)
            own, state = step(own, state, jnp.asarray(x))
            for name, layer in layers.items():
                theirs = layer.lora_E["default"].detach().numpy()[:, 0]
                np.testing.assert_array_equal(
                    own[name].extra[VALUES] == 0, theirs == 0, err_msg=f"{k} {name}"
                )
            counts.append(sum(int((own[name].extra[VALUES] != 0).sum()) for name in layers))
    assert counts[WARMUP - 1] == 2 * RANK and counts[-FINAL - 1 :] == [2 * TARGET] * (FINAL + 1)
    assert len(set(counts)) > 3, "the budget falls in steps"
    assert len(traces) == 1
    for name, layer in layers.items():
        a, e, b = (
            x["default"].detach().numpy() for x in (layer.lora_A, layer.lora_E, layer.lora_B)
        )
        compare(own[name].lora_a.T, a, f"{name} A")
        compare(own[name].extra[VALUES], e[:, 0], f"{name} Λ")
        compare(own[name].lora_b.T, b, f"{name} B")
