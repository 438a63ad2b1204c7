"""Reduce a node of any form to one A and one B; derive the shapes of its parts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora._arrays import AXES, Geometry, LoraArray, accumulator
from jlora._paths import brief
from jlora.forms._form import Part, check_node, named

Slices = tuple[tuple[int, int], ...] | None


def shapes(
    parts: Mapping[str, Part], geometry: Geometry, rank: int, slices: Slices = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parts; with slices, A concatenates their ranks and B their outputs.

    Args:
        parts: the parts of a form, or some of them, by name.
        geometry: the weight's geometry.
        rank: r, per slice.
        slices: as in `LoraSpec`.

    Returns:
        The shapes, by name.

    Example:
        >>> shapes(named("lora_xs").parts, Geometry.of((5, 3, 4), "io"), 2)["core"]
        (5, 2, 2)
    """
    narrow, ranks = geometry.sliced(slices), rank * (1 if slices is None else len(slices))

    def shape(name: str, axes: str) -> tuple[int, ...]:
        of = narrow if name == "lora_b" else geometry
        return of.along(axes, of.shape, ranks if name == "lora_a" else rank)

    return {name: shape(name, part.axes) for name, part in parts.items()}


def factor_shapes(
    geometry: Geometry, rank: int, slices: Slices = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `lora_a` and `lora_b`.

    Args:
        geometry: the weight's geometry.
        rank: r, per slice.
        slices: as in `LoraSpec`.

    Returns:
        Two shapes.

    Example:
        >>> factor_shapes(Geometry.of((5, 3, 4), "io"), 2)
        ((5, 3, 2), (5, 2, 4))
    """
    found = shapes({name: Part(axes) for name, axes in AXES.items()}, geometry, rank, slices)
    return found["lora_a"], found["lora_b"]


def changed_b(node: LoraArray, geometry: Geometry, change: Callable[[Array], Array]) -> Array:
    """Apply `change` to B as matrices, in float32 or wider.

    Args:
        node: the node with B.
        geometry: the weight's geometry.
        change: a function of `(*stack, rank, out)` that preserves the shape.

    Returns:
        The changed B, in B's shape and dtype.

    Example:
        >>> node = LoraArray(None, jnp.ones((3, 2)), jnp.ones((2, 4)), 1.0, "io")
        >>> changed_b(node, Geometry.of((3, 4), "io"), lambda b: 2 * b)[0, 0].item()
        2.0
    """
    check_node(node, "jlora.forms.changed_b(node, ...)")
    shape, dtype = node.lora_b.shape, node.lora_b.dtype
    matrix = node.lora_b.astype(accumulator(dtype))
    matrix = matrix.reshape(*geometry.stack, node.rank, geometry.fan_out)
    return change(matrix).reshape(shape).astype(dtype)


def factors(node: LoraArray, shape: tuple[int, ...] | None = None) -> tuple[Array, Array]:
    """Return one A and one B, for all outputs, whose product is the update.

    Each slice becomes a block of rows of B, with zeros outside its range of outputs.

    Args:
        node: a node of any form.
        shape: the weight's shape; `None` reads it from the base.

    Returns:
        A, `(*stack, *in_dims, rank)`, and B, `(*stack, rank, *out_dims)`.

    Raises:
        TypeError: `node` is not a `LoraArray`, or `shape` not a shape.
        ValueError: A does not fit a weight of this shape.

    Example:
        >>> values = {"singular_values": jnp.array([3.0])}
        >>> a, b = jnp.ones((2, 1)), jnp.ones((1, 2))
        >>> node = LoraArray(jnp.ones((2, 2)), a, b, 1.0, "io", extra=values, form="adalora")
        >>> factors(node)[1].tolist()
        [[3.0, 3.0]]
    """
    return _factors(node, _geometry(node, shape, "jlora.forms.factors(node, shape)"))


def _factors(node: LoraArray, geometry: Geometry) -> tuple[Array, Array]:
    form = named(node.form)
    if form.factors is not None:
        return form.factors(node, geometry)
    if node.slices is None:
        return node.lora_a, node.lora_b
    axis, rows, first = len(geometry.stack) + 1, [], 0
    for start, stop in node.slices:
        width = [(0, 0, 0)] * node.lora_b.ndim
        width[axis] = (start, geometry.out_dims[0] - stop, 0)
        piece = jax.lax.slice_in_dim(node.lora_b, first, first + stop - start, axis=axis)
        rows.append(jax.lax.pad(piece, jnp.zeros((), piece.dtype), width))
        first += stop - start
    return node.lora_a, jnp.concatenate(rows, axis - 1)


def as_lora(node: LoraArray, shape: tuple[int, ...] | None = None) -> LoraArray:
    """Convert an update of any form, also with slices, to LoRA: one A and one B; a gain is kept.

    Args:
        node: a node of any form.
        shape: the weight's shape; `None` reads it from the base.

    Returns:
        A node of the form "lora" with the same weight.

    Raises:
        TypeError: `node` is not a `LoraArray`, or `shape` not a shape.
        ValueError: A does not fit a weight of this shape.

    Example:
        >>> values = {"singular_values": jnp.array([3.0])}
        >>> a, b = jnp.ones((2, 1)), jnp.ones((1, 2))
        >>> node = LoraArray(jnp.ones((2, 2)), a, b, 1.0, "io", extra=values, form="adalora")
        >>> as_lora(node).form, as_lora(node).lora_b.tolist()
        ('lora', [[3.0, 3.0]])
    """
    a, b = _factors(node, _geometry(node, shape, "jlora.forms.as_lora(node, shape)"))
    extra = {name: x for name, x in node.extra.items() if name not in named(node.form).parts}
    return dataclasses.replace(node, lora_a=a, lora_b=b, slices=None, extra=extra, form="lora")


def delta(node: LoraArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Build `s · A B`, in the widest of float32, the weight's dtype and A's dtype.

    Args:
        node: a node of any form; its base is not read.
        shape: the weight's shape.
        dtype: the weight's dtype.

    Returns:
        An array of `shape`.

    Raises:
        TypeError: `node` is not a `LoraArray`, or `shape` not a shape.
        ValueError: A does not fit a weight of this shape.

    Example:
        >>> node = LoraArray(None, jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io")
        >>> delta(node, (3, 4), jnp.float32)[0, 0].item()
        1.0
    """
    geometry = _geometry(node, shape, "jlora.forms.delta(node, shape, dtype)")
    a, b = _factors(node, geometry)
    rank = a.shape[-1]
    a = a.reshape(*geometry.stack, geometry.fan_in, rank)
    b = b.reshape(*geometry.stack, rank, geometry.fan_out)
    wide = max(accumulator(node.lora_a.dtype), accumulator(dtype), key=lambda k: jnp.finfo(k).bits)
    ab = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    s = jnp.asarray(node.scaling, wide)
    return geometry.from_matrix(ab * s.reshape(*s.shape, *(1,) * (ab.ndim - s.ndim)))


def _geometry(node: LoraArray, shape: object, call: str) -> Geometry:
    """Divide the weight's shape; refuse anything but a node, and a shape that A does not fit."""
    check_node(node, call)
    shape = node.shape if shape is None else shape
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"`{call}`: `shape` is {brief(shape)}. Give the shape of the node's base.")
    geometry = Geometry.of(tuple(shape), node.layout)
    if node.lora_a.shape[:-1] != (*geometry.stack, *geometry.in_dims):
        raise ValueError(
            f"`{call}`: lora_a {node.lora_a.shape} with layout {node.layout!r} is not that of a "
            f"weight of shape {tuple(shape)}. Give the shape of the node's base."
        )
    return geometry
