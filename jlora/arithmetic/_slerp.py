"""Spherical interpolation of two adapters, from their factors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._adapters import check_adapters
from jlora._arrays import FullArray, LoraArray
from jlora._base import built
from jlora.arithmetic._terms import (
    Term,
    check_original,
    each_path,
    matrices,
    read,
    refuse_gain,
    shape_among,
    weighted,
    weights_of,
)

_EXACT = jax.lax.Precision.HIGHEST
_NEARLY_PARALLEL = 1e-3  # sine of an angle below which arc and chord differ by rounding only


def slerp(adapters: Sequence[PyTree], t: ArrayLike) -> PyTree:
    """Interpolate between two updates along the arc, and not the chord, between them.

    `(sin((1-t)θ) Δ₀ + sin(tθ) Δ₁) / sin θ`, where θ is the angle between the updates of one weight,
    `cos θ = ⟨Δ₀, Δ₁⟩ / (‖Δ₀‖ ‖Δ₁‖)`. Each element of a stack is a weight of its own; but a
    parameter that both train in full is one weight, since it has no layout. Updates that are nearly
    parallel or opposite, or zero, are interpolated linearly. The result is exact and has the rank
    of both together; θ is computed from the factors.

    Args:
        adapters: two, from `jlora.detach`; adapted parameters where any are trained in full.
        t: 0 gives the first and 1 the second; it may be traced.

    Returns:
        An adapter.

    Raises:
        ValueError: there are not two adapters; what `add` refuses.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> adapter = detach(params)[1]
        >>> slerp([adapter, adapter], 0.3)["w"].rank
        4

    Reference: Shoemake 1985. mergekit's "slerp" and, for updates, "nuslerp".
    """
    call = "jlora.arithmetic.slerp(adapters, t)"
    check_adapters(adapters, call)
    if len(adapters) != 2:
        raise ValueError(
            f"`{call}`: {len(adapters)} adapters; an arc has two ends. For more use `add`."
        )
    (t,) = weights_of([t], 1, call)
    like, nodes = read(adapters, call)

    def one(path: str, having: list[int]) -> Any:
        terms = [Term(1.0, nodes[n][path]) for n in having]
        refuse_gain(path, terms, call)
        ends = (1 - t, t)
        if len(having) == 1:  # the other update is zero
            return weighted(path, [Term(ends[having[0]], terms[0].node)], call)
        by = _coefficients(_cosine(path, [x.node for x in terms], call), t)
        return weighted(path, [Term(w, x.node) for w, x in zip(by, terms, strict=True)], call)

    return each_path(like, nodes, one)


def _coefficients(cosine: Array, t: ArrayLike) -> tuple[Array, Array]:
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    sine = jnp.sin(angle)
    parallel = sine < _NEARLY_PARALLEL
    t = jnp.asarray(t, angle.dtype)

    def end(u: Array) -> Array:
        return jnp.where(parallel, u, jnp.sin(u * angle) / jnp.where(parallel, 1.0, sine))

    return end(1 - t), end(t)


def _cosine(path: str, nodes: Sequence[Any], call: str) -> Array:
    """Return `⟨Δ₀, Δ₁⟩ / (‖Δ₀‖ ‖Δ₁‖)`, `(*stack)`, or 1 where an update is zero."""
    inner = _pairs(path, nodes, call)
    both, one, other = inner(0, 1), inner(0, 0), inner(1, 1)
    norm = jnp.sqrt(one) * jnp.sqrt(other)
    return jnp.where(norm > 0, both / jnp.where(norm > 0, norm, 1.0), 1.0)


def inner_products(path: str, nodes: Sequence[Any], call: str) -> Array:
    """Return `⟨Δᵢ, Δⱼ⟩` of all pairs of updates of one weight, from the factors."""
    inner, n = _pairs(path, nodes, call), range(len(nodes))
    return jnp.stack([jnp.stack([jnp.sum(inner(i, j)) for j in n]) for i in n])


def _pairs(path: str, nodes: Sequence[Any], call: str) -> Callable[[int, int], Array]:
    """Return a function of two positions that gives `⟨Δᵢ, Δⱼ⟩`, `(*stack)`."""
    if any(isinstance(x, FullArray) for x in nodes):
        shape = shape_among(path, nodes, call)
        dense = [_difference(path, x, shape, call) for x in nodes]
        layout = next((x.layout for x in nodes if isinstance(x, LoraArray)), shape)
        own = tuple(range(len(shape) - len(layout), len(shape)))
        return lambda i, j: jnp.sum(dense[i] * dense[j], own)
    if len({x.slices for x in nodes}) > 1:
        shape = shape_among(path, nodes, call)
        nodes = [forms.as_lora(x, shape) for x in nodes]
    pairs = [matrices(x) for x in nodes]

    def inner(i: int, j: int) -> Array:
        products = [_inner(x, y) for x, y in zip(pairs[i], pairs[j], strict=True)]
        return jnp.sum(jnp.stack(products), 0)

    return inner


def _difference(path: str, node: Any, shape: tuple[int, ...], call: str) -> Array:
    if not isinstance(node, FullArray):
        return forms.delta(node, shape, jnp.float32).astype(jnp.float32)
    check_original(path, node, call)
    return node.value.astype(jnp.float32) - built(node.base).astype(jnp.float32)


@jax.jit
def _inner(x: tuple[Array, Array], y: tuple[Array, Array]) -> Array:
    """Return `⟨A₀ B₀, A₁ B₁⟩ = Σ (A₀ᵀ A₁) ∘ (B₀ B₁ᵀ)`."""
    wide = jnp.float64 if jnp.float64 in (x[0].dtype, y[0].dtype) else jnp.float32
    (a, b), (c, d) = ((one.astype(wide), other.astype(wide)) for one, other in (x, y))
    ac = jnp.einsum("...ir,...is->...rs", a, c, precision=_EXACT)
    bd = jnp.einsum("...ro,...so->...rs", b, d, precision=_EXACT)
    return jnp.sum(ac * bd, (-2, -1))
