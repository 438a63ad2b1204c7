"""What one product says of a weight's inputs: Σ x xᵀ, Σ x and their number, laid out as its A.

A's in-axes and ranks stand for the two sides of Σ x xᵀ. With P, the identity at first and then
moved as the weight was, in A's place, the sums are `(Σ x xᵀ) P`, `Σ x` and the number: what the
derivative of each rearrangement takes back to the weight as it lies in the parameters.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora.transform._labeled import contract
from jlora.transform._view import RANK, View
from jlora.transform.conv import convolve, sides_of, with_rank_at
from jlora.transform.ragged import into_rank, meeting

_EXACT = lax.Precision.HIGHEST


class Sums(NamedTuple):
    """Arrays of A's axes, of size 1 where they do not vary."""

    second: Any  # (..., in, rank)
    total: Any  # (..., in, 1)
    count: Any  # (..., 1, rank)


def of_dot(eqn: JaxprEqn, lhs: Any, rhs: Any) -> Sums | None:
    """Sum the inputs of a product; None where it does not contract the weight's inputs."""
    left = isinstance(lhs, View)
    view, x = (lhs, rhs) if left else (rhs, lhs)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    w_sum, x_sum = (lhs_sum, rhs_sum) if left else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if left else (rhs_batch, lhs_batch)
    met = {k for k in w_sum if view.roles[k] == "i"}
    if not met:
        return None
    x_labels: list[Any] = [("x", k) for k in range(x.ndim)]
    for k, n in zip([*w_sum, *w_batch], [*x_sum, *x_batch], strict=True):
        if view.roles[k] in ("s", "i"):  # an output's own inputs are inputs like any other
            x_labels[n] = k
    x, axes = _wide(x), view.axes(0)
    have = [k for k in axes if k in x_labels]
    again = [("again", k) if k in met else k for k in x_labels]
    primes = [("again", k) for k in axes if k in met]
    square = contract(x, x_labels, x, again, [*have, *primes], _EXACT)
    if view.whole and met == {k for k in axes if view.roles[k] == "i"}:  # P is the identity
        second = square.reshape(*(view.shape[k] if k in have else 1 for k in axes), view.rank)
    else:
        p = [("again", k) if k in met else k for k in axes]
        factor = view.factors[0]
        second = contract(
            square.astype(factor.dtype), [*have, *primes], factor, [*p, RANK], [*axes, RANK], _EXACT
        )
    summed = x.sum(tuple(n for n, k in enumerate(x_labels) if k not in have), dtype=second.dtype)
    order = [k for k in x_labels if k in have]
    summed = lax.transpose(summed, [order.index(k) for k in have])
    total = summed.reshape(*(view.shape[k] if k in have else 1 for k in axes), 1)
    apart = [k for k in have if k in met or view.roles[k] == "s"]
    count = x.size // math.prod(view.shape[k] for k in apart)
    return Sums(second, total, jnp.asarray(count, second.dtype))


def of_conv(eqn: JaxprEqn, x: Any, view: Any) -> Sums | None:
    """Sum the patches that a kernel meets; those beyond the image are zeros, and count."""
    if not isinstance(view, View) or sides_of(eqn, view) != (0, 0):
        return None
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    groups, x = eqn.params["feature_group_count"], _wide(x).astype(view.factors[0].dtype)

    def narrow(a: Any) -> Any:
        kernel = with_rank_at(dataclasses.replace(view, parts=(a, a)), 0, out_axis)
        return convolve(eqn, x, jnp.concatenate([kernel] * groups, out_axis), groups, _EXACT)

    patches, second, total = _pulled(narrow, view.factors[0])
    return Sums(second, total, jnp.asarray(patches.size // view.rank, second.dtype))


def of_ragged(eqn: JaxprEqn, x: Any, view: Any, group_sizes: Any) -> Sums | None:
    """Sum each expert's rows."""
    if not isinstance(view, View) or meeting(eqn, view)[0] != 0:
        return None
    a, axes = view.factors[0], view.axes(0)
    x = _wide(x).astype(a.dtype)

    def narrow(x: Any) -> Callable[[Any], Any]:
        return lambda a: into_rank(eqn, x, a, axes, group_sizes, _EXACT)

    _, second, total = _pulled(narrow(x), a)
    rows = _pulled(narrow(jnp.ones_like(x)), a)[2]
    ins = [n for n, k in enumerate(axes) if view.roles[k] == "i"]
    return Sums(second, total, rows.max(ins, keepdims=True))


def _pulled(narrow: Callable[[Any], Any], a: Any) -> tuple[Any, Any, Any]:
    """Return x·P and, of the derivative in P, what x·P itself and what ones pull back."""
    z, pull = jax.vjp(narrow, a)
    return z, pull(z)[0], pull(jnp.ones_like(z))[0]


def _wide(x: Any) -> Any:
    """Cast what is no float; bfloat16 stays, for its products are exact in float32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
