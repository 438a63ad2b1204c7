"""The weighted sum of the largest parts of updates."""

import functools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, PyTree

from jlora.arithmetic._fuse import check_part, fused, trimmed, weighted_sum
from jlora.arithmetic._terms import weights_of


def magnitude(
    adapters: Sequence[PyTree], weights: Any, *, density: float | int, rank: int | None = None
) -> PyTree:
    """Add the largest part of each update: `Σ wᵢ τ̂ᵢ`.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter.
        density: the part of each update to keep, in (0, 1].
        rank: as for `ties`.

    Returns:
        An adapter.

    Raises:
        ValueError: as for `ties`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> magnitude([detach(params)[1]], [1.0], density=0.5, rank=3)["w"].rank
        3

    Reference: Yadav et al. 2023, arXiv:2306.01708, the trimming of algorithm 1. PEFT's
    `combination_type="magnitude_prune_svd"`.
    """
    call = "jlora.arithmetic.magnitude(adapters, weights)"
    density = check_part("density", density, call)
    each = weights_of(weights, len(adapters), call)
    return fused(adapters, each, rank, _method(density), call)


@functools.cache
def _method(density: float) -> Any:
    def fuse(deltas: Array, weights: Array, _: Any) -> Array:
        return weighted_sum(trimmed(deltas, density), weights)

    return fuse
