"""Parts shared by several weights: one array in the tree, and references to it elsewhere.

The shared array is a single leaf of the tied tree, so it is stored, trained, saved and donated
once. `untie` replaces each reference by the array. The gradient of the shared array is then the sum
of the gradients of its uses, by the chain rule.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import Geometry, LoraArray, Tied, is_adapted
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_mapping, check_tree
from jlora._paths import brief, describe, near_misses


def tie(params: PyTree, groups: Mapping[str, Sequence[str]]) -> PyTree:
    """Share parts of the update among all weights that match a pattern.

    Sharing A gives `W_k + s · A B_k`. The shared values are those of the largest weight; a smaller
    weight uses the leading part of them: the first inputs of A, the first outputs of B. The layers
    of a stack share the part as well.

    Args:
        params: adapted parameters, from `jlora.attach`.
        groups: mapping from a regular expression, which must match the full "/"-joined path of a
            weight, to the names of parts: "lora_a", "lora_b", and the shareable parts of a form.
            For VeRA: `{".*": ("lora_a", "lora_b")}`.

    Returns:
        A tree that contains each shared part once. `jlora.partition`, `jlora.freeze` and
        `jlora.checkpoint` accept it; for all other functions call `jlora.untie` first.

    Raises:
        ValueError: a pattern matches no adapted weight; a part is unknown or already tied; the
            weights differ in rank, dtype or frozen parts, or have slices.

    Example:
        >>> import jax
        >>> from jlora import LoraSpec, attach, summary
        >>> params = {"q": jnp.ones((4, 6)), "k": jnp.ones((4, 2))}
        >>> params = attach(params, {".*": LoraSpec(rank=2)}, key=jax.random.key(0))
        >>> tied = tie(params, {"q|k": ("lora_a",)})  # 8 elements
        >>> summary(params)[:20], summary(tied)[:20]
        ('trainable params: 32', 'trainable params: 24')
        >>> tied["q"].lora_a
        Tied(owner='k')
        >>> untie(tied)["q"].lora_a is tied["k"].lora_a
        True

    References: Kopiczko et al. 2023, arXiv:2310.11454, section 3.1, for VeRA's A and B, PEFT's
    `vera_A` and `vera_B`.
    """
    call = "jlora.tie(params, groups)"
    check_tree(params, call)
    check_mapping(groups, call, '{".*": ("lora_a",)}')
    nodes = {p: x for p, x in leaves_with_paths(params, is_adapted) if isinstance(x, LoraArray)}
    for path, node in nodes.items():
        forms.check(path, node, call)
    moved = dict(nodes)
    for pattern, parts in groups.items():
        if isinstance(parts, str) or not isinstance(parts, Sequence):
            raise TypeError(
                f'`{call}`: "{pattern}" has {brief(parts)}. Give the names of parts in a tuple, '
                'such as `("lora_a",)`.'
            )
        found = [path for path in nodes if re.fullmatch(pattern, path, re.DOTALL)]
        if not found:
            raise ValueError(
                f'`{call}`: "{pattern}" matches no adapted weight. Patterns are regular '
                f"expressions that must match the full path. {near_misses(pattern, nodes)}"
            )
        for part in parts:
            _refuse(part, {path: (nodes[path].rank, moved[path]) for path in found}, call)
            owner = max(found, key=lambda path: _width(nodes[path], part))  # the first of them
            shared = _first(nodes[owner], part)
            for path in found:
                value: Any = shared if path == owner else Tied(owner)
                moved[path] = moved[path].with_parts({part: value})
    return _put(params, moved)


def untie(params: PyTree) -> PyTree:
    """Replace references to shared parts by the arrays, as other functions require.

    Call it inside the function that is differentiated: the gradient of a shared part is then the
    sum of the gradients of its uses.

    Args:
        params: what `jlora.tie` returned, with its base weights; any other tree is returned
            unchanged.

    Returns:
        A tree of `LoraArray` nodes that have all their parts.

    Raises:
        ValueError: the owner of a shared part is not in the tree, or a base is missing.

    Example:
        >>> import jax
        >>> from jlora import LoraSpec, attach, lora
        >>> params = {"q": jnp.ones((4, 6)), "k": jnp.ones((4, 2))}
        >>> params = attach(params, {".*": LoraSpec(rank=2)}, key=jax.random.key(0))
        >>> tied = tie(params, {"q|k": ("lora_a",)})
        >>> apply = lora(lambda p, x: (x @ p["q"], x @ p["k"]))
        >>> [y.shape for y in jax.jit(lambda p, x: apply(untie(p), x))(tied, jnp.ones((3, 4)))]
        [(3, 6), (3, 2)]
    """
    call = "jlora.untie(params)"
    check_tree(params, call)
    nodes = {p: x for p, x in leaves_with_paths(params, is_adapted) if isinstance(x, LoraArray)}

    def resolved(path: str, node: LoraArray, part: str) -> Any:
        value, source = node.parts[part], node
        if isinstance(value, Tied):
            owner, source = value.owner, nodes.get(value.owner)
            value = None if source is None else source.parts.get(part)
            if source is None or value is None or isinstance(value, Tied):
                raise ValueError(
                    f'`{call}`: the {part} of "{path}" is that of "{owner}", which has none here. '
                    f"Pass the full tree that `jlora.tie` returned. {near_misses(owner, nodes)}"
                )
            if node.base is None or source.base is None:
                raise ValueError(
                    f'`{call}`: the base of "{path}" or of "{owner}", which defines the shape of '
                    f"their {part}, is missing. Put it back first: `jlora.bind(base, adapter)` "
                    "or `jlora.combine(trainable, frozen)`."
                )
        return value if value is None or node.base is None else _leading(value, part, source, node)

    moved = {}
    for path, node in nodes.items():
        shared = [part for part in node.parts if part in forms.shareable()]
        moved[path] = node.with_parts({part: resolved(path, node, part) for part in shared})
    return _put(params, moved)


def _refuse(part: str, found: Mapping[str, tuple[int, LoraArray]], call: str) -> None:
    """Refuse a part that these weights, given with their ranks, cannot share."""
    if part not in forms.shareable():
        raise ValueError(
            f"`{call}`: {brief(part)} cannot be shared; give names among "
            + ", ".join(f'"{p}"' for p in forms.shareable())
            + "."
        )
    kinds = {}
    for path, (rank, node) in found.items():
        if node.slices is not None:
            raise ValueError(
                f"`{call}`: {describe(path, node.base)} is adapted on slices of its outputs, each "
                "with its own A and B. Exclude it from the pattern."
            )
        value = node.parts.get(part)
        if isinstance(value, Tied) or value is None:
            why = "has none" if value is None else f'shares that of "{value.owner}" already'
            raise ValueError(
                f'`{call}`: the {part} of "{path}" cannot be shared: it {why}. Narrow the pattern.'
            )
        known = forms.parts(node)[part]
        kinds.setdefault((value.dtype, rank, known.frozen, known.axes), path)
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise ValueError(
            f'`{call}`: the {part} of "{one}" and of "{other}" differ in rank, dtype, form or in '
            "whether they train. Give both the same `jlora.LoraSpec`, or one pattern each."
        )


def _width(node: LoraArray, part: str) -> int:
    """Return the number of inputs or outputs of a part; 1 if its only axis is the rank."""
    return math.prod(_matrix(node, part))


def _matrix(node: LoraArray, part: str, rank: int = 1) -> tuple[int, ...]:
    """Return a part's shape for one stack element, with inputs and outputs flattened."""
    geometry = Geometry.of(node.shape, node.layout)
    flat = Geometry((), (geometry.fan_in,), (geometry.fan_out,), "io")
    return flat.along(forms.parts(node)[part].axes, flat.shape, rank)


