"""Parts that several weights share: one array in the tree, and references to it elsewhere.

A tied tree is a pytree like any other: the shared array is one leaf, so it is stored, trained,
saved and donated once. `untie` writes it out where it is used, and its gradient is the sum of its
uses' because that is what the gradient of writing it out is.
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
from jlora._paths import describe, leaves_with_paths, map_with_paths, near_misses


def tie(params: PyTree, groups: Mapping[str, Sequence[str]]) -> PyTree:
    """Let all weights that a pattern matches share a part of their updates.

    `W_k + s · A B_k`, or what else is asked for. The largest weight's values stay, and a smaller
    weight takes the leading part of them: its first inputs of A, its first outputs of B. The
    layers of a stack share as well.

    Args:
        params: adapted parameters, from `jlora.attach`.
        groups: from a regular expression, matched whole against the "/"-joined path of a weight, to
            the names of parts: "lora_a", "lora_b", and those of a form that can be shared. VeRA:
            `{".*": ("lora_a", "lora_b")}`.

    Returns:
        A tree whose shared parts are there once. `jlora.partition`, `jlora.freeze` and
        `jlora.checkpoint` take it as it is; everything else takes `jlora.untie` of it.

    Raises:
        ValueError: a pattern that matches no adapted weight, an unknown part, a part that is tied
            already; weights of several ranks, dtypes, or choices of what is frozen, or with slices.

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
    nodes = {p: x for p, x in leaves_with_paths(params, is_adapted) if isinstance(x, LoraArray)}
    for path, node in nodes.items():
        forms.check(path, node, call)
    moved = dict(nodes)
    for pattern, parts in groups.items():
        found = [path for path in nodes if re.fullmatch(pattern, path)]
        if not found:
            raise ValueError(
                f'`{call}`: "{pattern}" matches no adapted weight. Patterns are regular '
                f"expressions that match a whole path. {near_misses(pattern, nodes)}"
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
    """Write shared parts out where they are used: what the other functions take.

    Inside the function that is differentiated, so that a shared part's gradient is the sum of its
    uses'.

    Args:
        params: what `jlora.tie` returned, its base weights in place; any other tree comes back as
            it is.

    Returns:
        A tree of `LoraArray` nodes that have all their parts.

    Raises:
        ValueError: a weight whose part is another's that is not in the tree, or whose base is out.

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
    nodes = {p: x for p, x in leaves_with_paths(params, is_adapted) if isinstance(x, LoraArray)}

    def written_out(path: str, node: LoraArray, part: str) -> Any:
        value, source = node.parts[part], node
        if isinstance(value, Tied):
            owner, source = value.owner, nodes.get(value.owner)
            value = None if source is None else source.parts.get(part)
            if source is None or value is None or isinstance(value, Tied):
                raise ValueError(
                    f'`{call}`: the {part} of "{path}" is that of "{owner}", which has none here. '
                    f"Give the whole tree that `jlora.tie` returned. {near_misses(owner, nodes)}"
                )
            if node.base is None or source.base is None:
                raise ValueError(
                    f'`{call}`: the base of "{path}" or of "{owner}", which says how long their '
                    f"{part} is, is taken out. Put it together first: `jlora.bind(base, adapter)` "
                    "or `jlora.combine(trainable, frozen)`."
                )
        return value if value is None or node.base is None else _leading(value, part, source, node)

    moved = {}
    for path, node in nodes.items():
        shared = [part for part in node.parts if part in forms.shareable()]
        moved[path] = node.with_parts({part: written_out(path, node, part) for part in shared})
    return _put(params, moved)


def _refuse(part: str, found: Mapping[str, tuple[int, LoraArray]], call: str) -> None:
    """Refuse a part that these weights, of known ranks, cannot share."""
    if part not in forms.shareable():
        raise ValueError(
            f"`{call}`: {part!r} cannot be shared; give names among "
            + ", ".join(f'"{p}"' for p in forms.shareable())
            + "."
        )
    kinds = {}
    for path, (rank, node) in found.items():
        if node.slices is not None:
            raise ValueError(
                f"`{call}`: {describe(path, node.base)} is adapted on slices of its outputs, each "
                "with an A and B of its own. Leave it out of the pattern."
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
            "whether they train. Give both the same `jlora.LoraSpec`, or a pattern each."
        )


def _width(node: LoraArray, part: str) -> int:
    """Return how many inputs or outputs a part has; 1 where it has the rank alone."""
    return math.prod(_matrix(node, part))


def _matrix(node: LoraArray, part: str, rank: int = 1) -> tuple[int, ...]:
    """Return a part's shape for one element of the stack, its inputs and its outputs in one."""
    geometry = Geometry.of(node.shape, node.layout)
    flat = Geometry((), (geometry.fan_in,), (geometry.fan_out,), "io")
    return flat.along(forms.parts(node)[part].axes, flat.shape, rank)


def _first(node: LoraArray, part: str) -> Array:
    """Return a part of the first layer of a stack, with as many axes as the stack has."""
    stack = Geometry.of(node.shape, node.layout).stack
    return node.parts[part][(slice(0, 1),) * len(stack)]


def _leading(value: Array, part: str, source: LoraArray, node: LoraArray) -> Array:
    """Return the leading part of a shared array that a node asks for, the same for its stack."""
    stack = Geometry.of(node.shape, node.layout).stack
    if source is node and value.shape[: len(stack)] == stack:
        return value
    axes, to = forms.parts(node)[part].axes, Geometry.of(node.shape, node.layout)
    rank = value.shape[-1 if axes.endswith("r") else len(source.shape) - len(source.layout)]
    dims = dataclasses.replace(to, stack=()).along(axes, to.shape[len(stack) :], rank)
    if value.shape == (*stack, *dims):
        return value  # the very array
    own = value.reshape(-1, *_matrix(source, part, rank))
    own = own[(slice(None), *(slice(n) for n in _matrix(node, part, rank)))]
    return jnp.broadcast_to(own.reshape(*(1,) * len(stack), *dims), (*stack, *dims))


def _put(params: PyTree, nodes: Mapping[str, LoraArray]) -> PyTree:
    return map_with_paths(lambda path, x: nodes.get(path, x), params, is_adapted)
