"""Functions of one weight, over the elements of a stack: one at a time, so that memory is of one.

`jax.vmap` would hold what all of them need. Here it is what one needs, and on a mesh only one
element at a time is gathered where a function cannot work on shards.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

T = TypeVar("T")


def layer_by_layer(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Map a function over the leading axes of its arguments, as `jax.vmap` but one at a time."""
    for _ in range(depth):
        fn = functools.partial(_mapped, fn)
    return fn


def _mapped(fn: Callable[..., Any], *operands: PyTree) -> PyTree:
    count = len(jax.tree.leaves(operands)[0])
    if not count:
        return jax.vmap(fn)(*operands)
    return lax.map(lambda n: fn(*_element(operands, n)), jnp.arange(count))


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
        if 0 in stack:
            return at_once(fn, depth)(weights, *operands)
        flat = lambda x: x.reshape(-1, *x.shape[depth:])
        weights, *others = jax.tree.map(flat, (weights, *operands))

        def step(weights: Array, n: Array) -> tuple[Array, Any]:
            *made, weight = fn(*_element((weights, *others), n))
            weight = weight.astype(weights.dtype)
            return lax.dynamic_update_index_in_dim(weights, weight, n, 0), tuple(made)

        weights, made = lax.scan(step, weights, jnp.arange(len(weights)))
        return tuple(x.reshape(*stack, *x.shape[1:]) for x in (*made, weights))

    return run


def is_split(sharding: Any, depth: int) -> bool:
    """Whether a stack is sharded: taking one element at a time would then gather all."""
    return any(names is not None for names in getattr(sharding, "spec", ())[:depth])


def in_a_branch(read: Callable[[ArrayLike], T], n: Array) -> T:
    """Return `read(n)` of arrays that do not change in the loop over n, read in it and not before.

    Most CPUs have no arithmetic on 16 bits. XLA's compiler for them makes a slice of a bfloat16
    array one of this array in float32, and this array before the loop: all of it, twice as large.
    What a branch computes stays in the branch.
    """
    return lax.cond(n >= 0, lambda: read(n), lambda: read(0))


def _element(stacks: T, n: Array) -> T:
    at = lambda n: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, n, keepdims=False), stacks)
    return in_a_branch(at, n)
