"""PEFT live: several DoRA adapters at once, each of them a node of jlora's on the same base.

In turn, as PEFT evaluates and merges     y = g₂ (g₁ (x W + x Δ₁) + x Δ₂) + b
At once, as PEFT trains under dropout     y = x W + b + Σ [(gₖ - 1) x̃ₖ W + gₖ x̃ₖ Δₖ]

where Δₖ = sₖ Aₖ Bₖ and gₖ = mₖ / ‖W + Δₖ‖. The first is one node, g₁ g₂ ∘ (W + Δ₁ + Δ₂ / g₁); the
second is the sum of what each adapter adds to the base's output.
"""

import dataclasses
from typing import Any

import jax
import peft
import pytest
import torch
from test_peft_layers import adapt, load, plain, quiet, randomize
from test_peft_several import slopes_of_several, together
from twins import Params, Twin, conv, conv1d_hf, embedding, linear

import jlora

NAMES = ("default", "other")
LAYERS = [linear, conv1d_hf, embedding, conv(1, 2, 1), conv(2, 2, 1), conv(3, 1, 0)]
SUMMED = [linear, conv1d_hf, conv(2, 2, 1)]


class Kept(torch.nn.Module):
    """A dropout that drops nothing, which PEFT does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def two(twin: Twin, folder: Any, **more: Any) -> tuple[Any, list[Any]]:
    """PEFT's model with two active DoRA adapters of other ranks and scalings, and both here."""
    model = adapt(twin, use_dora=True, **more)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=True,
        use_dora=True,
        target_modules=list(twin.targets),
        init_lora_weights=False,
        **twin.config,
        **more,
    )
    quiet(model.add_adapter, "other", config)
    quiet(model.base_model.set_adapter, list(NAMES))
    randomize(model)
    with torch.no_grad():  # a division by a gain near 0 would be all that is measured
        for key, p in model.named_parameters():
            if "magnitude" in key:
                p.add_(p.sign() / 2)
    quiet(model.save_pretrained, folder)
    base = twin.params(plain(twin))
    return model.eval(), [load(folder / ("" if n == "default" else n), base, twin) for n in NAMES]


def norm(node: Any) -> Any:
    """‖W + s · A B‖, as a magnitude begins."""

    def init(key: Any, weight: Any, rank: int, scaling: Any = 1.0, dtype: Any = None) -> Any:
        return node.lora_a.reshape(-1, rank), node.lora_b.reshape(rank, -1)

    rank = node.rank
    spec = jlora.LoraSpec(
        rank, float(node.scaling) * rank, init=init, layout=node.layout, dora=True
    )
    return jlora.attach(node.base, {"": spec}, key=jax.random.key(0)).magnitude


def in_turn(adapters: list[Params]) -> Any:
    """Return a function that makes one adapter of two; its norms are constants, as DoRA's are."""
    (key,) = (k for k, x in adapters[0]["layer"].items() if isinstance(x, jlora.LoraArray))
    nodes = [tree["layer"][key] for tree in adapters]
    norms = [norm(node) for node in nodes]

    def factors(one: Any, other: Any) -> Any:
        narrower = other.lora_b * (norms[0] / one.magnitude)[None]
        return together([one, dataclasses.replace(other, lora_b=narrower)])

    whole = norm(factors(*nodes))

    def joined(trees: list[Params]) -> Params:
        one, other = (tree["layer"][key] for tree in trees)
        m = one.magnitude / norms[0] * (other.magnitude / norms[1]) * whole
        node = dataclasses.replace(factors(one, other), magnitude=m)
        return {"layer": {**trees[0]["layer"], key: node}}

    return joined


def at_once(twin: Twin, adapters: list[Any], x: Any) -> Any:
    """The base's output and what each adapter adds to it."""
    base = jlora.detach(adapters[0])[0]
    y = twin.fn(base, x)
    apply = jlora.lora(twin.fn, fallback="error")
    return y + sum(apply(tree, x) - y for tree in adapters)


@pytest.mark.parametrize("twin", LAYERS, ids=repr)
def test_in_turn(twin, tmp_path, compare):
    """Forward, the gradients of x and of both adapters' A, B and m, and the merged weight."""
    model, adapters = two(twin, tmp_path)
    join = in_turn(adapters)
    apply = jlora.lora(twin.fn, fallback="error")
    fn = lambda trees, x: apply(join(trees), x)
    slopes_of_several(twin, model, adapters, fn, tmp_path, compare)
    merged = dict(jax.tree.leaves_with_path(jlora.merge(join(adapters))))
    theirs = twin.params(quiet(model.merge_and_unload))
    for path, want in jax.tree.leaves_with_path(theirs):
        compare(merged[path], want, f"merged {path}")


@pytest.mark.parametrize("twin", SUMMED, ids=repr)
def test_at_once(twin, tmp_path, compare):
    model, adapters = two(twin, tmp_path, lora_dropout=0.5)
    for name in NAMES:
        model.base_model.model.layer.lora_dropout[name] = Kept()
    fn = lambda trees, x: at_once(twin, trees, x)
    slopes_of_several(twin, model.train(), adapters, fn, tmp_path, compare)
