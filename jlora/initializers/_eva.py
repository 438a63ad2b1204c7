"""EVA: A spans the directions along which a weight's inputs vary most."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import Geometry, LoraArray
from jlora._moments import Moments
from jlora.initializers._data import adapted, known, moments_of, replaced


def eva(
    params: PyTree,
    moments: PyTree,
    *,
    rho: float = 1.0,
    adjust_scaling: bool = True,
    rslora: bool = False,
) -> PyTree:
    """Set A to the principal directions of each weight's inputs, and B to zero.

    `Σ (x - x̄)(x - x̄)ᵀ = V Λ Vᵀ`, `A = Vᵣ`, B = 0: the model starts unchanged. With `rho` above 1
    the ranks are handed out anew, all together as many as before: each goes to the direction
    that explains the largest share `λₖ / Σ λ` of its weight's inputs, up to `rho · rank` at one.

    Elements of a stack get ranks of their own, and the columns of A beyond an element's rank are
    zero, as B's rows are: these never train. A weight that gets no rank is plain again. Slices
    meet the same inputs, so each begins with the same A.

    The eigenvectors are those of sums in float32: directions whose λ is below 1e-6 of the largest,
    or of the mean's square, are lost in rounding.

    Args:
        params: what `jlora.attach` returned; its A and B are not read, it is not changed.
        moments: what `jlora.capture` returned for it, of one batch or added up.
        rho: how many times its rank a weight may get. PEFT's default is 2.
        adjust_scaling: grow alpha with the rank, so that s stays as it is.
        rslora: whether s is α/√r and not α/r; read only where ranks change.

    Returns:
        `params` with other A and B and, with `rho`, ranks.

    Raises:
        ValueError: `rho` below 1, or above it while tracing; no `LoraArray`; one over a residual;
            moments of another structure or shape, or not finite; no more inputs than the rank.

    Example:
        >>> import jax, jlora
        >>> base = {"w": jnp.ones((2, 3))}
        >>> params = jlora.attach(base, {"w": jlora.LoraSpec(1)}, key=jax.random.key(0))
        >>> x = jnp.array([[3.0, 4.0], [-3.0, -4.0]])
        >>> params = eva(params, jlora.capture(lambda p, x: x @ p["w"], params, x))
        >>> print(abs(params["w"].lora_a[:, 0]), params["w"].lora_b.any())
        [0.6 0.8] False

    Reference: Paischer et al. 2024, arXiv:2410.07170, algorithm 1. PEFT's
    `init_lora_weights="eva"`, `EvaConfig(rho, adjust_scaling_factors)`.
    """
    call = "jlora.initializers.eva(params, moments)"
    if rho < 1.0:
        raise ValueError(
            f"`jlora.initializers.eva(rho={rho})`: no weight would keep its rank. Give 1 or more."
        )
    nodes = adapted(params, call)
    seen = moments_of(nodes, moments, call, least=1)
    spectra = {path: _spectrum(m) for path, m in seen.items()}
    if rho == 1.0:
        ranks = {path: np.full(m.count.shape, nodes[path].rank) for path, m in seen.items()}
    else:
        if not all(known(x) for x, _ in spectra.values()):
            raise ValueError(
                f"`jlora.initializers.eva(rho={rho})`: the ranks hang on the moments, which have "
                "no values under `jax.jit`. Call it outside."
            )
        ranks = _ranks(nodes, {path: values for path, (values, _) in spectra.items()}, rho)
    power = float(adjust_scaling) - (0.5 if rslora else 1.0)
    return replaced(
        params,
        {path: _begun(node, spectra[path][1], ranks[path], power) for path, node in nodes.items()},
    )


def _spectrum(moments: Moments) -> tuple[Array, Array]:
    """Return the shares of the variance, largest first, and their directions as columns."""
    mean = moments.total / moments.count[..., None]
    scatter = moments.second - moments.total[..., None] * mean[..., None, :]
    values, vectors = jnp.linalg.eigh((scatter + jnp.swapaxes(scatter, -1, -2)) / 2)
    values = jnp.maximum(values[..., ::-1], 0.0)
    whole = values.sum(-1, keepdims=True)  # zero of inputs that never vary, which explain nothing
    return values / jnp.where(whole > 0, whole, 1.0), vectors[..., ::-1]


def _ranks(
    nodes: dict[str, LoraArray], shares: dict[str, Array], rho: float
) -> dict[str, np.ndarray]:
    """Hand the ranks out to the largest shares, equal ones in the order of the tree."""
    offers, budget = [], 0
    for path, node in nodes.items():
        geometry = Geometry.of(node.shape, node.layout)
        width = min(b - a for a, b in node.slices or ((0, geometry.out_dims[0]),))
        outs = geometry.fan_out // geometry.out_dims[0] * width
        most = min(round(node.rank * rho), geometry.fan_in, outs)
        for n, values in enumerate(np.asarray(shares[path]).reshape(-1, shares[path].shape[-1])):
            budget += node.rank
            offers += [(-value, path, n) for value in values[:most].tolist()]
    offers.sort(key=lambda offer: offer[0])
    ranks = {path: np.zeros(shares[path].shape[:-1], int) for path in nodes}
    for _, path, n in offers[:budget]:
        ranks[path].flat[n] += 1
    return ranks


def _begun(node: LoraArray, directions: Array, ranks: np.ndarray, power: float) -> Any:
    """Return the node with A and B of new ranks, s times a power of how much they have grown."""
    rank = int(ranks.max())
    if rank == 0:
        return node.base
    geometry, n = Geometry.of(node.shape, node.layout), len(node.slices or (None,))
    a = jnp.where(np.arange(rank) < ranks[..., None, None], directions[..., :rank], 0.0)
    shape_a, shape_b = forms.factor_shapes(geometry, rank, node.slices)
    s = node.scaling
    if (ranks != node.rank).any():
        s = jnp.asarray(s)
        s = s * jnp.asarray(np.maximum(ranks, 1) / node.rank, s.dtype) ** power
    return dataclasses.replace(
        node,
        lora_a=jnp.concatenate([a] * n, -1).reshape(shape_a).astype(node.lora_a.dtype),
        lora_b=jnp.zeros(shape_b, node.lora_b.dtype),
        scaling=s,
    )
