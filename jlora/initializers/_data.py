"""Functions shared by the initializers that use data.

These take the tree of `jlora.attach`, whose layouts, ranks and stacks are known. Each weight is
converted to `(in, out)` matrices, one per stack element and slice, and back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora import _compat, forms
from jlora._arrays import Geometry, LoraArray, is_adapted
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._moments import Moments
from jlora._paths import describe, near_misses
from jlora._stacks import at_once, in_place, is_split


def concrete(x: ArrayLike) -> bool:
    """Whether an array's values can be read, that is, whether it is not traced."""
    try:
        np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return False
    return True


def lora_nodes(params: PyTree, call: str) -> dict[str, LoraArray]:
    """Return the nodes by path; refuse nodes whose A and B cannot be initialized."""
    nodes = {
        path: x for path, x in leaves_with_paths(params, is_adapted) if isinstance(x, LoraArray)
    }
    if not nodes:
        raise ValueError(
            f"`{call}`: there is no LoraArray in `params`. Attach the adapter first: "
            "`params = jlora.attach(params, rules, key=key)`."
        )
    for path, node in nodes.items():
        forms.check(path, node, call)
        if not forms.of(node).is_product:
            raise ValueError(
                f"`{call}`: the update of {describe(path, node)} has other parts between A and B "
                'and is zero for any A and B. Attach with `LoraSpec(form="lora")`.'
            )
        if node.residual:
            raise ValueError(
                f"`{call}`: the base of {describe(path, node)} is not the model's weight but the "
                "residual of an initializer. Attach with another initializer: "
                "`LoraSpec(init=jlora.initializers.kaiming)`."
            )
    return nodes


def values_of(nodes: dict[str, LoraArray], tree: PyTree, call: str, name: str) -> dict[str, Any]:
    """Return the leaf of `tree` for each node; refuse a tree of another structure."""
    is_leaf = lambda x: isinstance(x, Moments)
    found = dict(leaves_with_paths(tree, is_leaf))
    for path, node in nodes.items():
        if path not in found:
            raise ValueError(
                f"`{call}`: `{name}` has nothing for {describe(path, node)}. "
                f"{near_misses(path, found)} It must have the structure of `params`."
            )
    return {path: found[path] for path in nodes}


def moments_of(
    nodes: dict[str, LoraArray], tree: PyTree, call: str, least: int
) -> dict[str, Moments]:
    """Return each node's moments; refuse wrong shapes, and fewer inputs than rank + `least`."""
    found = values_of(nodes, tree, call, "moments")
    for path, node in nodes.items():
        geometry, moments = Geometry.of(node.shape, node.layout), found[path]
        want = (*geometry.stack, geometry.fan_in, geometry.fan_in)
        got = getattr(getattr(moments, "second", None), "shape", None)
        if got != want:
            raise ValueError(
                f"`{call}`: {describe(path, node)} with layout {node.layout!r} needs moments whose "
                f"`second` is {want}; got {got}. Pass what `jlora.capture(fn, params, ...)` "
                "returned for these `params`."
            )
        if concrete(moments.second) and not jnp.isfinite(moments.second).all():
            raise ValueError(
                f"`{call}`: the moments of {describe(path, node)} are not finite: its inputs have "
                "NaN or infinity, or their squares overflow. Check the data and the base."
            )
        if concrete(moments.count) and (moments.count < node.rank + least).any():
            raise ValueError(
                f"`{call}`: rank {node.rank} of {describe(path, node)} needs at least "
                f"{node.rank + least} inputs; {moments.count.min():.0f} were seen"
                f"{' by one stack element' if geometry.stack else ''}. Add batches: "
                "`jax.tree.map(jnp.add, one, other)`, or use a lower rank."
            )
    return found


def replaced(params: PyTree, nodes: dict[str, Any]) -> PyTree:
    """Replace nodes by path; on a mesh their parts are sharded as before."""
    return map_with_paths(
        lambda path, leaf: _placed(nodes[path], leaf) if path in nodes else leaf, params, is_adapted
    )


def sharding_of(x: Any) -> Any:
    """Return where an array is; of a traced one only explicit axes of a mesh are known."""
    if _compat.is_traced(x):
        sharding = jax.typeof(x).sharding
        return sharding if _compat.is_explicit(sharding) else None
    return getattr(x, "sharding", None)


def without_shardings(fn: Callable[..., Any], sharding: Any, factors: int, *args: PyTree) -> Any:
    """Return `fn(*args)`: some factors, and a weight with this sharding if its axes are explicit.

    Decompositions take no array that is sharded along explicit axes.
    """
    out = None
    if _compat.is_explicit(sharding):
        out = (*[NamedSharding(sharding.mesh, PartitionSpec())] * factors, sharding)
    return _compat.without_shardings(fn, out, *args)


def _placed(new: Any, old: LoraArray) -> Any:
    """Put the parts of a node where those of another are, if these are on a mesh."""
    if not isinstance(new, LoraArray):
        return new

    def put(x: Any, like: Any) -> Any:
        at = sharding_of(like)
        on_mesh = isinstance(at, NamedSharding) and not _compat.is_traced(x)
        return jax.device_put(x, at) if on_mesh else x

    parts = {name: put(x, old.parts.get(name)) for name, x in new.parts.items()}
    base = new.base if new.base is old.base else put(new.base, old.base)
    return dataclasses.replace(new, base=base, scaling=put(new.scaling, old.scaling)).with_parts(
        parts
    )


def split(
    node: LoraArray, data: PyTree, init: Callable[..., tuple[Array, Array, Array]], by_output: bool
) -> LoraArray:
    """Split the base into A, B and a residual, with `init(weight, data, scaling)`.

    The elements of a stack are split one at a time, unless they are on different devices.

    Args:
        node: the node whose base is split.
        data: arrays with the leading axes `*stack`.
        init: the initializer of one `(in, out)` weight.
        by_output: whether `data` has the shape of the weight, of which `init` gets an `(in, out)`
            matrix too.
    """
    geometry = Geometry.of(node.shape, node.layout)
    one, depth = dataclasses.replace(geometry, stack=()), len(geometry.stack)
    per = geometry.fan_out // geometry.out_dims[0]

    def run(weight: Array, data: PyTree, scaling: Array) -> tuple[Array, Array, Array]:
        matrix, data, pairs = one.to_matrix(weight), one.to_matrix(data) if by_output else data, []
        for start, stop in node.slices or ((0, geometry.out_dims[0]),):
            some = slice(start * per, stop * per)
            *pair, rest = init(matrix[:, some], data[:, some] if by_output else data, scaling)
            matrix = matrix.at[:, some].set(rest) if node.slices else rest
            pairs.append(pair)
        a, b = (jnp.concatenate(factors, axis=1) for factors in zip(*pairs, strict=True))
        return a, b, one.from_matrix(matrix)

    sharding = sharding_of(node.base)
    over = at_once if is_split(sharding, depth) else in_place
    scaling = jnp.broadcast_to(jnp.asarray(node.scaling), geometry.stack)
    a, b, rest = without_shardings(over(run, depth), sharding, 2, node.base, data, scaling)
    return dataclasses.replace(
        node,
        base=rest,
        lora_a=a.reshape(node.lora_a.shape).astype(node.lora_a.dtype),
        lora_b=b.reshape(node.lora_b.shape).astype(node.lora_b.dtype),
        residual=True,
    )
