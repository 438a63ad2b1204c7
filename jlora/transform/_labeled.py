"""Arrays whose axes are labeled: how they are multiplied, and what that costs."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

from jax import lax

from jlora._arrays import accumulator

Label = Hashable  # names an axis
Labels = tuple[Label, ...]


def expanded(x: Any, labels: Sequence[Any], among: Sequence[Any]) -> Any:
    """Arrange an array, its axes labeled, to broadcast against one whose axes are `among`."""
    have = [k for k in among if k in labels]
    x = lax.transpose(x, [list(labels).index(k) for k in have])
    sizes = dict(zip(have, x.shape, strict=True))
    return lax.reshape(x, [sizes.get(k, 1) for k in among])


def contract(
    x: Any,
    x_labels: Sequence[Any],
    y: Any,
    y_labels: Sequence[Any],
    out_labels: Sequence[Any],
    precision: Any = None,
) -> Any:
    """Multiply two labeled arrays and sum over the labels that `out_labels` lacks: an einsum."""
    batch = [k for k in x_labels if k in y_labels and k in out_labels]
    summed = [k for k in x_labels if k in y_labels and k not in out_labels]
    made = batch + [k for k in (*x_labels, *y_labels) if (k in x_labels) != (k in y_labels)]

    def at(group: list[Any]) -> tuple[list[int], list[int]]:
        return [list(x_labels).index(k) for k in group], [list(y_labels).index(k) for k in group]

    out = lax.dot_general(
        x,
        y,
        (at(summed), at(batch)),
        precision=precision,
        preferred_element_type=accumulator(x.dtype),
    )
    if made != list(out_labels):
        out = lax.transpose(out, [made.index(k) for k in out_labels])
    return out


def flops(sizes: dict[Any, Any], *label_sets: Sequence[Any]) -> Any:
    """Count multiply-adds, twice, of one contraction over these labels; sizes may be symbolic."""
    return 2 * math.prod(sizes[k] for k in set().union(*label_sets))
