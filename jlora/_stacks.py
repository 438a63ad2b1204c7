"""Functions of one weight, over the elements of a stack: one at a time, so that memory is of one.

`jax.vmap` would hold what all of them need. Here it is what one needs, and on a mesh only one
element at a time is gathered where a function cannot work on shards.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree


def layer_by_layer(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Map a function over the leading axes of its arguments, as `jax.vmap` but one at a time."""
    for _ in range(depth):
        fn = functools.partial(_mapped, fn)
    return fn


def _mapped(fn: Callable[..., Any], *operands: PyTree) -> PyTree:
    codes, back = _coded(operands)
    return lax.map(lambda each: fn(*back(each)), codes)


def at_once(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Map a function over the leading axes of its arguments, for elements on different devices."""
    for _ in range(depth):
        fn = jax.vmap(fn)
    return fn


def in_place(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """As `layer_by_layer`, for `fn(weight, ...) -> (..., weight)`, into the buffer of the weights.

    If the weights are donated, there is no second stack.
    """
    if not depth:
        return fn

    def run(weights: Array, *operands: PyTree) -> tuple[Any, ...]:
        stack = weights.shape[:depth]
        flat = lambda x: x.reshape(-1, *x.shape[depth:])
        bits = _bits(weights.dtype)

        def step(codes: Array, at: Any) -> tuple[Array, Any]:
            n, each = at[0], others(at[1])
            weight = lax.dynamic_index_in_dim(codes, n, keepdims=False)
            *made, weight = fn(lax.bitcast_convert_type(weight, weights.dtype), *each)
            weight = lax.bitcast_convert_type(weight.astype(weights.dtype), bits)
            return lax.dynamic_update_index_in_dim(codes, weight, n, 0), tuple(made)

        codes = flat(lax.bitcast_convert_type(weights, bits))
        rest, others = _coded(jax.tree.map(flat, operands))
        each = jnp.arange(len(codes)), rest
        codes, made = lax.scan(step, codes, each)
        back = lambda x: x.reshape(*stack, *x.shape[1:])
        return *map(back, made), lax.bitcast_convert_type(back(codes), weights.dtype)

    return run


def is_split(sharding: Any, depth: int) -> bool:
    """Whether a stack is sharded: taking one element at a time would then gather all."""
    return any(names is not None for names in getattr(sharding, "spec", ())[:depth])


def _coded(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Return narrow floating-point leaves as integers, and the function back, of any shape."""
    dtypes = jax.tree.map(lambda x: x.dtype, tree)

    def narrow(dtype: Any) -> bool:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize in (1, 2)

    def there(x: Array) -> Array:
        return lax.bitcast_convert_type(x, _bits(x.dtype)) if narrow(x.dtype) else x

    def back(x: Array, dtype: Any) -> Array:
        return lax.bitcast_convert_type(x, dtype) if narrow(dtype) else x

    return jax.tree.map(there, tree), lambda tree: jax.tree.map(back, tree, dtypes)


def _bits(dtype: Any) -> Any:
    """Return the integers of a dtype's size.

    XLA's CPU compiler widens arithmetic on narrow floating-point numbers, and with it the stack
    that they are written into.
    """
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
