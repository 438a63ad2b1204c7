"""Split and bind adapters, subtract them from merged weights: functions of parameter trees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import Adapted, FullArray, LoraArray, is_adapted, is_leaf
from jlora._base import is_stored, stored_as
from jlora._boxes import inside, is_box, leaves_with_paths, map_with_paths, with_base
from jlora._check import check_tree
from jlora._paths import describe


def _map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(fn, tree, *rest, is_leaf=lambda x: x is None or is_box(x) or is_leaf(x))


def detach(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split adapted parameters into the base weights, bit for bit, and the adapter.

    For a `residual` node this returns the residual; the original weights are the ones passed to
    `attach`.

    The adapter has frozen leaves, such as `scaling`. Their gradients are zero, but weight decay
    would move them: train it with `jlora.freeze(tx)`.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.

    Returns:
        `base`, plain parameters for any model, and `adapter`, the arrays of one task: the same
        nodes without `base`, and `None` for leaves that are not adapted.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> base, adapter = detach(params)
        >>> base["w"].shape, adapter["w"].base is None
        ((4, 6), True)
    """
    check_tree(params, "jlora.detach(params)")
    params = inside(params)
    base = _map(lambda x: x.base if is_adapted(x) else x, params)
    return base, _map(_without_base, params)


def _without_base(node: object) -> Adapted | None:
    return dataclasses.replace(node, base=None) if isinstance(node, Adapted) else None


def bind(base: PyTree, adapter: PyTree) -> PyTree:
    """Combine base weights and an adapter: the inverse of `detach`.

    Args:
        base: plain parameters.
        adapter: a tree of the same structure, with nodes without `base` and `None` for leaves.

    Returns:
        The adapted parameters. No array is copied.

    Raises:
        ValueError: the two trees have different paths, or a weight in `base` is adapted already.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bind(*detach(params))["w"].lora_a is params["w"].lora_a
        True
    """
    call = "jlora.bind(base, adapter)"
    check_tree(base, call, "base")
    same_paths(base, adapter, call)
    before = dict(leaves_with_paths(base, is_leaf))
    for path, x in leaves_with_paths(adapter, is_leaf):
        if not is_adapted(x):
            raise ValueError(
                f"`{call}`: {describe(path, x)} in `adapter` is not adapted. Pass the adapter of "
                "`base, adapter = jlora.detach(params)` second, after the base weights."
            )
        if is_adapted(before[path]):
            raise ValueError(
                f"`{call}`: {describe(path, before[path])} is adapted already in `base`, and a "
                "weight has one adapter. Take the plain weights first, `base, _ = "
                "jlora.detach(params)`, or those with the first adapter added, `base = "
                "jlora.merge(params)`."
            )
    return _bind(base, adapter)


def _bind(base: PyTree, adapter: PyTree) -> PyTree:
    def put(weight: PyTree, node: PyTree) -> PyTree:
        return with_base(node, weight) if is_adapted(node) else weight

    return _map(put, base, inside(adapter))


def same_paths(one: PyTree, other: PyTree, call: str) -> None:
    """Refuse two trees whose leaves have different paths."""

    def paths(tree: PyTree) -> set[str]:
        return {p for p, _ in leaves_with_paths(tree, lambda x: x is None or is_leaf(x))}

    different = sorted(paths(one) ^ paths(other))
    if different:
        where = "first" if different[0] in paths(one) else "second"
        raise ValueError(
            f"`{call}`: the trees differ in {len(different)} places; "
            f'"{different[0]}" is in the {where} only. Both must come from one model: '
            "compare `jax.tree.structure` of the two."
        )


def check_nodes(params: PyTree, call: str) -> None:
    for path, node in leaves_with_paths(params, is_leaf):
        if isinstance(node, LoraArray):
            forms.check(path, node, call)


def rounded(x: Array, dtype: DTypeLike) -> Array:
    """Round to a dtype; values outside the range of a float8 saturate."""
    if jnp.finfo(dtype).bits <= 8:
        x = jnp.clip(x, -float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).max))
    return x.astype(dtype)


def unmerge(merged: PyTree, params: PyTree) -> PyTree:
    """Subtract an adapter from merged weights: the base is `W' - s · A B`, in float32.

    For DoRA it is `W' · ‖W + s · A B‖ / m - s · A B`, with the norm computed from the base in
    `params`. An output with magnitude 0 has lost its weight and gets that base back. Because of
    rounding the result is close to the original base, not equal; `detach(params)` returns the
    original bit for bit.

    Args:
        merged: plain parameters from `merge`; they may have changed since.
        params: the adapted parameters to subtract. "full" parameters get their original back.

    Returns:
        Adapted parameters whose `merge` is `merged`.

    Raises:
        ValueError: the two trees have different paths; the base of a "full" parameter or of a DoRA
            node is missing; a base is a stored weight, which cannot be recovered from the sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach, merge
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bool((unmerge(merge(params), params)["w"].base == params["w"].base).all())
        True

    Reference: PEFT's `unmerge_adapter`.
    """
    call = "jlora.unmerge(merged, params)"
    check_tree(merged, call, "merged")
    same_paths(merged, params, call)
    for path, node in leaves_with_paths(merged, is_adapted):
        if is_adapted(node):
            raise ValueError(
                f"`{call}`: {describe(path, node)} in `merged` is adapted. Pass the plain weights "
                "of `jlora.merge` first, and the adapted ones second."
            )
    for path, node in leaves_with_paths(params, is_leaf):
        if isinstance(node, LoraArray) and is_stored(node.base):
            raise ValueError(
                f"`{call}`: the base of {describe(path, node)} is stored as "
                f"`{stored_as(node.base)}`, and subtracting the update from a merged weight "
                "does not recover what was stored. Detach the adapter instead: "
                "`base, adapter = jlora.detach(params)`."
            )
        full = isinstance(node, FullArray)
        gain = isinstance(node, LoraArray) and forms.has_gain(node)
        if (full or gain) and node.base is None:
            why = "is trained in full" if full else "has a magnitude, whose norm needs it"
            raise ValueError(
                f'`{call}`: `params` lacks the original of "{path}", which {why}. '
                "Pass the adapted parameters, `jlora.bind(base, adapter)`."
            )
    adapter = detach(params)[1]
    check_nodes(_bind(merged, adapter), "jlora.unmerge")

    def base(weight: PyTree, node: PyTree) -> PyTree:
        if isinstance(node, FullArray):
            return node.base
        if not isinstance(node, LoraArray):
            return weight
        return rounded(forms.base_of(weight, node), weight.dtype)

    nodes = dict(leaves_with_paths(params, is_leaf))
    return _bind(map_with_paths(lambda path, x: base(x, nodes[path]), merged, is_leaf), adapter)
