"""DARE: drop values at random and rescale the rest."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jlora.arithmetic._fuse import check_flag, check_part, elected, fused, weighted_sum
from jlora.arithmetic._terms import weights_of


def dare(
    adapters: Sequence[PyTree],
    weights: Any,
    *,
    density: float | int,
    key: PRNGKeyArray,
    elect: bool = False,
    rank: int | None = None,
) -> PyTree:
    """Add updates of which a random part was dropped: `Σ wᵢ (mᵢ ∘ Δᵢ) / density`.

    `mᵢ ~ Bernoulli(density)`, so the expected update does not change.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter.
        density: the probability to keep a value, in (0, 1].
        key: a PRNG key; every weight draws with its own.
        elect: whether to merge as `ties` does, by elected signs, and not to add. PEFT's and
            mergekit's "dare_ties".
        rank: as for `ties`.

    Returns:
        An adapter.

    Raises:
        ValueError: as for `ties`.
        TypeError: `key` is no PRNG key, or `elect` no bool.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> key = jax.random.key(0)
        >>> adapter = detach(attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=key))[1]
        >>> dare([adapter], [1.0], density=0.5, key=key, rank=3)["w"].rank
        3

    Reference: Yu et al. 2023, arXiv:2311.03099, eq. 2. PEFT's `combination_type="dare_linear_svd"`
    and "dare_ties_svd".
    """
    call = "jlora.arithmetic.dare(adapters, weights)"
    density = check_part("density", density, call)
    check_flag("elect", elect, call)
    each = weights_of(weights, len(adapters), call)
    return fused(adapters, each, rank, _method(density, elect), call, key, random=True)


@functools.cache
def _method(density: float, elect: bool) -> Any:
    def fuse(deltas: Array, weights: Array, key: Any) -> Array:
        keep = jax.random.bernoulli(key, density, deltas.shape)
        dropped = jnp.where(keep, deltas / density, 0)
        return (elected if elect else weighted_sum)(dropped, weights)

    return fuse
