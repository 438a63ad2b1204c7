"""KnOTS: align updates by a common singular value decomposition, and merge what differs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import FullArray, Geometry, LoraArray
from jlora.arithmetic._compress import decomposed
from jlora.arithmetic._fuse import check_part, check_rank, elected, trimmed, weighted_sum
from jlora.arithmetic._terms import (
    Term,
    each_path,
    matrices,
    read,
    refuse_gain,
    shape_among,
    weighted,
    weights_of,
)


def knots(
    adapters: Sequence[PyTree],
    weights: Any,
    *,
    density: float | None = None,
    rank: int | None = None,
) -> PyTree:
    """Merge updates in the basis of outputs that they share.

    `[Δ₁; Δ₂; …] = [U₁; U₂; …] S Vᵀ`, stacked along the inputs; the Uᵢ are merged, by `ties` with
    a density and by their weighted sum without one, and the update is `U S Vᵀ`. It is computed
    from the factors and has at most the sum of the ranks. Without a density it equals `add`.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter.
        density: the part of each Uᵢ to keep, in (0, 1], as for `ties`; None adds the Uᵢ.
        rank: of the nearest A and B; None keeps all directions.

    Returns:
        An adapter. Parameters trained in full are added.

    Raises:
        ValueError: a density or rank out of range; a weight with DoRA's magnitude; what `add`
            refuses.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> adapter = detach(params)[1]
        >>> knots([adapter, adapter], [1.0, 1.0], density=0.5)["w"].rank
        4

    Reference: Stoica et al. 2024, arXiv:2410.19735, section 4: KnOTS-TIES, in the transposed
    layout. Directions with a singular value of rounding size are left out.
    """
    call = "jlora.arithmetic.knots(adapters, weights)"
    check_rank(rank, call)
    if density is not None:
        density = check_part("density", density, call)
    each = weights_of(weights, len(adapters), call)
    like, nodes = read(adapters, call)
    by = jnp.stack([jnp.asarray(w, jnp.float32) for w in each])

    def one(path: str, having: list[int]) -> Any:
        terms = [Term(each[n], nodes[n][path]) for n in having]
        refuse_gain(path, [Term(1.0, x.node) for x in terms], call)
        if any(isinstance(x.node, FullArray) for x in terms):
            return weighted(path, terms, call)
        shape = shape_among(path, [x.node for x in terms], call)
        geometry = Geometry.of(shape, terms[0].node.layout)
        pairs = [matrices(forms.as_lora(x.node, shape))[0] for x in terms]
        a, b = _aligned(pairs, by[jnp.asarray(having)], density)
        if rank is not None:
            u, s, vt = (x for x in decomposed(a, b))
            a, b = u[..., :rank] * s[..., None, :rank], vt[..., :rank, :]
        return LoraArray(
            None,
            a.reshape(*geometry.stack, *geometry.in_dims, -1),
            b.reshape(*geometry.stack, a.shape[-1], *geometry.out_dims),
            jnp.ones(geometry.stack, jnp.float32),
            geometry.layout,
        )

    return each_path(like, nodes, one)


def _aligned(
    pairs: list[tuple[Array, Array]], weights: Array, density: float | None
) -> tuple[Array, Array]:
    """Return the merged U and `S Vᵀ`, from the factors."""
    rows = [a.shape[-2] for a, _ in pairs]
    ranks = [a.shape[-1] for a, _ in pairs]
    blocks = []
    for n, (a, _) in enumerate(pairs):  # block diagonal: [Δ₁; Δ₂] = diag(A₁, A₂) [B₁; B₂]
        no = [(0, 0)] * (a.ndim - 2)
        blocks.append(jnp.pad(a, [*no, (0, 0), (sum(ranks[:n]), sum(ranks[n + 1 :]))]))
    b = jnp.concatenate([b for _, b in pairs], -2)
    u, s, vt = decomposed(jnp.concatenate(blocks, -2), b)
    noise = s[..., :1] * float(jnp.finfo(s.dtype).eps) * sum(rows)
    real = s > noise
    each = jnp.stack(jnp.split(jnp.where(real[..., None, :], u, 0), len(pairs), -2))
    run = _merge(density)
    for _ in each.shape[1:-2]:
        run = jax.vmap(run, in_axes=(1, None))
    return run(each, weights), jnp.where(real, s, 0)[..., None] * vt


def _merge(density: float | None) -> Any:
    if density is None:
        return weighted_sum
    return lambda us, weights: elected(trimmed(us, density), weights)
