"""Weighted updates of one weight: `Σ wᵢ · sᵢ Aᵢ Bᵢ` by concatenated factors, and what reads them.

Independent of how the weights wᵢ were chosen.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora import _compat, forms
from jlora._adapt import detach, same_paths
from jlora._adapters import check_adapters, is_slot, nodes_of, shape_of
from jlora._arrays import Adapted, FullArray, LoraArray, accumulator
from jlora._base import built
from jlora._boxes import leaves_with_paths, map_with_paths, unboxed
from jlora._check_values import check_number
from jlora._paths import brief, describe


class Term(NamedTuple):
    """One adapter's update of a weight, and what it is multiplied by."""

    by: ArrayLike
    node: Any


def read(adapters: Sequence[PyTree], call: str) -> tuple[PyTree, list[dict[str, Adapted]]]:
    """Return the structure of all adapters and the nodes of each, by path, with their bases."""
    check_adapters(adapters, call)
    likes = [unboxed(detach(adapter)[1]) for adapter in adapters]
    for n, like in enumerate(likes):
        same_paths(likes[0], like, f"{call}, adapters[0] and adapters[{n}]")
    said = [f"{call}, adapters[{n}]" if len(adapters) > 1 else call for n in range(len(adapters))]
    nodes = [nodes_of(unboxed(x), one) for x, one in zip(adapters, said, strict=True)]
    return likes[0], nodes


def each_path(
    like: PyTree, nodes: Sequence[Mapping[str, Adapted]], make: Callable[[str, list[int]], Any]
) -> PyTree:
    """Return an adapter: `make(path, which adapters have it)` for each adapted path."""
    made = {}
    for path, _ in leaves_with_paths(like, is_slot):
        having = [n for n, of in enumerate(nodes) if path in of]
        if having:
            made[path] = make(path, having)
    return map_with_paths(lambda path, _: made.get(path), like, is_slot)


def weights_of(weights: Any, count: int, call: str) -> list[Any]:
    """Return one finite number per adapter; traced weights are not checked for being finite."""
    try:
        each = [weights[n] for n in range(len(weights))]
        for w in each:
            check_number(w, call, "weights")
        numbers = not isinstance(weights, Mapping)
    except (TypeError, KeyError):
        each, numbers = [], False
    if len(each) != count or not numbers:
        raise ValueError(
            f"`{call}`: weights={brief(weights)} for {count} adapters. Pass one number for each."
        )
    most = float(jnp.finfo(jnp.float32).max)
    if any(not _compat.is_traced(w) and not abs(float(w)) <= most for w in each):
        raise ValueError(
            f"`{call}`: weights={brief(weights)}; every weight must be finite in float32."
        )
    return each


def is_one(w: ArrayLike) -> bool:
    """Whether a weight is known to be exactly 1; a traced one is not."""
    return not _compat.is_traced(w) and jnp.shape(w) == () and float(jnp.asarray(w)) == 1.0


def weighted(path: str, terms: Sequence[Term], call: str) -> Adapted:
    """Return one node, without its base, that adds `Σ wᵢ · Δᵢ` to a weight."""
    if len(terms) == 1 and is_one(terms[0].by):
        return dataclasses.replace(terms[0].node, base=None)
    refuse_gain(path, terms, call)
    if any(isinstance(term.node, FullArray) for term in terms):
        return _full(path, terms, call)
    if len(terms) == 1:  # keeps rank, form and slices
        by, node = terms[0]
        s = jnp.asarray(node.scaling)
        return dataclasses.replace(node, base=None, scaling=s * jnp.asarray(by, s.dtype))
    return _concatenated(path, terms, call)


def refuse_gain(path: str, terms: Sequence[Term], call: str) -> None:
    """Refuse DoRA: its update is not A B."""
    for _, node in terms:
        if isinstance(node, LoraArray) and forms.has_gain(node):
            raise ValueError(
                f'`{call}`: "{path}" has a magnitude (DoRA), so its update is not A B alone: '
                "m · (W + s A B) / ‖W + s A B‖ - W has full rank and depends on W. It can only be "
                "kept as it is, with the weight 1 and as the one adapter of this parameter. Make "
                "LoRA of it first: `jlora.arithmetic.extract(jlora.merge(params), base, rules)`."
            )


def shape_among(path: str, nodes: Sequence[Any], call: str) -> tuple[int, ...]:
    """Return the shape of a weight that several nodes update; refuse nodes of different weights."""
    loras = [x for x in nodes if isinstance(x, LoraArray)]
    shapes = [tuple(x.shape) for x in nodes if isinstance(x, FullArray)]
    shapes += [shape_of(x) for x in loras if x.base is not None or x.slices is None]
    if not shapes:
        raise ValueError(
            f'`{call}`: "{path}" is adapted on some slices of its outputs, and how many outputs '
            "there are only its base tells. Pass adapted parameters, `jlora.bind(base, adapter)`."
        )
    layouts = {x.layout for x in loras}
    if len(set(shapes)) > 1 or len(layouts) > 1:
        raise ValueError(
            f'`{call}`: "{path}" has the shapes {sorted(set(shapes))} and the layouts '
            f"{sorted(layouts)}. The adapters belong to different models, or read a weight "
            "differently: attach both with the same `layouts=`."
        )
    return shapes[0]


