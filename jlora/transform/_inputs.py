"""Sums over the inputs of one product: Σ x xᵀ, Σ x and their count, with the axes of A.

A's input axes and its rank are the rows and columns of Σ x xᵀ. A is replaced by P, which starts as
the identity and is rearranged with the weight. The sums are `(Σ x xᵀ) P`, `Σ x` and the count, and
the transposed derivative of each rearrangement maps them back to the axes of the parameter.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.transform._labeled import AnyArray, contract
from jlora.transform._view import RANK, View

EXACT = lax.Precision.HIGHEST


class Sums(NamedTuple):
    """Arrays with the axes of A, of size 1 where they are constant."""

    second: Any  # (..., in, rank)
    total: Any  # (..., in, 1)
    count: Any  # (..., 1, rank)


def of_dot(numbers: lax.DotDimensionNumbers, lhs: Any, rhs: Any) -> Sums | None:
    """Sum over the inputs of a product; None if it does not contract the weight's inputs."""
    left = isinstance(lhs, View)
    view, x = (lhs, rhs) if left else (rhs, lhs)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = numbers
    w_sum, x_sum = (lhs_sum, rhs_sum) if left else (rhs_sum, lhs_sum)
    w_batch, x_batch = (lhs_batch, rhs_batch) if left else (rhs_batch, lhs_batch)
    met = {k for k in w_sum if view.roles[k] == "i"}
    if not met:
        return None
    x_labels: list[Any] = [("x", k) for k in range(x.ndim)]
    for k, n in zip([*w_sum, *w_batch], [*x_sum, *x_batch], strict=True):
        if view.roles[k] in ("s", "i"):  # with an x for each output, x only has more rows
            x_labels[n] = k
    x, axes = wide(x), view.axes(0)
    have = [k for k in axes if k in x_labels]
    again = [("again", k) if k in met else k for k in x_labels]
    primes = [("again", k) for k in axes if k in met]
    square = contract(x, x_labels, x, again, [*have, *primes], EXACT)
    if view.own and met == {k for k in axes if view.roles[k] == "i"}:  # P is the identity
        second = square.reshape(*(view.shape[k] if k in have else 1 for k in axes), view.rank)
    else:
        p = [("again", k) if k in met else k for k in axes]
        factor = view.factors[0]
        second = contract(
            square.astype(factor.dtype), [*have, *primes], factor, [*p, RANK], [*axes, RANK], EXACT
        )
    summed = x.sum(tuple(n for n, k in enumerate(x_labels) if k not in have), dtype=second.dtype)
    order = [k for k in x_labels if k in have]
    summed = lax.transpose(summed, [order.index(k) for k in have])
    total = summed.reshape(*(view.shape[k] if k in have else 1 for k in axes), 1)
    apart = [k for k in have if k in met or view.roles[k] == "s"]
    count = x.size // math.prod(view.shape[k] for k in apart)
    return Sums(second, total, jnp.asarray(count, second.dtype))


def pulled(narrow: Callable[[Any], Any], a: AnyArray) -> tuple[Array, Array, Array]:
    """Return x·P, and the cotangents of P for the cotangents x·P and ones."""
    z, pull = jax.vjp(narrow, a)
    return z, pull(z)[0], pull(jnp.ones_like(z))[0]


def wide(x: AnyArray) -> Any:
    """Cast to float32 unless `x` is a float; products of bfloat16 are exact in float32 already."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
