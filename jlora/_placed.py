"""Where the parts of an update are: on the devices of the base weight, sharded along its axes.

One rule for all: the stack's axes are sharded in every part, the input axes in A, the output axes
in B, each along the mesh axes of the base; the rank is not sharded. Then the mesh axes in
`replicate` are left out.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import PyTree

from jlora import _compat
from jlora._arrays import Adapted, FullArray, LoraArray, Tied
from jlora._base import is_stored
from jlora._boxes import of_parts
from jlora._mesh import divided
from jlora._paths import brief, describe
from jlora._processes import put

Names = Sequence[str]


def check_replicate(replicate: object, call: str) -> None:
    """Refuse anything but a sequence of names."""
    if isinstance(replicate, str) or not isinstance(replicate, Sequence | set | frozenset):
        each = f"({replicate!r},)" if isinstance(replicate, str) else '("fsdp",)'
        raise TypeError(
            f"`{call}`: `replicate` is {brief(replicate)}. Give a tuple of names: "
            f"`replicate={each}`."
        )


def names_of_parts(node: LoraArray, names: Sequence[Any], replicate: Names) -> dict[str, Any]:
    """Derive the names of the axes of each part, and of the scaling, from those of the base.

    Args:
        node: a node; its base is not read.
        names: an entry of a `PartitionSpec` for each axis of the base.
        replicate: names that are left out.

    Returns:
        A tuple of entries for each part.
    """
    kept = tuple(_without(entry, replicate) for entry in names)
    stack = kept[: len(kept) - len(node.layout)] if getattr(node.scaling, "shape", ()) else ()
    return {**of_parts(node, kept), "scaling": stack}


def _without(entry: Any, replicate: Names) -> Any:
    if not isinstance(entry, tuple):
        return None if entry in replicate else entry
    return tuple(name for name in entry if name not in replicate) or None


def sharding_of(base: PyTree) -> NamedSharding | SingleDeviceSharding | None:
    """Return where a base weight is; None if it is nowhere in particular.

    Of a traced array only the sharding along explicit axes of a mesh is known. A stored weight has
    the sharding of a leaf with the weight's axes, otherwise that of its stack.
    """
    if is_stored(base):
        return _of_stored(base)
    sharding = getattr(base, "sharding", None)
    if _compat.is_traced(base):
        sharding = jax.typeof(base).sharding
        return sharding if _compat.is_explicit(sharding) else None
    # An array that is not committed to its device follows the others of a program.
    if not getattr(base, "committed", True):
        return None
    if sharding is None or isinstance(sharding, NamedSharding | SingleDeviceSharding):
        return sharding
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(devices, ("devices",)), PartitionSpec())


def _of_stored(weight: Any) -> NamedSharding | SingleDeviceSharding | None:
    shape, stack = tuple(weight.shape), getattr(weight, "stack", 0)
    found = [(x, sharding_of(x)) for x in jax.tree.leaves(weight)]
    named = [(x, s) for x, s in found if isinstance(s, NamedSharding)]
    if not named:
        return next((s for _, s in found if s is not None), None)
    if hasattr(weight, "axes_of"):
        x, at = max(named, key=lambda pair: (pair[0].ndim, math.prod(pair[0].shape)))
        return NamedSharding(
            at.mesh, PartitionSpec(*weight.axes_of(_full(at.spec, x.ndim), at.mesh))
        )
    alike = [(x, s) for x, s in named if _blocks(x.shape, shape)]
    if alike:
        return max(alike, key=lambda pair: math.prod(pair[0].shape))[1]
    sharding = max(named, key=lambda pair: math.prod(pair[0].shape))[1]
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:stack]))


def _blocks(shape: Sequence[int], of: Sequence[int]) -> bool:
    """Whether an array has the axes of a weight, with one entry for a block of its entries."""
    return len(shape) == len(of) and all(m and n % m == 0 for m, n in zip(shape, of, strict=True))


def at_base(
    node: Adapted, shape: Sequence[int], sharding: Sharding, replicate: Names, call: str
) -> Adapted:
    """Return a node without base whose parts are replaced by their shardings.

    An axis that its mesh axes do not divide is not sharded.
    """
    if isinstance(node, FullArray):
        return dataclasses.replace(node, value=None if node.value is None else sharding)
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda _: sharding, node)
    mesh = sharding.mesh
    _check_axes(replicate, mesh, call)
    names = names_of_parts(node, _full(sharding.spec, len(shape)), replicate)

    def of(x: Any, names: Sequence[Any]) -> Any:
        if x is None or isinstance(x, Tied):
            return x
        return NamedSharding(mesh, divided(PartitionSpec(*names), x.shape, mesh))

    parts = {name: of(x, names[name]) for name, x in node.parts.items()}
    scaling = of(node.scaling, names["scaling"])
    return dataclasses.replace(node, scaling=scaling).with_parts(parts)


def _full(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (ndim - len(spec)))


def _check_axes(replicate: Names, mesh: Mesh | AbstractMesh, call: str) -> None:
    for name in replicate:
        if name not in mesh.axis_names:
            near = difflib.get_close_matches(name, mesh.axis_names, n=1)
            raise ValueError(
                f"`{call}`: `replicate` has {brief(name)}, but the mesh has the axes "
                f"{mesh.axis_names}." + (f" Did you mean {near[0]!r}?" if near else "")
            )


def warn_of_undivided(leaves: Mapping[str, PyTree], call: str) -> None:
    """Warn, once for all leaves, of axes of weights that their mesh axes do not divide."""
    at = {path: sharding_of(x) for path, x in leaves.items() if hasattr(x, "shape")}
    named = {path: x for path, x in at.items() if isinstance(x, NamedSharding)}
    warn_of_uneven({path: (leaves[path], x.spec, x.mesh) for path, x in named.items()}, call)


def warn_of_uneven(
    leaves: Mapping[str, tuple[PyTree, PartitionSpec, Mesh | AbstractMesh]], call: str
) -> None:
    """Warn, once for all leaves, of axes that the mesh axes in a spec do not divide."""
    found = []
    for path, (leaf, spec, mesh) in leaves.items():
        pairs = enumerate(zip(spec, divided(spec, leaf.shape, mesh), strict=False))
        found += [(path, axis, names) for axis, (names, fits) in pairs if names and not fits]
    if found:
        path, axis, names = found[0]
        more = f" (also for {len(found) - 1} more axes)" if len(found) > 1 else ""
        warnings.warn(
            f"`{call}`: axis {axis} of {describe(path, leaves[path][0])} is sharded along "
            f"{names!r}, which does not divide it, so its update is replicated along it{more}. "
            "Shard the weight along mesh axes that divide its axes, or pad it.",
            stacklevel=4,
        )


def placed(node: Adapted, base: PyTree, replicate: Names, call: str) -> Adapted:
    """Put a node without its base on the devices of `base`, the leaf that it belongs to."""
    sharding = sharding_of(base)
    if sharding is None:
        return node
    part = dataclasses.replace(node, base=None)
    part = jax.tree.map(put, part, at_base(part, base.shape, sharding, replicate, call))
    return dataclasses.replace(part, base=node.base)
