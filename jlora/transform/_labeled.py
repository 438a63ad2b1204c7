"""Arrays with labeled axes: their products, and the cost of those."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jlora._arrays import accumulator

# Arrays in the walk. Literals and constants of a jaxpr are NumPy arrays, and so may arguments be.
AnyArray = Array | np.ndarray | np.number | np.bool_
Label = Hashable  # the name of an axis
Labels = tuple[Label, ...]
Product = Callable[[Any, Any], Array]


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

    The product is that of y in the dtype of x: see `in_dtype_of_first`. On a mesh with explicit
    axes, `places` says along which of them each label is sharded.
    """
    product = einsum(x_labels, y_labels, out_labels, precision, places)
    return in_dtype_of_first(product, x, y)


def in_dtype_of_first(product: Product, x: AnyArray, y: AnyArray) -> Array:
    """Return `product(x, y)`, a bilinear map, of y cast to the dtype of x.

    The derivative is that of the product alone. That of the cast would round the gradient for y,
    which is a sum over tokens. Tokens are on several devices, and on TPUs XLA adds up what they
    have in the dtype that the sum is then rounded to.
    """
    if x.dtype == y.dtype:
        return product(x, y)
    rounded: Product = lambda x, y: product(x, lax.convert_element_type(y, x.dtype))
    return derived(rounded, product, x, y)


def derived(run: Product, product: Product, x: AnyArray, y: AnyArray) -> Array:
    """Return `run(x, y)`, but differentiate `product`, of which it is another form."""
    called = jax.custom_jvp(run)

    @functools.partial(called.defjvp, symbolic_zeros=True)
    def _(at: tuple[Any, Any], along: tuple[Any, Any]) -> tuple[Array, Array]:
        (x, y), (dx, dy) = at, along
        out, terms = called(x, y), []
        if not isinstance(dx, SymbolicZero):
            terms.append(in_dtype_of_first(product, dx, y))
        if not isinstance(dy, SymbolicZero):
            terms.append(product(x, dy))
        return out, functools.reduce(lax.add, terms) if terms else jnp.zeros_like(out)

    return called(x, y)


def einsum(
    x_labels: Sequence[Label],
    y_labels: Sequence[Label],
    out_labels: Sequence[Label],
    precision: lax.PrecisionLike = None,
    places: Places | None = None,
) -> Product:
    """Return the product of two arrays with these labels, of two dtypes as they are."""
    batch = [k for k in x_labels if k in y_labels and k in out_labels]
    summed = [k for k in x_labels if k in y_labels and k not in out_labels]
    made = batch + [k for k in (*x_labels, *y_labels) if (k in x_labels) != (k in y_labels)]

    def at(group: list[Label]) -> tuple[list[int], list[int]]:
        return [list(x_labels).index(k) for k in group], [list(y_labels).index(k) for k in group]

    def product(x: AnyArray, y: AnyArray) -> Array:
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

    return product


def flops(sizes: dict[Any, Any], *label_sets: Sequence[Label]) -> Any:
    """Count the FLOPs of one contraction over these labels; sizes may be symbolic."""
    return 2 * math.prod(sizes[k] for k in set().union(*label_sets))
