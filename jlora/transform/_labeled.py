"""Arrays with labeled axes: their products, and the cost of those."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jlora._arrays import accumulator

# Arrays in the walk. Literals and constants of a jaxpr are NumPy arrays, and so may arguments be.
AnyArray = Array | np.ndarray | np.number | np.bool_
Label = Hashable  # the name of an axis
Labels = tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class Places:
    """Along which axes of a mesh each label is sharded; those that are not listed are not."""

    mesh: AbstractMesh
    axes: Mapping[Label, Any]

    def of(self, labels: Sequence[Label]) -> NamedSharding:
        """Return the sharding of an array with these labels."""
        return NamedSharding(self.mesh, PartitionSpec(*(self.axes.get(k) for k in labels)))


def expanded(x: AnyArray, labels: Sequence[Label], among: Sequence[Label]) -> AnyArray:
    """Transpose and reshape a labeled array to broadcast against one with the axes `among`."""
    have = [k for k in among if k in labels]
    x = lax.transpose(x, [list(labels).index(k) for k in have])
    sizes = dict(zip(have, x.shape, strict=True))
    return lax.reshape(x, [sizes.get(k, 1) for k in among])


def contract(
    x: AnyArray,
    x_labels: Sequence[Label],
    y: AnyArray,
    y_labels: Sequence[Label],
    out_labels: Sequence[Label],
    precision: lax.PrecisionLike = None,
    places: Places | None = None,
) -> Array:
    """Multiply two labeled arrays and sum over the labels missing in `out_labels`: an einsum.

    On a mesh with explicit axes, `places` says along which of them each label is sharded.
    """
    batch = [k for k in x_labels if k in y_labels and k in out_labels]
    summed = [k for k in x_labels if k in y_labels and k not in out_labels]
    made = batch + [k for k in (*x_labels, *y_labels) if (k in x_labels) != (k in y_labels)]

    def at(group: list[Label]) -> tuple[list[int], list[int]]:
        return [list(x_labels).index(k) for k in group], [list(y_labels).index(k) for k in group]

    out = lax.dot_general(
        x,
        y,
        (at(summed), at(batch)),
        precision=precision,
        preferred_element_type=accumulator(x.dtype),
        out_sharding=None if places is None else places.of(made),
    )
    if made != list(out_labels):
        out = lax.transpose(out, [made.index(k) for k in out_labels])
    return out


def flops(sizes: dict[Any, Any], *label_sets: Sequence[Label]) -> Any:
    """Count the FLOPs of one contraction over these labels; sizes may be symbolic."""
    return 2 * math.prod(sizes[k] for k in set().union(*label_sets))
