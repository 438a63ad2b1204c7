"""Small models of transformers, and their parameters as a tree of Flax's."""

from typing import Any

import torch

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)


def tree(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The model's parameters as Flax names them: a Linear's is a kernel, (in, out)."""
    modules, params, names = dict(model.named_modules()), {}, {}
    for name, p in model.named_parameters():
        module, _, own = name.rpartition(".")
        kind, x = type(modules[module]), p.detach().numpy().copy()
        linear = kind is torch.nn.Linear and own == "weight"
        leaf = "kernel" if linear else "embedding" if kind is torch.nn.Embedding else own
        leaf = "scale" if own == "weight" and x.ndim == 1 else leaf
        path = f"{module}.{leaf}".replace(".", "/")
        params[path], names[path] = x.T.copy() if linear else x, name
    return params, names