def _first(node: LoraArray, part: str) -> Array:
    """Return a part of the first layer of a stack, keeping the stack axes with size 1."""
    stack = Geometry.of(node.shape, node.layout).stack
    return node.parts[part][(slice(0, 1),) * len(stack)]


def _leading(value: Array, part: str, source: LoraArray, node: LoraArray) -> Array:
    """Return the leading part of a shared array that a node uses, broadcast over its stack."""
    stack = Geometry.of(node.shape, node.layout).stack
    if source is node and value.shape[: len(stack)] == stack:
        return value
    axes, to = forms.parts(node)[part].axes, Geometry.of(node.shape, node.layout)
    rank = value.shape[-1 if axes.endswith("r") else len(source.shape) - len(source.layout)]
    dims = dataclasses.replace(to, stack=()).along(axes, to.shape[len(stack) :], rank)
    if value.shape == (*stack, *dims):
        return value  # without a copy
    own = value.reshape(-1, *_matrix(source, part, rank))
    own = own[(slice(None), *(slice(n) for n in _matrix(node, part, rank)))]
    return jnp.broadcast_to(own.reshape(*(1,) * len(stack), *dims), (*stack, *dims))


def _put(params: PyTree, nodes: Mapping[str, LoraArray]) -> PyTree:
    return map_with_paths(lambda path, x: nodes.get(path, x), params, is_adapted)
