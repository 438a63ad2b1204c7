"""Put the parts of an update on the devices of the base weight, sharded along the same axes."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, PyTree

from jlora import _compat, forms
from jlora._arrays import Adapted, FullArray, Geometry, Tied
from jlora._base import is_stored


def placed(node: Adapted, base: PyTree) -> Adapted:
    """Put a node without its base on the devices of `base`, the leaf that it belongs to.

    On a mesh, stack axes are sharded in every part, input axes in A and output axes in B, as in the
    base; the rank is not. An axis that its mesh axes do not divide, such as that of a B of slices,
    is not sharded. A stored weight only tells the mesh: its leaves have axes of their own.
    """
    sharding = _sharding(base)
    if sharding is None:
        return node
    if isinstance(node, FullArray):
        return dataclasses.replace(node, value=jax.device_put(node.value, sharding))
    geometry = Geometry.of(base.shape, node.layout)

    def put(x: Any, axes: str) -> Any:
        if isinstance(x, Tied):
            return x
        if not isinstance(sharding, NamedSharding):
            return jax.device_put(x, sharding)
        spec = geometry.along(axes, sharding.spec)
        return jax.device_put(x, NamedSharding(sharding.mesh, _divided(spec, x, sharding.mesh)))

    parts = {name: put(node.parts[name], part.axes) for name, part in forms.parts(node).items()}
    return dataclasses.replace(node, scaling=put(node.scaling, "s")).with_parts(parts)


def _sharding(base: PyTree) -> NamedSharding | SingleDeviceSharding | None:
    """Return where a base weight is; None if it is nowhere in particular."""
    if is_stored(base):
        found = [s for s in map(_sharding, jax.tree.leaves(base)) if s is not None]
        meshes = [NamedSharding(s.mesh, PartitionSpec()) for s in found if hasattr(s, "mesh")]
        return next(iter([*meshes, *found]), None)
    sharding = getattr(base, "sharding", None)
    # An array that is not committed to its device follows the others of a program.
    if _compat.is_traced(base) or not getattr(base, "committed", True):
        return None
    if sharding is None or isinstance(sharding, NamedSharding | SingleDeviceSharding):
        return sharding
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(devices, ("devices",)), PartitionSpec())


def _divided(spec: PartitionSpec, x: Array, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Leave out the mesh axes that do not divide their axis of `x`."""

    def fits(size: int, names: Any) -> bool:
        each = names if isinstance(names, tuple) else (names,)
        return names is not None and size % math.prod(mesh.shape[name] for name in each) == 0

    pairs = zip(x.shape, spec, strict=False)  # a scalar scaling has no axes
    return PartitionSpec(*(names if fits(size, names) else None for size, names in pairs))
