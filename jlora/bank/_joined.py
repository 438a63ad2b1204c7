"""The adapters of all slots as one, whose ranks alternate: component q belongs to slot q % N."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import FullArray, LoraArray, is_adapted
from jlora._base import built
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._partition import constant
from jlora.bank._slots import Bank, is_weight


def joined(base: PyTree, bank: Bank, call: str) -> PyTree:
    """Return the base with one adapter: A and B of all slots, without the weights of a mixture.

    Its scaling has an axis more, the rank: that of each component. Multiplied into B it would be
    rounded with it in bfloat16, as it is not where a slot is alone. Parameters trained in full stay
    plain.
    """
    nodes = dict(leaves_with_paths(bank.adapter, is_adapted))

    def one(path: str, weight: Any) -> Any:
        node = nodes.get(path)
        return _node(path, weight, node, call) if isinstance(node, LoraArray) else weight

    return map_with_paths(one, base, is_weight)


def of_weights(params: PyTree, base: PyTree, bank: Bank, m: Array, scale: bool = False) -> PyTree:
    """Put in the parameters trained in full, mixed by m, `(slots,)`; with `scale` scale B by m."""
    nodes = dict(leaves_with_paths(bank.adapter, is_adapted))
    weights = dict(leaves_with_paths(base, is_weight))

    def one(path: str, x: Any) -> Any:
        node = nodes.get(path)
        if isinstance(node, FullArray):
            return FullArray(
                x, _mixture(node.value, weights[path], m.astype(jnp.float32) * bank.ranks[path])
            )
        if scale and isinstance(x, LoraArray):
            by = (x.scaling * jnp.tile(m, x.rank // m.shape[0])).astype(x.lora_b.dtype)
            b = x.lora_b * by.reshape(*by.shape, *(1,) * x.layout.count("o"))
            return dataclasses.replace(x, lora_b=b, scaling=jnp.ones((), jnp.float32))
        return x

    return map_with_paths(one, params, lambda x: is_weight(x) or is_adapted(x))


def _mixture(values: Array, base: Any, m: Array) -> Array:
    """Return `base + Σ m[n] (values[n] - base)`; a slot's own value, exactly, for one weight 1."""
    original = lax.stop_gradient(built(base)).astype(values.dtype)
    m = m.astype(values.dtype)
    return jnp.tensordot(m, values, 1, precision="highest") + (1 - m.sum()) * original


def _node(path: str, weight: Any, node: LoraArray, call: str) -> LoraArray:
    shape, stack = weight.shape, len(weight.shape) - len(node.layout)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), node)
    jax.eval_shape(
        lambda one: forms.check(path, dataclasses.replace(one, base=weight), call) or 0, one
    )
    node = constant(node)
    a, b = jax.vmap(lambda node: forms.factors(node, shape))(node)
    a, b = jnp.moveaxis(a, 0, -1), jnp.moveaxis(b, 0, stack + 1)
    a = a.reshape(*a.shape[:-2], -1)
    b = b.reshape(*b.shape[:stack], -1, *b.shape[stack + 2 :])
    s = jnp.asarray(node.scaling)
    s = s.reshape(*s.shape, *(1,) * (1 + stack - s.ndim))
    s = jnp.broadcast_to(s, (len(s), *shape[:stack]))
    s = jnp.tile(jnp.moveaxis(s, 0, -1), a.shape[-1] // len(s))
    return LoraArray(weight, a, b, s, node.layout)
