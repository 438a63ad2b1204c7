"""What the initial values that are read from data have in common.

They are functions of a tree that `jlora.attach` made, so that layouts, ranks and stacks are known:
each weight is arranged as `(in, out)`, one per stack element and slice, and arranged back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import Geometry, LoraArray, is_adapted
from jlora._moments import Moments
from jlora._paths import describe, leaves_with_paths, map_with_paths, near_misses


def known(x: Any) -> bool:
    """Whether an array's values can be read: not while it is being traced."""
    try:
        np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return False
    return True


def adapted(params: PyTree, call: str) -> dict[str, LoraArray]:
    """Return the nodes by path; refuse what no first A and B can be given to."""
    nodes = {
        path: x for path, x in leaves_with_paths(params, is_adapted) if isinstance(x, LoraArray)
    }
    if not nodes:
        raise ValueError(
            f"`{call}`: there is no LoraArray in `params`. Put the adapter on first: "
            "`params = jlora.attach(params, rules, key=key)`."
        )
    for path, node in nodes.items():
        forms.check(path, node, call)
        if not forms.of(node).is_product:
            raise ValueError(
                f"`{call}`: something stands between A and B of {describe(path, node)}, and it is "
                'zero at first, whatever they are. Attach with `LoraSpec(form="lora")`.'
            )
        if node.residual:
            raise ValueError(
                f"`{call}`: the base of {describe(path, node)} is not the model's own weight but "
                "what an initializer left of it. Attach with another one: `LoraSpec(init=jlora."
                "initializers.kaiming)`."
            )
    return nodes


def given(nodes: dict[str, LoraArray], tree: PyTree, call: str, name: str) -> dict[str, Any]:
    """Return what a tree has for each node; refuse one of another structure."""
    is_leaf = lambda x: isinstance(x, Moments)
    found = dict(leaves_with_paths(tree, is_leaf))
    for path, node in nodes.items():
        if path not in found:
            raise ValueError(
                f"`{call}`: `{name}` has nothing for {describe(path, node)}. "
                f"{near_misses(path, found)} It must be a tree like `params`."
            )
    return {path: found[path] for path in nodes}


def moments_of(
    nodes: dict[str, LoraArray], tree: PyTree, call: str, least: int
) -> dict[str, Moments]:
    """Return each node's moments; refuse other shapes, and fewer inputs than rank + `least`."""
    found = given(nodes, tree, call, "moments")
    for path, node in nodes.items():
        geometry, moments = Geometry.of(node.shape, node.layout), found[path]
        want = (*geometry.stack, geometry.fan_in, geometry.fan_in)
        got = getattr(getattr(moments, "second", None), "shape", None)
        if got != want:
            raise ValueError(
                f"`{call}`: {describe(path, node)} with layout {node.layout!r} needs moments whose "
                f"`second` is {want}; got {got}. Give what `jlora.capture(fn, params, ...)` "
                "returned for these `params`."
            )
        if known(moments.second) and not jnp.isfinite(moments.second).all():
            raise ValueError(
                f"`{call}`: the moments of {describe(path, node)} are not finite: its inputs have "
                "NaN or infinity, or their squares overflow. Look at the data and at the base."
            )
        if known(moments.count) and (moments.count < node.rank + least).any():
            raise ValueError(
                f"`{call}`: rank {node.rank} of {describe(path, node)} needs at least "
                f"{node.rank + least} inputs; {moments.count.min():.0f} were seen"
                f"{' by one of its stack' if geometry.stack else ''}. Add batches up: "
                "`jax.tree.map(jnp.add, one, other)`, or take a lower rank."
            )
    return found


def replaced(params: PyTree, nodes: dict[str, Any]) -> PyTree:
    """Put new nodes where those of their paths stand."""

    return map_with_paths(lambda path, leaf: nodes.get(path, leaf), params, is_adapted)


def split(
    node: LoraArray, data: Array, init: Callable[..., tuple[Array, Array, Array]], by_output: bool
) -> LoraArray:
    """Take the start out of the weight: `init(weight, data, scaling) -> A, B, residual`.

    Args:
        node: whose base is split.
        data: `(*stack, in, ...)`.
        init: of one `(in, out)` weight.
        by_output: whether the last axis of `data` is the weight's outputs.
    """
    geometry = Geometry.of(node.shape, node.layout)
    per = geometry.fan_out // geometry.out_dims[0]

    def run(matrix: Array, data: Array, scaling: Array) -> tuple[Array, Array, Array]:
        pairs = []
        for start, stop in node.slices or ((0, geometry.out_dims[0]),):
            some = slice(start * per, stop * per)
            *pair, rest = init(matrix[:, some], data[:, some] if by_output else data, scaling)
            matrix = matrix.at[:, some].set(rest)
            pairs.append(pair)
        a, b = (jnp.concatenate(factors, axis=1) for factors in zip(*pairs, strict=True))
        return a, b, matrix

    for _ in geometry.stack:
        run = jax.vmap(run)
    scaling = jnp.broadcast_to(jnp.asarray(node.scaling), geometry.stack)
    a, b, rest = run(geometry.to_matrix(node.base), data, scaling)
    return dataclasses.replace(
        node,
        base=geometry.from_matrix(rest),
        lora_a=a.reshape(node.lora_a.shape).astype(node.lora_a.dtype),
        lora_b=b.reshape(node.lora_b.shape).astype(node.lora_b.dtype),
        residual=True,
    )
