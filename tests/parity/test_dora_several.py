"""PEFT live: several DoRA adapters at once, each of them a node of jlora's on the same base.

In turn, as PEFT evaluates and merges     y = g₂ (g₁ (x W + x Δ₁) + x Δ₂) + b
At once, as PEFT trains under dropout     y = x W + b + Σ [(gₖ - 1) x̃ₖ W + gₖ x̃ₖ Δₖ]

where Δₖ = sₖ Aₖ Bₖ and gₖ = mₖ / ‖W + Δₖ‖. The first is one node, g₁ g₂ ∘ (W + Δ₁ + Δ₂ / g₁); the
second is the sum of what each adapter adds to the base's output.
"""

import jax
import pytest
from live import quiet
from several import NAMES, Kept, at_once, in_turn, slopes_of_several, two
from twins import conv, conv1d_hf, embedding, linear

import jlora

LAYERS = [linear, conv1d_hf, embedding, conv(1, 2, 1), conv(2, 2, 1), conv(3, 1, 0)]
SUMMED = [linear, conv1d_hf, conv(2, 2, 1)]


@pytest.mark.sample(8)
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


@pytest.mark.nightly
@pytest.mark.parametrize("twin", SUMMED, ids=repr)
def test_at_once(twin, tmp_path, compare):
    model, adapters = two(twin, tmp_path, lora_dropout=0.5)
    for name in NAMES:
        model.base_model.model.layer.lora_dropout[name] = Kept()
    fn = lambda trees, x: at_once(twin, trees, x)
    slopes_of_several(twin, model.train(), adapters, fn, tmp_path, compare)
