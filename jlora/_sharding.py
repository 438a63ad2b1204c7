"""Shardings and partition specs of adapted parameters, and of what is shaped like them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, keystr
from jaxtyping import PyTree

from jlora._arrays import FullArray, LoraArray, Tied, is_adapted, is_leaf
from jlora._boxes import unboxed
from jlora._check import check_tree
from jlora._mesh import divided
from jlora._paths import brief, describe, leaves_with_paths, map_with_paths, near_misses
from jlora._placed import (
    at_base,
    check_replicate,
    names_of_parts,
    sharding_of,
    warn_of_undivided,
    warn_of_uneven,
)


def shardings(params: PyTree, replicate: Sequence[str] = (), *, of: PyTree = None) -> PyTree:
    """Return the sharding of each leaf, as `jlora.attach(base, ..., replicate=...)` chooses it.

    A frozen weight has its own sharding. The parts of its update have that of the weight along the
    axes that they share with it: stack axes in all, input axes in A, output axes in B; the rank,
    the outputs of a B with slices and axes that do not divide evenly are not sharded.

    What is shaped like parameters, such as gradients or the state of an optimizer, is sharded like
    the parameters that it is `of`; the rest of it, such as a count of steps, is replicated. A
    training step that is compiled once, for `jlora.freeze(tx)`, on any mesh:

        params = jlora.attach(base, rules, key=key)
        state = jax.eval_shape(tx.init, params)
        at = jlora.shardings(params), jlora.shardings(state, of=params)
        state = jax.jit(tx.init, out_shardings=at[1])(params)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*at, None))

    With `trainable, frozen = jlora.partition(params)` replace the first `params` of the pair and
    the argument of `tx.init` by `trainable`: `jlora.shardings(trainable, of=params)`.

    Args:
        params: a tree of arrays, or of `ShapeDtypeStruct`s with shardings, on one mesh. A leaf that
            is not on the mesh is replicated over it. Without a mesh each leaf has its device.
        replicate: axes of the mesh along which the parts of the update are replicated.
        of: adapted parameters. With it, the leaves of `params` may be anywhere. A leaf belongs to
            the parameter of the same shape whose path its own path ends with.

    Returns:
        A tree like `params` of `jax.sharding.Sharding`s, for `jax.device_put`, `in_shardings` and
        `out_shardings` of `jax.jit`, and the structs that Orbax restores.

    Raises:
        ValueError: it is not known where a leaf is; `replicate` names an axis that the mesh does
            not have.
        TypeError: `replicate` is not a tuple of names.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jlora import LoraSpec, attach, freeze
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> at = NamedSharding(mesh, PartitionSpec("data", "model"))
        >>> w = jax.device_put(jnp.ones((4, 6)), at)
        >>> params = attach({"w": w}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> [tuple(x.spec) for x in shardings(params)["w"].parts.values()]
        [('data', None), (None, 'model')]
        >>> state = freeze(optax.sgd(0.1, momentum=0.9)).init(params)
        >>> tuple(shardings(state, ("data",), of=params)[0].trace["w"].lora_a.spec)
        (None, None)
    """
    call = "jlora.shardings(params)"
    check_replicate(replicate, call)
    check_tree(params if of is None else of, call, "params" if of is None else "of")
    known = unboxed(params if of is None else of)
    nodes = [(path, x) for path, x in leaves_with_paths(known, is_leaf) if is_adapted(x)]
    warn_of_undivided({path: x.base for path, x in nodes}, call)
    found = _of_params(known, replicate, call)
    if of is None:
        return found
    leaves = zip(_leaves(known), jax.tree.leaves(found), strict=True)
    places = {path: (x.shape, at) for (path, x), at in leaves}
    everywhere = _everywhere(known)

    def like(path: tuple[str, ...], leaf: Any) -> Any:
        ends = (path[k:] for k in range(len(path)))
        shape, at = next((places[end] for end in ends if end in places), (None, None))
        return at if shape == getattr(leaf, "shape", ()) else everywhere

    return jax.tree.structure(params).unflatten([like(*pair) for pair in _leaves(params)])


def _leaves(tree: PyTree) -> list[tuple[tuple[str, ...], Any]]:
    """Return the path and the value of each leaf; the `value` of a box has the path of the box."""
    return [
        (tuple(keystr((key,), simple=True) for key in path if key != GetAttrKey("value")), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _of_params(params: PyTree, replicate: Sequence[str], call: str) -> PyTree:
    everywhere = _everywhere(params)

    def own(path: str, leaf: Any) -> Any:
        found = sharding_of(leaf)
        if everywhere is not None and not isinstance(found, NamedSharding):
            return everywhere
        found = getattr(leaf, "sharding", None) if found is None else found
        if found is None:
            raise ValueError(
                f"`{call}`: {describe(path, leaf)} is on no device, and no other leaf is on a mesh "
                "that it could follow. Put the weights there first: `jax.device_put(base, "
                "NamedSharding(mesh, spec))`, or `jax.ShapeDtypeStruct(..., sharding=...)`."
            )
        return found

    def node(path: str, leaf: Any) -> Any:
        if not is_adapted(leaf) or leaf.base is None:
            return map_with_paths(lambda _, x: own(path, x), leaf)
        at = sharding_of(leaf.base)
        if at is None:
            return map_with_paths(lambda _, x: own(path, x), leaf)
        base = map_with_paths(lambda _, x: own(path, x), leaf.base)
        parts = dataclasses.replace(leaf, base=None)
        return dataclasses.replace(at_base(parts, leaf.shape, at, replicate, call), base=base)

    return map_with_paths(node, params, is_leaf)


def _everywhere(params: PyTree) -> NamedSharding | None:
    """Return the replicated sharding on the mesh of the parameters; None without a mesh."""
    found = (sharding_of(x) for x in jax.tree.leaves(params))
    mesh = next((s.mesh for s in found if isinstance(s, NamedSharding)), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def specs(params: PyTree, base_specs: PyTree, replicate: Sequence[str] = ()) -> PyTree:
    """Derive the `PartitionSpec`s of adapted parameters from those of the base weights.

    Stack axes go to A, B and the scaling, input axes to A, output axes to B; the rank and the
    outputs of a B with slices are not sharded, nor, under `jax.set_mesh`, is an axis that its mesh
    axes do not divide, which issues a warning. `jlora.shardings` gives the same for weights that
    are on a mesh. In trees with Flax's boxes, so does `nn.get_partition_spec(params)`.

    An NNX Variable has one spec, so `nnx.get_partition_spec(params)` gives that of the base for
    all parts of a node, and `nnx.get_named_sharding(params, mesh)` is no sharding of them. Pass the
    former here: `specs = jlora.specs(params, nnx.get_partition_spec(params))`, and
    `jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)` are the shardings.

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
        TypeError: `replicate` is not a tuple of names; a spec is neither a `PartitionSpec`, a tuple
            of names nor None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> node = specs(params, {"w": PartitionSpec("data", "model")})["w"]
        >>> tuple(node.lora_a), tuple(node.lora_b)
        (('data', None), (None, 'model'))
    """
    call = "jlora.specs(params, base_specs)"
    check_replicate(replicate, call)
    if any(map(is_adapted, jax.tree.leaves(base_specs, is_leaf=is_adapted))):
        raise TypeError(
            f"`{call}`: `base_specs` has adapted weights. The parameters come first, and the specs "
            "of the base second: `jlora.specs(params, base_specs)`."
        )
    check_tree(params, call)
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec) or _is_names(x)
    known = dict(leaves_with_paths(base_specs, is_spec))
    mesh, checked = jax.sharding.get_abstract_mesh(), {}

    def derived(path: str, leaf: Any) -> Any:
        if path not in known:
            raise KeyError(
                f'`{call}`: "{path}" has no spec. Give one for each parameter of the base, as '
                f"`nn.get_partition_spec(base)` does. {near_misses(path, known)}"
            )
        spec = PartitionSpec() if known[path] is None else known[path]
        if not is_spec(spec):
            raise TypeError(
                f"`{call}`: the spec of {describe(path, leaf)} is {brief(spec)}. Give a "
                "`PartitionSpec`, a tuple of logical names or None; the adapted parameters come "
                "first, the specs second."
            )
        if isinstance(leaf, FullArray):
            return FullArray(spec, spec)
        if not isinstance(leaf, LoraArray):
            return spec
        if len(spec) > len(leaf.shape):
            raise ValueError(
                f"`{call}`: the spec {spec} has more entries than {describe(path, leaf)} has axes."
            )
        if isinstance(spec, PartitionSpec) and _names(spec) <= set(mesh.axis_names):
            checked[path] = leaf, spec, mesh
            return _of_node(leaf, spec, replicate, divided(spec, leaf.shape, mesh))
        return _of_node(leaf, spec, replicate, spec)

    found = map_with_paths(derived, unboxed(params), is_leaf)
    warn_of_uneven(checked, call)
    return found


def _names(spec: PartitionSpec) -> set[str]:
    return {x for each in spec for x in (each if isinstance(each, tuple) else (each,))} - {None}


def _is_names(x: object) -> bool:
    """Whether `x` is a tuple of names, or of tuples of names, and no other part of a tree."""
    return isinstance(x, tuple) and all(
        name is None or isinstance(name, str) or (name and _is_names(name)) for name in x
    )


def _of_node(node: LoraArray, spec: Any, replicate: Sequence[str], shared: Any) -> LoraArray:
    """Return the specs of a node: the base's, `spec`, and those of the parts, from `shared`."""
    kind = PartitionSpec if isinstance(spec, PartitionSpec) else lambda *names: names
    full = (*shared, *(None,) * (len(node.shape) - len(shared)))
    names = names_of_parts(node, full, replicate)
    parts = {
        name: value if value is None or isinstance(value, Tied) else kind(*names[name])
        for name, value in node.parts.items()
    }
    scaling = kind(*names["scaling"])
    return dataclasses.replace(node, base=spec, scaling=scaling).with_parts(parts)
