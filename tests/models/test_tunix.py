"""Tunix's Llama 3, Qwen 2, Qwen 3 and Gemma 3, as published, on every weight matrix."""

from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx
from holds import holds
from tunix_small import BATCH, FAMILIES, HEAD, KV_HEADS, MARKS, SIZES, TIME, forward, model, prompt

pytestmark = MARKS
every = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.sample(4)
@every
def test_model(family: str) -> None:
    graph, state = model(family)
    holds(forward(graph), state, *prompt(), eager=family == "llama3")


@pytest.mark.nightly
@every
def test_cache(family: str) -> None:
    """A prompt into an empty cache, and one step from it."""
    graph, state = model(family, num_layers=1)
    tokens, positions, _, mask = prompt()
    kv = jnp.zeros((BATCH, TIME, KV_HEADS, HEAD))
    cache = {"layer_0": {"k": kv, "v": kv, "end_index": jnp.zeros(BATCH, jnp.int32)}}

    def decode(state: Any, tokens: Any, positions: Any, cache: Any, mask: Any) -> Any:
        net = nnx.merge(graph, state)
        first, cache = net(tokens[:, :-1], positions[:, :-1], cache, mask[:, :-1])
        return first, *net(tokens[:, -1:], positions[:, -1:], cache, mask[:, -1:])

    holds(decode, state, tokens, positions, cache, mask)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("family", "remat"),
    [("llama3", "BLOCK"), ("qwen2", "DECODER"), ("qwen3", "BLOCK"), ("gemma3", "DECODER")],
)
def test_remat(family: str, remat: str) -> None:
    graph, state = model(family, remat=remat, num_layers=1)
    holds(forward(graph), state, *prompt())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("family", "option"), [("llama3", "weight_tying"), ("qwen3", "use_tied_embedding")]
)
def test_tied_head(family: str, option: str) -> None:
    graph, state = model(family, num_layers=1, **{option: True})
    assert "lm_head" not in state
    holds(forward(graph), state, *prompt())


@pytest.mark.nightly
def test_experts() -> None:
    graph, state = model("qwen3", num_layers=1, num_experts=3, num_experts_per_tok=2)
    report = holds(forward(graph), state, *prompt())
    assert sum("mlp/gate_proj" in use.name for use in report.uses) == 3


def test_fused_projection() -> None:
    """Gemma 3 with as many key heads as query heads keeps the three in one array."""
    graph, state = model("gemma3", num_layers=1, num_kv_heads=SIZES["num_heads"])
    report = holds(forward(graph), state, *prompt())
    assert sum("qkv_einsum" in use.name for use in report.uses) == 1
