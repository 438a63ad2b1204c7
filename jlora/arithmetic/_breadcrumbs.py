"""Model breadcrumbs: drop the largest and the smallest values."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora.arithmetic._fuse import (
    check_flag,
    check_part,
    elected,
    fused,
    kept_of,
    positions,
    weighted_sum,
)
from jlora.arithmetic._terms import weights_of


def breadcrumbs(
    adapters: Sequence[PyTree],
    weights: Any,
    *,
    density: float | int,
    outliers: float | int,
    elect: bool = False,
    rank: int | None = None,
) -> PyTree:
    """Add updates without their outliers and without their small values: `Σ wᵢ mᵢ ∘ Δᵢ`.

    mᵢ drops the largest part of each update, keeps the next one, and drops the rest.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter.
        density: the part of each update to keep, in (0, 1]. The paper's 1 - β - γ.
        outliers: the part to drop from the largest values on, in [0, 1 - density]. mergekit's
            `gamma`.
        elect: whether to merge as `ties` does, by elected signs, and not to add.
        rank: as for `ties`.

    Returns:
        An adapter.

    Raises:
        ValueError: `outliers` out of range; as for `ties`.
        TypeError: `elect` is no bool.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> breadcrumbs([detach(params)[1]], [1.0], density=0.8, outliers=0.1, rank=3)["w"].rank
        3

    Reference: Davari and Belilovsky 2023, arXiv:2312.06795, section 3.
    """
    call = "jlora.arithmetic.breadcrumbs(adapters, weights)"
    density = check_part("density", density, call)
    check_flag("elect", elect, call)
    if not isinstance(outliers, int | float) or not 0 <= outliers <= 1 - density + 1e-9:
        raise ValueError(
            f"`{call}`: outliers={outliers!r}; it must be in [0, 1 - density], at most "
            f"{1 - density:.3g}."
        )
    each = weights_of(weights, len(adapters), call)
    return fused(adapters, each, rank, _method(density, float(outliers), elect), call)


@functools.cache
def _method(density: float, outliers: float, elect: bool) -> Any:
    def fuse(deltas: Array, weights: Array, _: Any) -> Array:
        size = deltas[0].size
        first = int(outliers * size)
        last = first + kept_of(size, density)
        at = jax.vmap(positions)(deltas)
        masked = jnp.where((at >= first) & (at < last), deltas, 0)
        return (elected if elect else weighted_sum)(masked, weights)

    return fuse