def _full(path: str, terms: Sequence[Term], call: str) -> FullArray:
    """Return `W + Σ wᵢ (Vᵢ - Wᵢ)`, rounded once; with updates `sᵢ Aᵢ Bᵢ` too, where some are."""
    shape = shape_among(path, [term.node for term in terms], call)
    fulls = [term.node for term in terms if isinstance(term.node, FullArray)]
    for node in fulls:
        check_original(path, node, call)
    dtype = max((x.value.dtype for x in fulls), key=lambda d: jnp.finfo(d).bits)
    wide = accumulator(dtype)
    originals = [built(x.base).astype(wide) for x in fulls]
    bys = [_spread(t.by, len(shape), wide) for t in terms if isinstance(t.node, FullArray)]
    # W less the originals first: with one weight of 1 what is left is the value itself, exactly.
    total = originals[0] - sum(w * o for w, o in zip(bys, originals, strict=True))
    total = total + sum(w * x.value.astype(wide) for w, x in zip(bys, fulls, strict=True))
    for by, node in terms:
        if isinstance(node, LoraArray):
            delta = forms.delta(node, shape, wide).astype(wide)
            total = total + _spread(by, len(shape), wide) * delta
    return FullArray(None, total.astype(dtype))


def _spread(by: ArrayLike, ndim: int, dtype: Any) -> Array:
    """Return a number, or one per stack element, with the axes of the weight."""
    x = jnp.asarray(by, dtype)
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def check_original(path: str, node: FullArray, call: str) -> None:
    """Refuse a parameter trained in full without its original."""
    if node.base is None:
        raise ValueError(
            f"`{call}`: {describe(path, node.value)} is trained in full, and its difference from "
            "the original is what counts, which a detached adapter lacks. Pass adapted "
            "parameters, `jlora.bind(base, adapter)`."
        )


def _concatenated(path: str, terms: Sequence[Term], call: str) -> LoraArray:
    """Return `[A₁, A₂, …] [w₁ s₁ B₁; w₂ s₂ B₂; …]`, per slice where all have the same slices."""
    nodes = [term.node for term in terms]
    alike = all(forms.of(x).is_product and x.slices == nodes[0].slices for x in nodes)
    if alike and nodes[0].slices is not None:
        _same_sides(path, nodes, call)
    else:
        shape = shape_among(path, nodes, call)
        nodes = [forms.as_lora(x, shape) for x in nodes]
    first = nodes[0]
    wide = accumulator(max((_dtype(x) for x in nodes), key=lambda d: jnp.finfo(d).bits))
    parts = 1 if first.slices is None else len(first.slices)
    axis = first.lora_b.ndim - first.layout.count("o") - 1

    def per_slice(a: Array) -> Array:
        return jnp.asarray(a).astype(wide).reshape(*a.shape[:-1], parts, -1)

    a = jnp.concatenate([per_slice(x.lora_a) for x in nodes], -1)
    b = [_times(x, by, wide) for x, (by, _) in zip(nodes, terms, strict=True)]
    return LoraArray(
        None,
        a.reshape(*a.shape[:-2], -1),
        jnp.concatenate(b, axis),
        jnp.ones(first.lora_b.shape[:axis], jnp.float32),
        first.layout,
        first.slices,
    )


def _dtype(node: LoraArray) -> Any:
    return max((node.lora_a.dtype, node.lora_b.dtype), key=lambda d: jnp.finfo(d).bits)


def _times(node: LoraArray, by: ArrayLike, dtype: Any) -> Array:
    """Return `w · s · B`."""
    s = jnp.asarray(node.scaling).astype(dtype) * jnp.asarray(by, dtype)
    b = jnp.asarray(node.lora_b).astype(dtype)
    return b * _spread(s, b.ndim, dtype)


def _same_sides(path: str, nodes: Sequence[LoraArray], call: str) -> None:
    """Refuse sliced updates of different weights."""

    def sides(x: LoraArray) -> tuple[Any, ...]:
        stack = x.lora_b.ndim - x.layout.count("o") - 1
        outs = x.lora_b.shape[stack + 1 :]
        return x.layout, x.lora_a.shape[:-1], x.lora_b.shape[:stack], outs

    found = list(dict.fromkeys(map(sides, nodes)))
    if len(found) > 1:
        raise ValueError(
            f'`{call}`: the adapters disagree on "{path}": layout, shape of A, stack and outputs '
            f"are {found[0]} and {found[1]}. They belong to different models."
        )


def matrices(node: LoraArray) -> list[tuple[Array, Array]]:
    """Return `(A, s B)` as `(*stack, in, r)` and `(*stack, r, out)`, one pair per slice."""
    if not forms.of(node).is_product:
        node = forms.as_lora(node, shape_of(node))
    wide = accumulator(_dtype(node))
    ins, outs = node.layout.count("i"), node.layout.count("o")
    stack = node.lora_a.shape[: node.lora_a.ndim - ins - 1]
    fan_in = math.prod(node.lora_a.shape[len(stack) : -1])
    a = jnp.asarray(node.lora_a).astype(wide).reshape(*stack, fan_in, -1)
    b = _times(node, 1.0, wide)
    if node.slices is None:
        return [(a, b.reshape(*stack, a.shape[-1], -1))]
    pairs, first, rank = [], 0, node.rank
    per = math.prod(b.shape[b.ndim - outs + 1 :])
    b = b.reshape(*stack, rank, -1)
    for k, (start, stop) in enumerate(node.slices):
        width = (stop - start) * per
        pairs.append((a[..., k * rank : (k + 1) * rank], b[..., first : first + width]))
        first += width
    return pairs
