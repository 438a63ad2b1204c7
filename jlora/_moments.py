"""`Moments`: what is kept of the inputs of a weight, three sums that batches add to."""

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("second", "total", "count"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """The sums over all inputs x of one weight, each x flattened to `(in,)`.

    Batches stream: `jax.tree.map(jnp.add, one, other)` is what both together would have given.

    Attributes:
        second: Σ x xᵀ, `(*stack, in, in)`, float32 or wider.
        total: Σ x, `(*stack, in)`, of the same dtype.
        count: how many inputs were seen, `(*stack)`, of the same dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> one = Moments(x.T @ x, x.sum(0), jnp.array(2.0))
        >>> two = jax.tree.map(jnp.add, one, one)
        >>> two.count.item(), two.total.tolist()
        (4.0, [8.0, 12.0])
    """

    second: Any
    total: Any
    count: Any
