"""Arithmetic of adapters: exact, by factors side by side, never through a dense delta."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora._adapt import bind, detach
from jlora._arrays import LoraArray, Tied, is_adapted
from jlora._paths import describe, leaves_with_paths, map_with_paths


def residual_to_lora(params: PyTree, initial: PyTree, base: PyTree) -> PyTree:
    """Turn what was trained over a residual into plain LoRA of rank 2r on the original weights.

    `W_res + s A B = W + s A B - s₀ A₀ B₀ = W + s₀ [A, A₀] [(s/s₀) B; -B₀]`

    Args:
        params: trained parameters, or their adapter from `jlora.detach`.
        initial: what the training began with, from `jlora.attach` (or `corda`, `lora_ga`), or its
            adapter.
        base: the original weights, what `jlora.attach` was given.

    Returns:
        `base` with the adapter on it. Nodes that are not `residual` keep their A and B; the base
        weights are the very arrays that were given. In float32 it differs from `params` by
        rounding; where W is bfloat16, by the one rounding of the residual as well.

    Raises:
        ValueError: nothing is a residual; a node of `initial` is not what the one of `params`
            began as; `base` has other paths.

    Example:
        >>> import jax
        >>> from jlora import LoraSpec, attach, initializers, merge
        >>> base = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
        >>> spec = LoraSpec(rank=2, init=initializers.pissa)
        >>> initial = attach(base, {"w": spec}, key=jax.random.key(1))
        >>> plain = residual_to_lora(initial, initial, base)  # as if nothing had been learned
        >>> plain["w"].rank, bool(jnp.allclose(merge(plain)["w"], base["w"], atol=1e-6))
        (4, True)

    Reference: Meng et al. 2024, arXiv:2404.02948, the conversion of PiSSA to LoRA. PEFT's
    `save_pretrained(..., path_initial_model_for_weight_conversion=...)`.
    """
    call = "jlora.arithmetic.residual_to_lora(params, initial, base)"
    begun = dict(leaves_with_paths(initial, is_adapted))
    adapter = detach(params)[1]
    moved = {
        path: _difference(node, _begun(path, node, begun.get(path), call))
        for path, node in leaves_with_paths(adapter, is_adapted)
        if isinstance(node, LoraArray) and node.residual
    }
    if not moved:
        raise ValueError(
            f"`{call}`: nothing in `params` stands over a residual, so there is nothing to "
            "convert: it is plain LoRA already."
        )

    is_leaf = lambda x: x is None or is_adapted(x)
    return bind(base, map_with_paths(lambda path, x: moved.get(path, x), adapter, is_leaf))


def _begun(path: str, node: LoraArray, first: Any, call: str) -> LoraArray:
    """Return the initial node; refuse one that the trained one cannot have begun as."""

    def kind(x: Any) -> Any:
        return x.lora_a.shape, x.lora_b.shape, x.layout, x.slices, x.residual

    if any(isinstance(x, Tied) for x in (node.lora_a, node.lora_b)):
        raise ValueError(
            f'`{call}`: "{path}" is tied: a part of it is another node\'s. Give '
            "`jlora.untie(params)`, and of `initial` too."
        )
    if node.lora_a is None or node.lora_b is None:
        raise ValueError(
            f'`{call}`: A or B of "{path}" is taken out. Put it together first: '
            "`jlora.combine(trainable, frozen)`."
        )
    if not isinstance(first, LoraArray) or first.lora_a is None or kind(first) != kind(node):
        raise ValueError(
            f"`{call}`: {describe(path, node.lora_a)} (its A) did not begin as what `initial` has "
            "there. Give what `jlora.attach` returned, with the same rules."
        )
    return first


def _difference(node: LoraArray, first: LoraArray) -> LoraArray:
    """Return `s A B - s₀ A₀ B₀` as one update, without a base."""
    outs = node.layout.count("o")
    axis = node.lora_b.ndim - outs - 1
    parts = 1 if node.slices is None else len(node.slices)

    def apart(a: Array) -> Array:
        return a.reshape(*a.shape[:-1], parts, -1)  # each slice's ranks by themselves

    a = jnp.concatenate([apart(node.lora_a), apart(first.lora_a)], -1)
    grown = jnp.asarray(node.scaling, jnp.float32) / jnp.asarray(first.scaling, jnp.float32)
    grown = grown.reshape(*grown.shape, *(1,) * (node.lora_b.ndim - grown.ndim))
    b = node.lora_b * grown.astype(node.lora_b.dtype)
    return dataclasses.replace(
        node,
        base=None,
        lora_a=a.reshape(*a.shape[:-2], -1),
        lora_b=jnp.concatenate([b, -first.lora_b], axis),
        scaling=first.scaling,
        residual=False,
    )
