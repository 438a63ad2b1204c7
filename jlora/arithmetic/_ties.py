"""TIES: trim, elect signs, merge what agrees."""

import functools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, PyTree

from jlora.arithmetic._fuse import check_part, elected, fused, trimmed
from jlora.arithmetic._terms import weights_of


def ties(
    adapters: Sequence[PyTree], weights: Any, *, density: float | int, rank: int | None = None
) -> PyTree:
    """Merge updates without conflicts of sign: trim, elect, and average what agrees.

    `τ̂ᵢ` keeps the largest part of `Δᵢ`, `γ = sign(Σ τ̂ᵢ)`, which is +1 at 0, and each element of
    the result is the mean of `wᵢ τ̂ᵢ` over the adapters with `sign(τ̂ᵢ) = γ`. Weights that are all λ
    scale the paper's result by λ.

    A weight at a time, in float32; each element of a stack is a weight of its own, but a parameter
    that every adapter trains in full is one weight, since it has no layout. A weight that an
    adapter does not adapt has a zero update.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter.
        density: the part of each update to keep, in (0, 1].
        rank: of the nearest A and B; None returns weights, W plus the update, as parameters
            trained in full, and needs the base of one adapter.

    Returns:
        An adapter.

    Raises:
        ValueError: a density or rank out of range; no base where it is needed; a weight with
            DoRA's magnitude; what `add` refuses.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> adapter = detach(params)[1]
        >>> ties([adapter, adapter], [1.0, 1.0], density=0.5, rank=3)["w"].rank
        3

    Reference: Yadav et al. 2023, arXiv:2306.01708, algorithm 1. PEFT's
    `combination_type="ties_svd"`; its "ties" trims A and B, not the update.
    """
    call = "jlora.arithmetic.ties(adapters, weights)"
    density = check_part("density", density, call)
    each = weights_of(weights, len(adapters), call)
    return fused(adapters, each, rank, _method(density), call)


@functools.cache
def _method(density: float) -> Any:
    def fuse(deltas: Array, weights: Array, _: Any) -> Array:
        return elected(trimmed(deltas, density), weights)

    return fuse
