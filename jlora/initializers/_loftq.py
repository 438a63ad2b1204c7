"""LoftQ: A and B that make up for the error of a quantized base."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import Geometry, LoraArray, is_adapted, is_leaf
from jlora._base import built, is_stored, stored_as
from jlora._boxes import leaves_with_paths
from jlora._paths import brief, describe, near_misses
from jlora._stacks import at_once, is_split, layer_by_layer
from jlora.forms._singular import singular
from jlora.initializers._data import concrete, lora_nodes, replaced, sharding_of, without_shardings
from jlora.initializers._decomposed import share
from jlora.quant import QuantArray
from jlora.quant._quantize import quantized


def loftq(params: PyTree, base: PyTree, steps: int = 1) -> PyTree:
    """Start A and B at the error of a quantized base, so that `Q + s·A·B` is close to W.

    For each weight, alternate `Q = quantize(W - s·A·B)` and `s·A·B = the largest singular values of
    W - Q`, beginning with A·B = 0; ‖W - Q - s·A·B‖ is less than ‖W - Q‖ for the Q of `params`. With
    `steps=1` the codes are those of `params`. More steps choose other codes, so restoring the
    adapter needs the base that this returns, as after `pissa`: such nodes are `residual`.

    Args:
        params: adapted parameters over a quantized base: `jlora.attach(jlora.quantize(base, rules),
            ...)`. Nodes over arrays are returned as they are.
        base: the weights before `jlora.quantize`.
        steps: the number of alternations, at least 1.

    Returns:
        Parameters like `params`, with other A and B and, with more than one step, other codes.

    Raises:
        ValueError: no adapted weight is quantized; a weight has another shape in `base`, or is in a
            format that is only read; `steps` is below 1; a form whose update is no product A·B, or
            with slices; an alpha of 0.
        KeyError: `base` lacks a weight.

    Example:
        >>> import jlora
        >>> base = {"w": jax.random.normal(jax.random.key(0), (64, 48))}
        >>> params = jlora.quantize(base, {"w": "nf4"})
        >>> params = jlora.attach(params, {"w": jlora.LoraSpec(8)}, key=jax.random.key(1))
        >>> error = lambda p: float(jnp.linalg.norm(jlora.merge(p)["w"] - base["w"]))
        >>> error(loftq(params, base)) < 0.9 * error(params)
        True

    Reference: Li et al. 2023, arXiv:2310.08659, algorithm 1. PEFT's `LoftQConfig` and
    `init_lora_weights="loftq"`.
    """
    call = "jlora.initializers.loftq(params, base)"
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`{call}`: `steps` is {brief(steps)}. Give an integer of at least 1.")
    nodes = {p: x for p, x in lora_nodes(params, call).items() if is_stored(x.base)}
    if not nodes:
        raise ValueError(
            f"`{call}`: no adapted weight in `params` is quantized. Quantize the base first: "
            '`params = jlora.attach(jlora.quantize(base, {r".*/kernel": "nf4"}), rules, key=key)`.'
        )
    known = dict(leaves_with_paths(base, is_leaf))
    for path, node in nodes.items():
        _check(path, node, known, steps, call)
    return replaced(params, {p: _of(p, x, known[p], steps, call) for p, x in nodes.items()})


def _check(path: str, node: LoraArray, known: dict[str, PyTree], steps: int, call: str) -> None:
    """Refuse a node that cannot make up for an error."""
    if path not in known:
        raise KeyError(f'`{call}`: `base` has no "{path}". {near_misses(path, known)}')
    weight = known[path]
    if is_adapted(weight) or is_stored(weight) or weight.shape != node.shape:
        raise ValueError(
            f"`{call}`: {describe(path, weight)} in `base` is not the array that was quantized to "
            f"{describe(path, node)}. Pass the weights before `jlora.quantize`."
        )
    if node.slices is not None:
        raise ValueError(
            f"`{call}`: {describe(path, node)} has an update for some of its outputs only. Attach "
            "without `slices`, or leave this weight dense."
        )
    if concrete(node.scaling) and not (jnp.asarray(node.scaling) > 0).all():
        raise ValueError(
            f"`{call}`: s of {describe(path, node)} is not above 0, so A B cannot make up for the "
            "error. Give an alpha above 0."
        )
    readable = not isinstance(node.base, QuantArray) or (
        getattr(node.base.format, "write", node.base) is None
    )
    if steps > 1 and readable:
        raise ValueError(
            f"`{call}`: {describe(path, node)} is stored as {stored_as(node.base)}, which jlora "
            "reads but does not write, so it cannot choose other codes. Use `steps=1`."
        )


def _of(path: str, node: LoraArray, weight: Array, steps: int, call: str) -> LoraArray:
    """Initialize one node."""
    base = node.base
    depth = len(node.shape) - len(node.layout)
    sharding = sharding_of(weight)
    how = node.layout, node.rank, is_split(sharding, depth)

    def split(base: PyTree, more: bool) -> Any:
        run = lambda *args: _split(*args, *how, more)
        return without_shardings(run, sharding, 2, weight, base, node.scaling)

    a, b, update = split(base, steps > 1)
    for k in range(steps - 1):
        rest = weight.astype(jnp.float32) - update
        base = quantized(path, rest, base.format, base.layout, call)
        base = dataclasses.replace(base, kind=node.base.kind)
        a, b, update = split(base, k < steps - 2)
    made = dataclasses.replace(
        node,
        base=base,
        lora_a=a.reshape(node.lora_a.shape).astype(node.lora_a.dtype),
        lora_b=b.reshape(node.lora_b.shape).astype(node.lora_b.dtype),
        residual=steps > 1,
    )
    return forms.begun(made, True, node.lora_a.dtype) if forms.has_gain(node) else made


@functools.partial(jax.jit, static_argnames=("layout", "rank", "together", "more"))
def _split(
    weight: Array,
    base: PyTree,
    scaling: Array,
    layout: str,
    rank: int,
    together: bool,
    more: bool,
) -> tuple[Array, Array, Array | None]:
    """Return A and B as matrices, with `s·A·B` the largest part of W - Q; if `more`, also s·A·B."""
    geometry = Geometry.of(weight.shape, layout)
    one, depth = dataclasses.replace(geometry, stack=()), len(geometry.stack)
    scaling = jnp.broadcast_to(jnp.asarray(scaling, jnp.float32), geometry.stack)

    def run(weight: Array, base: PyTree, s: Array) -> tuple[Array, Array, Array | None]:
        error = weight.astype(jnp.float32) - built(base).astype(jnp.float32)
        matrix = one.to_matrix(error)
        a, b, rest = share(matrix, *singular(matrix, slice(rank)), s, jnp.float32)
        return a, b, one.from_matrix(matrix - rest) if more else None

    apart = getattr(base, "stack", 0) >= depth
    over = at_once if together else layer_by_layer
    return over(run, depth)(weight, base if apart else built(base), scaling)
