"""`Moments`: running first and second moments of a weight's inputs."""

import dataclasses
import functools
from typing import Any

import jax

from jlora._paths import short_repr


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("second", "total", "count"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Hold sums over all inputs x of one weight, each x flattened to `(in,)`.

    Batches can be streamed: `jax.tree.map(jnp.add, one, other)` are the moments of both.

    Attributes:
        second: Σ x xᵀ, `(*stack, in, in)`, float32 or wider.
        total: Σ x, `(*stack, in)`, of the same dtype.
        count: the number of inputs, `(*stack)`, of the same dtype.

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

    def __repr__(self) -> str:
        return short_repr(self)
