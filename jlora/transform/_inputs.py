"""What one product says of a weight's inputs: Σ x xᵀ, Σ x and their number, laid out as its A.

A's in-axes and ranks stand for the two sides of Σ x xᵀ. With P, the identity at first and then
moved as the weight was, in A's place, the sums are `(Σ x xᵀ) P`, `Σ x` and the number: what the
derivative of each rearrangement takes back to the weight as it lies in the parameters.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.transform._labeled import contract
from jlora.transform._view import RANK, View

EXACT = lax.Precision.HIGHEST


class Sums(NamedTuple):
    """Arrays of A's axes, of size 1 where they do not vary."""

    second: Any  # (..., in, rank)
    total: Any  # (..., in, 1)
    count: Any  # (..., 1, rank)


def of_dot(numbers: Any, lhs: Any, rhs: Any) -> Sums | None:
    """Sum the inputs of a product; None where it does not contract the weight's inputs."""
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
        if view.roles[k] in ("s", "i"):  # an output's own inputs are inputs like any other
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


def pulled(narrow: Callable[[Any], Any], a: Any) -> tuple[Any, Any, Any]:
    """Return x·P and, of the derivative in P, what x·P itself and what ones pull back."""
    z, pull = jax.vjp(narrow, a)
    return z, pull(z)[0], pull(jnp.ones_like(z))[0]


def wide(x: Any) -> Any:
    """Cast what is no float; bfloat16 stays, for its products are exact in float32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
