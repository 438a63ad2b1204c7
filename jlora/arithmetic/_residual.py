"""Convert an adapter over a residual to LoRA on the original weights."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora._adapt import bind, detach
from jlora._arrays import LoraArray, Tied, is_adapted
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._paths import describe


def residual_to_lora(params: PyTree, initial: PyTree, base: PyTree) -> PyTree:
    """Convert an adapter trained over a residual to LoRA of rank 2r on the original weights.

    `W_res + s A B = W + s A B - s₀ A₀ B₀ = W + s₀ [A, A₀] [(s/s₀) B; -B₀]`

    Args:
        params: trained parameters, or their adapter from `jlora.detach`.
        initial: the parameters before training, from `jlora.attach` (or `corda`, `lora_ga`), or
            their adapter.
        base: the original weights, as passed to `jlora.attach`.

    Returns:
        `base` with the adapter attached. Nodes that are not `residual` keep their A and B; base
        weights are not copied. In float32 the result differs from `params` by rounding; where W is
        bfloat16, also by the rounding of the residual.

    Raises:
        ValueError: no node is a residual; a node of `initial` does not match that of `params`;
            `base` has different paths.

    Example:
        >>> import jax
        >>> from jlora import LoraSpec, attach, initializers, merge
        >>> base = {"w": jax.random.normal(jax.random.key(0), (6, 4))}
        >>> spec = LoraSpec(rank=2, init=initializers.pissa)
        >>> initial = attach(base, {"w": spec}, key=jax.random.key(1))
        >>> plain = residual_to_lora(initial, initial, base)  # before any training
        >>> plain["w"].rank, bool(jnp.allclose(merge(plain)["w"], base["w"], atol=1e-6))
        (4, True)

    Reference: Meng et al. 2024, arXiv:2404.02948, the conversion of PiSSA to LoRA. PEFT's
    `save_pretrained(..., path_initial_model_for_weight_conversion=...)`.
    """
    call = "jlora.arithmetic.residual_to_lora(params, initial, base)"
    first = dict(leaves_with_paths(initial, is_adapted))
    adapter = detach(params)[1]
    moved = {
        path: _difference(node, _initial(path, node, first.get(path), call))
        for path, node in leaves_with_paths(adapter, is_adapted)
        if isinstance(node, LoraArray) and node.residual
    }
    if not moved:
        raise ValueError(
            f"`{call}`: no node of `params` has a residual as its base, so there is nothing to "
            "convert."
        )

    is_leaf = lambda x: x is None or is_adapted(x)
    return bind(base, map_with_paths(lambda path, x: moved.get(path, x), adapter, is_leaf))


def _initial(path: str, node: LoraArray, first: object, call: str) -> LoraArray:
    """Return the initial node; refuse one that does not match the trained one."""

    def kind(x: LoraArray) -> tuple[Any, ...]:
        return x.lora_a.shape, x.lora_b.shape, x.layout, x.slices, x.residual

    if any(isinstance(x, Tied) for x in (node.lora_a, node.lora_b)):
        raise ValueError(
            f'`{call}`: "{path}" is tied: a part of it is another node\'s. Pass '
            "`jlora.untie(params)`, and of `initial` too."
        )
    if node.lora_a is None or node.lora_b is None:
        raise ValueError(
            f'`{call}`: A or B of "{path}" is missing. Put it back first: '
            "`jlora.combine(trainable, frozen)`."
        )
    if not isinstance(first, LoraArray) or first.lora_a is None or kind(first) != kind(node):
        raise ValueError(
            f"`{call}`: {describe(path, node.lora_a)} (its A) does not match the node in "
            "`initial`. Pass what `jlora.attach` returned, with the same rules."
        )
    return first


def _difference(node: LoraArray, first: LoraArray) -> LoraArray:
    """Return `s A B - s₀ A₀ B₀` as one update, without a base."""
    outs = node.layout.count("o")
    axis = node.lora_b.ndim - outs - 1
    parts = 1 if node.slices is None else len(node.slices)

    def per_slice(a: Array) -> Array:
        return a.reshape(*a.shape[:-1], parts, -1)  # one axis for slices, one for the rank

    a = jnp.concatenate([per_slice(node.lora_a), per_slice(first.lora_a)], -1)
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
