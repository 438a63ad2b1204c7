"""Partition specs and the axes of a mesh."""

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def divided(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Leave out the mesh axes that do not divide their axis of an array."""

    def fits(size: int, names: Any) -> bool:
        each = names if isinstance(names, tuple) else (names,)
        return names is not None and size % math.prod(mesh.shape[name] for name in each) == 0

    pairs = zip(shape, spec, strict=False)
    return PartitionSpec(*(names if fits(size, names) else None for size, names in pairs))
