"""The arguments of a batch: which of their axes are the examples, and `vmap` over them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jlora._paths import brief, describe, leaves_with_paths


class Batch(NamedTuple):
    """The leaves of a function's arguments, and for each the axis of the examples, or None."""

    leaves: list[Any]
    axes: list[int | None]
    tree: Any
    size: int

    @classmethod
    def of(cls, args: tuple[Any, ...], in_axes: Any, size: int, call: str) -> "Batch":
        """Find the examples in the arguments; refuse another number of them than `size`."""
        in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        check_axes(in_axes, "in_axes", call)
        try:
            axes = _spread(in_axes, args)
        except ValueError as error:
            raise ValueError(
                f"`{call}`: in_axes={in_axes} does not fit the arguments after `ids`. Give one "
                "axis, or a tuple with one entry for each of them."
            ) from error
        leaves, tree = jax.tree.flatten(args)
        names = [name for name, _ in leaves_with_paths(args)]
        axes = [
            None if axis is None or not np.ndim(x) else _axis(name, x, axis, size, call)
            for name, x, axis in zip(names, map(_arrays, leaves), axes, strict=True)
        ]
        return cls(leaves, axes, tree, size)

    @property
    def tokens(self) -> int:
        """How many tokens an example has, at least, judged by the first argument."""
        for x, axis in zip(self.leaves, self.axes, strict=True):
            if axis is not None:
                features = 0 if jnp.issubdtype(x.dtype, jnp.integer) else 1
                shape = [n for k, n in enumerate(x.shape) if k != axis]
                return math.prod(shape[: len(shape) - features])
        return 0

    def map(self, fn: Callable[..., Any], by: Array, out_axes: Any) -> PyTree:
        """Concatenate `fn(k, by[k], args of example k)`, where each argument is a batch of one."""
        mapped = [(k, axis) for k, axis in enumerate(self.axes) if axis is not None]

        def one(number: Array, by: Array, *arrays: Array) -> Any:
            leaves = list(self.leaves)
            for (k, axis), x in zip(mapped, arrays, strict=True):
                leaves[k] = jnp.expand_dims(x, axis)
            return fn(number, by, self.tree.unflatten(leaves))

        in_axes = (0, 0, *(axis for _, axis in mapped))
        arrays = [jnp.asarray(self.leaves[k]) for k, _ in mapped]
        out = jax.vmap(one, in_axes, out_axes)(jnp.arange(self.size), by, *arrays)
        leaves, tree = jax.tree.flatten(out)
        axes = _spread(out_axes, out)
        return tree.unflatten([_merged(x, a) for x, a in zip(leaves, axes, strict=True)])


def check_axes(axes: Any, argument: str, call: str) -> None:
    """Refuse axes that are neither integers nor None."""
    for axis in jax.tree.leaves(axes):
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise TypeError(
                f"`{call}`: `{argument}` has {brief(axis)}. Give an integer, or None for what all "
                "examples share."
            )


def _arrays(x: Any) -> Any:
    """Return an array; 0, which has no axes, for what is not one."""
    return x if isinstance(x, (jax.Array, np.ndarray)) else 0


def _spread(axes: Any, tree: PyTree) -> list[int | None]:
    """Return the axis of every leaf, from a prefix of the tree."""
    found: list[int | None] = []

    def add(axis: int | None, part: PyTree) -> None:
        found.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(add, axes, tree, is_leaf=lambda x: x is None)
    return found


def _axis(name: str, x: Any, axis: int, size: int, call: str) -> int:
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != size:
        raise ValueError(
            f"`{call}`: argument {describe(name, x)} does not have {size} examples along axis "
            f"{axis}, as `ids` or `weights` have. For an argument that all examples share, give "
            "None in `in_axes`."
        )
    return axis % x.ndim


def _merged(x: Array, axis: int | None) -> Array:
    """Merge the axis of the examples with the axis of each example's batch of one."""
    if axis is None or x.ndim < 2:
        return x
    at, to = (axis, axis) if axis >= 0 else (x.ndim + axis, x.ndim - 1 + axis)
    x = jnp.moveaxis(x, at, to)
    return x.reshape(*x.shape[:to], -1, *x.shape[to + 2 :])
