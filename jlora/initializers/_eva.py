"""EVA: A spans the directions along which a weight's inputs vary most."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import Geometry, LoraArray
from jlora._check_values import check_number
from jlora._moments import Moments
from jlora._paths import brief
from jlora._stacks import layer_by_layer
from jlora.initializers._data import concrete, lora_nodes, moments_of, replaced


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
    ranks are reallocated across weights; the total is unchanged. They go to the directions with
    the largest share `λₖ / Σ λ` of the variance of a weight's inputs, at most `rho · rank` per
    weight.

    Each stack element gets its own rank. The columns of A and rows of B beyond it are zero and
    never train. A weight with rank 0 is no longer adapted. Slices have the same inputs, so they
    start with the same A.

    The eigenvectors are computed from float32 sums: directions with λ below 1e-6 of the largest, or
    of the squared mean, are lost in rounding.

    Args:
        params: what `jlora.attach` returned. Its A and B are not read, and it is not modified.
        moments: what `jlora.capture` returned for `params`, for one batch or summed over several.
        rho: the maximum rank of a weight, relative to its current rank. PEFT's default is 2.
        adjust_scaling: scale alpha with the rank, so that s does not change.
        rslora: whether s is α/√r and not α/r; used only where ranks change.

    Returns:
        `params` with new A and B and, if `rho` is above 1, new ranks.

    Raises:
        ValueError: `rho` is below 1, or above 1 under `jax.jit`; there is no `LoraArray`, or one
            over a residual; the moments do not match in structure or shape, or are not finite;
            there are no more inputs than the rank.
        TypeError: `rho` is not a number, or another argument is not a bool.

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
    check_number(rho, call, "rho", "a number of at least 1")
    for name, value in (("adjust_scaling", adjust_scaling), ("rslora", rslora)):
        if not isinstance(value, bool):
            raise TypeError(f"`{call}`: `{name}` is {brief(value)}. Give True or False.")
    if not 1.0 <= rho < np.inf:
        raise ValueError(
            f"`jlora.initializers.eva(rho={rho})`: ranks cannot all decrease. Give a "
            "number of at least 1."
        )
    nodes = lora_nodes(params, call)
    seen = moments_of(nodes, moments, call, least=1)
    spectra = {}
    for path, m in seen.items():
        spectrum = functools.partial(_spectrum, most=round(nodes[path].rank * rho))
        spectra[path] = layer_by_layer(spectrum, m.count.ndim)(m)
    if rho == 1.0:
        ranks = {path: np.full(m.count.shape, nodes[path].rank) for path, m in seen.items()}
    else:
        if not all(concrete(x) for x, _ in spectra.values()):
            raise ValueError(
                f"`jlora.initializers.eva(rho={rho})`: the ranks depend on the moments, which have "
                "no values under `jax.jit`. Call it outside of `jax.jit`."
            )
        ranks = _ranks(nodes, {path: values for path, (values, _) in spectra.items()}, rho)
    power = float(adjust_scaling) - (0.5 if rslora else 1.0)
    return replaced(
        params,
        {
            path: _initialized(node, spectra[path][1], ranks[path], power)
            for path, node in nodes.items()
        },
    )


def _spectrum(moments: Moments, most: int) -> tuple[Array, Array]:
    """Return the largest shares of variance in decreasing order, and their directions, columns."""
    mean = moments.total / moments.count[..., None]
    scatter = moments.second - moments.total[..., None] * mean[..., None, :]
    values, vectors = jnp.linalg.eigh((scatter + jnp.swapaxes(scatter, -1, -2)) / 2)
    values = jnp.maximum(values[..., ::-1], 0.0)
    total = values.sum(-1, keepdims=True)  # zero for constant inputs, whose shares are zero
    shares = values / jnp.where(total > 0, total, 1.0)
    return shares[..., :most], vectors[..., ::-1][..., :most]


def _ranks(
    nodes: dict[str, LoraArray], shares: dict[str, Array], rho: float
) -> dict[str, np.ndarray]:
    """Allocate the ranks to the largest shares; ties in the order of the tree."""
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


def _initialized(node: LoraArray, directions: Array, ranks: np.ndarray, power: float) -> PyTree:
    """Return the node with A and B of new ranks, and s times a power of the growth in rank."""
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
