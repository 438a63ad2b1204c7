"""What an adapter changes: norms, spectra, intruder dimensions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._adapt import bind, detach
from jlora._arrays import FullArray, Geometry, LoraArray, accumulator
from jlora._base import built
from jlora._boxes import leaves_with_paths
from jlora._check_values import check_integer, check_number
from jlora.arithmetic._compress import decomposed
from jlora.arithmetic._fuse import svd
from jlora.arithmetic._terms import check_original, matrices, read

_EXACT = jax.lax.Precision.HIGHEST


def inspect(
    adapter: PyTree, base: PyTree = None, *, top: int = 10, threshold: float = 0.5
) -> dict[str, dict[str, Array]]:
    """Measure the update of every weight, from its factors, and compare it with the weight.

    With the weights, the `top` leading singular vectors of `W' = W + s A B` are compared with all
    of W's. One whose cosine with each of them is below the threshold is an intruder dimension:
    training made a new strong direction instead of turning an old one. Models with many forget
    more of what they knew.

    Args:
        adapter: from `jlora.detach`, or adapted parameters, which contain the weights.
        base: the weights. Without them only the update is measured.
        top: how many singular vectors of W' are compared.
        threshold: ε, in (0, 1).

    Returns:
        By path, arrays of the stack's shape: `norm`, `‖s A B‖`; `effective_rank`, the exponential
        of the entropy of the singular values over their sum; and `singular_values`, with an axis
        more. Where the weights are known, `relative`, `‖s A B‖ / ‖W‖`, and `intruders`, a count of
        at most `top`. For parameters trained in full, `norm` and `relative` of the difference. For
        DoRA, `norm` and the spectrum are those of s A B, and W' has the magnitude.

    Raises:
        ValueError: `top` or `threshold` is out of range; nothing is adapted; a node is tied,
            incomplete or over a residual; `base` has other paths or shapes; a parameter trained in
            full lacks its original.

    Example:
        >>> from jlora import LoraSpec, attach, initializers
        >>> base = {"w": jax.random.normal(jax.random.key(0), (16, 12))}
        >>> spec = LoraSpec(2, alpha=200, init=initializers.orthogonal)
        >>> params = attach(base, {"w": spec}, key=jax.random.key(1))
        >>> found = inspect(params)["w"]
        >>> found["singular_values"].shape, round(float(found["effective_rank"]), 1)
        ((2,), 1.9)

    Reference: Shuttleworth et al. 2024, arXiv:2410.21228, definition 1 and algorithm 1, on the side
    of the outputs; Roy and Vetterli 2007 for the effective rank.
    """
    call = "jlora.arithmetic.inspect(adapter, base)"
    check_integer(top, call, "top", 1)
    wanted = "a cosine, a number in (0, 1)"
    check_number(threshold, call, "threshold", wanted, lambda x: (x > 0) & (x < 1))
    if base is not None:
        adapter = bind(base, detach(adapter)[1])
    _, (nodes,) = read([adapter], call)
    if base is not None:
        _check(adapter, call)
    return {path: _one(path, node, top, threshold, call) for path, node in nodes.items()}


def _check(params: PyTree, call: str) -> None:
    for path, node in leaves_with_paths(params, lambda x: isinstance(x, LoraArray)):
        if isinstance(node, LoraArray):
            forms.check(path, node, call)


def _one(path: str, node: Any, top: int, threshold: float, call: str) -> dict[str, Array]:
    if isinstance(node, FullArray):
        check_original(path, node, call)
        old = built(node.base).astype(accumulator(node.dtype))
        norm = jnp.linalg.norm((node.value.astype(old.dtype) - old).reshape(-1))
        return {"norm": norm, "relative": _ratio(norm, jnp.linalg.norm(old.reshape(-1)))}
    s = _spectrum(node)
    norm = jnp.sqrt(jnp.sum(s * s, -1))
    share = s / jnp.maximum(s.sum(-1, keepdims=True), 1e-30)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), -1)
    found = {"norm": norm, "effective_rank": jnp.exp(entropy), "singular_values": s}
    if node.base is None:
        return found
    geometry = Geometry.of(node.shape, node.layout)
    w = geometry.to_matrix(built(node.base).astype(accumulator(node.dtype)))
    found["relative"] = _ratio(norm, jnp.linalg.norm(w, axis=(-2, -1)))
    changed = geometry.to_matrix(forms.weight(node)).astype(w.dtype)
    found["intruders"] = _intruders(w, changed, min(top, *w.shape[-2:]), threshold)
    return found


def _spectrum(node: LoraArray) -> Array:
    """Return the singular values of the update; slices have inputs in common, so of all at once."""
    pairs = matrices(node)
    a, rows = jnp.concatenate([x for x, _ in pairs], -1), []
    first, width = 0, sum(b.shape[-1] for _, b in pairs)
    for _, b in pairs:
        last = first + b.shape[-1]
        rows.append(jnp.pad(b, [*[(0, 0)] * (b.ndim - 1), (first, width - last)]))
        first = last
    return decomposed(a, jnp.concatenate(rows, -2))[1]


def _ratio(norm: Array, of: Array) -> Array:
    return jnp.where(of > 0, norm / jnp.where(of > 0, of, 1), jnp.where(norm > 0, jnp.inf, 0.0))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _intruders(old: Array, new: Array, top: int, threshold: float) -> Array:
    """Count leading singular vectors of `new`, of the outputs, that are no singular vector's."""
    vectors, ours = svd(old)[2], svd(new)[2][..., :top, :]
    cosines = jnp.matmul(ours, jnp.swapaxes(vectors, -1, -2), precision=_EXACT)
    return jnp.sum(jnp.max(jnp.abs(cosines), -1) < threshold, -1)
