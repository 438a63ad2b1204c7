"""Heads tied to the embedding, which a PEFT file may contain twice.

| the file, of a model whose head is its embedding | here, where both are one leaf |
|---|---|
| `ensure_weight_tying=True`: both, equal | read once |
| only the embedding, fully saved | both change; PEFT's head keeps the old rows |
| both, different, or only the head | an error: the head needs its own leaf |
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jlora.peft._keys import Found, Groups, Tensors


def is_tied_full(key: str, is_copy: bool, groups: Groups, tensors: Tensors, found: Found) -> bool:
    """Whether a matrix without a leaf equals one with a leaf: a tied embedding."""
    x = tensors[key]
    others = (groups.base if is_copy else groups.full).items()
    alike = [
        k for name, k in others if k != key and name in found.places and tensors[k].shape == x.shape
    ]
    return x.ndim == 2 and any(np.array_equal(tensors[k], x) for k in alike)


def is_tied_lora(kinds: Mapping[str, Mapping[str, str]], groups: Groups, tensors: Tensors) -> bool:
    """Whether A and B of a head are the embedding's B and A, transposed."""
    head = kinds.get("linear", {})
    if set(head) != {"lora_a", "lora_b"} or set(kinds) != {"linear"}:
        return False
    a, b = (tensors[head[part]] for part in ("lora_a", "lora_b"))
    for other in groups.lora.values():
        embedding = other.get("embedding", {})
        if {"lora_a", "lora_b"} <= set(embedding):
            of_a, of_b = (tensors[embedding[part]] for part in ("lora_a", "lora_b"))
            if np.array_equal(a, of_b.T) and np.array_equal(b, of_a.T):
                return True
    return False


def unties(unexpected: Sequence[str], tensors: Tensors, found: Found) -> list[str]:
    """Explain a matrix without a leaf but with an embedding's shape: it unties the head."""
    embeddings = [
        place
        for place in found.places.values()
        if len(place.shape) == 2 and ("embed" in place.path or "embed" in place.name)
    ]
    for key in unexpected:
        x = tensors[key]
        same = [p for p in embeddings if x.shape in (p.shape, p.shape[::-1])]
        if same and key.endswith(".weight") and ".lora_" not in key:
            return [
                f'"{key}" has the shape of "{same[0].path}": where the model\'s head is its '
                "embedding, this file gives the head other weights. Make it a leaf of its own, "
                "a copy of the embedding that the model reads, and name it"
            ]
    return []
