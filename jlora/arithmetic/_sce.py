"""SCE: select by variance, calculate weights by energy, erase minority signs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora.arithmetic._fuse import check_part, fused, kept_of, positions, weighted_sum


def sce(
    adapters: Sequence[PyTree], *, density: float | int = 1.0, rank: int | None = None
) -> PyTree:
    """Merge updates with weights that follow from the updates themselves.

    Select the elements in which the updates vary most; calculate `ηᵢ = ‖τᵢ‖² / Σ ‖τⱼ‖²` for each
    weight; erase values against the sign of `Σ τᵢ`. The result is `Σ ηᵢ τᵢ / Σ ηᵢ` over what is
    left.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        density: the part of the elements to select, in (0, 1].
        rank: as for `ties`.

    Returns:
        An adapter.

    Raises:
        ValueError: as for `ties`.

    Example:
        >>> import jax
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> sce([detach(params)[1]] * 2, density=0.5, rank=3)["w"].rank
        3

    Reference: Wan et al. 2024, arXiv:2408.07990, section 3.3; the division by `Σ ηᵢ` is that of
    mergekit's "sce".
    """
    call = "jlora.arithmetic.sce(adapters)"
    density = check_part("density", density, call)
    return fused(adapters, [1.0] * len(adapters), rank, _method(density), call)


@functools.cache
def _method(density: float) -> Any:
    def fuse(deltas: Array, weights: Array, _: Any) -> Array:
        spread = jnp.var(deltas, 0)
        selected = (positions(spread) < kept_of(spread.size, density)) & (spread > 0)
        taus = jnp.where(selected[None] if density < 1 else True, deltas, 0)
        energy = jnp.sum(taus * taus, (1, 2))
        eta = jnp.where(energy.sum() > 0, energy / jnp.maximum(energy.sum(), 1e-30), weights)
        sign = jnp.where(taus.sum(0) >= 0, 1.0, -1.0)
        left = jnp.where(jnp.sign(taus) == sign[None], 1.0, 0.0)
        total = weighted_sum(left, eta)
        return weighted_sum(taus * left, eta) / jnp.where(total > 0, total, 1.0)

    return fuse
