"""The examples' decoder against the family's equations, once more, in torch."""

from pathlib import Path
from typing import Any

import llama
import numpy as np
import pytest
import torch
import weights
from tiny_llama import TINY, tiny_tensors, write_model


def torch_llama(tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The family's equations once more, in torch, one sequence, no cache."""
    w = {name.removesuffix(".weight"): torch.from_numpy(t) for name, t in tensors.items()}
    heads, shared, eps = TINY["num_attention_heads"], TINY["num_key_value_heads"], 1e-5
    norm = lambda x, name: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w[name]
    size, dim = len(tokens), TINY["hidden_size"] // heads
    freq = TINY["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.cat([torch.outer(torch.arange(size), freq)] * 2, dim=-1)  # (T, D)

    def turn(x: Any) -> Any:  # (T, H, D)
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * angle.cos()[:, None] + half * angle.sin()[:, None]

    x = w["model.embed_tokens"][torch.from_numpy(tokens).long()]
    for i in range(TINY["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q = turn((h @ w[f"{at}.self_attn.q_proj"].T).view(size, heads, dim))
        k = turn((h @ w[f"{at}.self_attn.k_proj"].T).view(size, shared, dim))
        v = (h @ w[f"{at}.self_attn.v_proj"].T).view(size, shared, dim)
        k, v = (y.repeat_interleave(heads // shared, dim=1) for y in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
        )
        x = x + out.transpose(0, 1).reshape(size, -1) @ w[f"{at}.self_attn.o_proj"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gate = torch.nn.functional.silu(h @ w[f"{at}.mlp.gate_proj"].T)
        x = x + (gate * (h @ w[f"{at}.mlp.up_proj"].T)) @ w[f"{at}.mlp.down_proj"].T
    return (norm(x, "model.norm") @ w["lm_head"].T).numpy()


@pytest.mark.nightly
def test_equals_the_equations_in_torch(tmp_path: Path) -> None:
    config, params = weights.load(str(write_model(tmp_path, TINY)))[:2]
    tokens = np.random.default_rng(0).integers(0, 256, (23,)).astype(np.int32)
    ours = llama.Llama(config).apply({"params": params}, tokens[None])[0]
    np.testing.assert_allclose(ours, torch_llama(tiny_tensors(TINY), tokens), atol=2e-5, rtol=1e-5)
