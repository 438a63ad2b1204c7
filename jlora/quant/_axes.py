"""Stored weights on meshes: rows `(*stack, out, in)` are sharded like the weight that they are of.

The outputs of a weight are one axis of its rows, and so are its inputs. Of several output axes the
first is the outermost, so rows can be sharded as it is; along the others they are not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora import _compat
from jlora._mesh import divided


def placed(parts: Mapping[str, Array], weight: Any, layout: str) -> Mapping[str, Array]:
    """Shard parts as the weight that they were made of, where its mesh axes divide them."""
    sharding = getattr(weight, "sharding", None)
    if _compat.is_traced(weight) or not isinstance(sharding, NamedSharding):
        return parts
    return jax.device_put(parts, of_parts(parts, weight, layout, sharding))


def of_parts(
    parts: Mapping[str, Any], weight: Any, layout: str, sharding: NamedSharding
) -> dict[str, NamedSharding]:
    """Return how parts are sharded, given their shapes, the weight and its sharding."""
    full = (*sharding.spec, *(None,) * (weight.ndim - len(sharding.spec)))
    stack = weight.ndim - len(layout)
    rows = (*full[:stack], full[stack + layout.index("o")], full[stack + layout.index("i")])

    def at(x: Array) -> NamedSharding:
        of_rows = x.shape[stack : stack + 1] == (_outputs(weight.shape[stack:], layout),)
        spec = PartitionSpec(*rows[: x.ndim] if of_rows else rows[:stack])
        return NamedSharding(sharding.mesh, divided(spec, x.shape, sharding.mesh))

    return {name: at(x) for name, x in parts.items()}


def of_weight(rows: Sequence[Any], layout: str, dims: Sequence[int], mesh: Any) -> tuple[Any, ...]:
    """Return the entries of a weight's axes, given those of its rows, `(*stack, out, in)`."""
    *stack, out, inputs = rows
    found: list[Any] = [None] * len(layout)
    for side, entry in (("o", out), ("i", inputs)):
        found[layout.index(side)] = entry
    return (*stack, *divided(PartitionSpec(*found), dims, mesh))


def explicit(weight: Any) -> NamedSharding | None:
    """Return the sharding of a stored weight along explicit axes of a mesh; None if it has none."""
    codes = max(weight.parts.values(), key=lambda x: (x.ndim, x.size))
    sharding = jax.typeof(codes).sharding
    if not _compat.is_explicit(sharding):
        return None
    rows = (*sharding.spec, *(None,) * (codes.ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*weight.axes_of(rows, sharding.mesh)))


def explicit_parts(pack: Callable[[Any], Any], weight: Any, layout: str) -> Any:
    """Return the shardings of the parts of a weight along explicit axes of a mesh, or None."""
    sharding = jax.typeof(weight).sharding
    if not _compat.is_explicit(sharding):
        return None
    parts = jax.eval_shape(pack, jax.ShapeDtypeStruct(weight.shape, weight.dtype))
    return of_parts(parts, weight, layout, sharding)


def _outputs(dims: Sequence[int], layout: str) -> int:
    return math.prod(n for n, side in zip(dims, layout, strict=True) if side == "o")
