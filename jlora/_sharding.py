"""Partition specs of adapted parameters: those of the base, for each part by the axes it has."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from jlora._arrays import FullArray, LoraArray, Tied, is_leaf
from jlora._boxes import of_parts, unboxed
from jlora._paths import describe, leaves_with_paths, map_with_paths, near_misses


def specs(params: PyTree, base_specs: PyTree, replicate: Sequence[str] = ()) -> PyTree:
    """Derive the `PartitionSpec`s of adapted parameters from those of the base weights.

    Stack axes go to A and B, input axes to A, output axes to B; the rank and the scaling are not
    sharded. In trees with Flax's boxes, `nn.get_partition_spec(params)` gives the same. In NNX,
    `nnx.get_partition_spec(params)` gives the base's spec for all parts of a node, so pass that of
    the base here.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes, of arrays or `ShapeDtypeStruct`s.
        base_specs: a tree of the same paths with a `PartitionSpec`, a tuple of logical names or
            `None` for each weight, such as `nnx.get_partition_spec(base)`.
        replicate: names that are left out of the specs of A, B and the other parts: axes of the
            mesh along which the adapter is replicated.

    Returns:
        A tree like `params`, with a spec for each leaf; with `jax.sharding.NamedSharding` the
        shardings for `jax.device_put`, or for `in_shardings` of `jax.jit`.

    Raises:
        KeyError: a parameter has no spec.
        ValueError: a spec has more entries than its weight has axes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> node = specs(params, {"w": PartitionSpec("data", "model")})["w"]
        >>> tuple(node.lora_a), tuple(node.lora_b)
        (('data', None), (None, 'model'))
    """
    call = "jlora.specs(params, base_specs)"
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec) or _is_names(x)
    known = dict(leaves_with_paths(base_specs, is_spec))

    def derived(path: str, leaf: Any) -> Any:
        if path not in known:
            raise KeyError(
                f'`{call}`: "{path}" has no spec. Give one for each parameter of the base, as '
                f"`nn.get_partition_spec(base)` does. {near_misses(path, known)}"
            )
        spec = PartitionSpec() if known[path] is None else known[path]
        if isinstance(leaf, FullArray):
            return FullArray(spec, spec)
        if not isinstance(leaf, LoraArray):
            return spec
        if len(spec) > len(leaf.shape):
            raise ValueError(
                f"`{call}`: the spec {spec} has more entries than {describe(path, leaf)} has axes."
            )
        return _of_node(leaf, spec, replicate)

    return map_with_paths(derived, unboxed(params), is_leaf)


def _is_names(x: object) -> bool:
    """Whether `x` is a tuple of names, or of tuples of names, and no other part of a tree."""
    return isinstance(x, tuple) and all(
        name is None or isinstance(name, str) or (name and _is_names(name)) for name in x
    )


def _of_node(node: LoraArray, spec: Any, replicate: Sequence[str]) -> LoraArray:
    """Return the specs of all parts of a node, in the type of `spec`."""
    kind = PartitionSpec if isinstance(spec, PartitionSpec) else lambda *names: names
    kept = [_without(entry, replicate) for entry in spec]
    names = of_parts(node, (*kept, *(None,) * (len(node.shape) - len(kept))))
    parts = {
        name: value if value is None or isinstance(value, Tied) else kind(*names[name])
        for name, value in node.parts.items()
    }
    return dataclasses.replace(node, base=spec, scaling=kind()).with_parts(parts)


def _without(entry: Any, replicate: Sequence[str]) -> Any:
    if isinstance(entry, tuple):
        return tuple(name for name in entry if name not in replicate) or None
    return None if entry in replicate else entry
