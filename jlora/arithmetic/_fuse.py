"""Methods on dense updates: one weight at a time, in float32, one function of `(n, in, out)` each.

What they share: `trimmed` keeps the largest values, `elected` resolves conflicts of sign.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import FullArray, Geometry, LoraArray, accumulator
from jlora._base import built
from jlora._check_values import check_key
from jlora._paths import brief
from jlora.arithmetic._terms import Term, check_original, each_path, read, refuse_gain, shape_among

# (updates (n, in, out), weights (n,), key) -> update (in, out)
Fuse = Callable[[Array, Array, Any], Array]
_EXACT = jax.lax.Precision.HIGHEST


def fused(
    adapters: Sequence[PyTree],
    weights: Sequence[Any],
    rank: int | None,
    fuse: Fuse,
    call: str,
    key: Any = None,
    random: bool = False,
) -> PyTree:
    """Return the adapter of `fuse`, with A and B of this rank or, with None, of full values."""
    check_rank(rank, call)
    if random:
        check_key(key, call)
    like, nodes = read(adapters, call)
    each = jnp.stack([jnp.asarray(w, jnp.float32) for w in weights])

    def one(path: str, having: list[int]) -> Any:
        of = {n: nodes[n][path] for n in having}
        refuse_gain(path, [Term(1.0, x) for x in of.values()], call)
        geometry = _geometry(path, list(of.values()), call)
        shape = (*geometry.stack, geometry.fan_in, geometry.fan_out)
        zeros = jnp.zeros(shape, jnp.float32)  # what an adapter does not adapt it does not change
        deltas = jnp.stack(
            [_matrix(path, of[n], geometry, call) if n in of else zeros for n in range(len(nodes))]
        )
        own = jax.random.fold_in(key, zlib.crc32(path.encode())) if random else None
        total = _each_element(deltas, each, own, fuse=fuse)
        return _node(path, list(of.values()), geometry, total, rank, call)

    return each_path(like, nodes, one)


def check_rank(rank: Any, call: str) -> None:
    """Refuse what is neither a rank nor None."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"`{call}`: rank={rank!r}; it must be an integer of at least 1, or None.")


def check_part(name: str, x: Any, call: str) -> float:
    """Return a part in (0, 1]; it decides how many values are kept, so it cannot be traced."""
    if not isinstance(x, int | float) or isinstance(x, bool) or not 0 < x <= 1:
        raise ValueError(f"`{call}`: {name}={x!r}; it must be a number in (0, 1].")
    return float(x)


def check_flag(name: str, x: Any, call: str) -> bool:
    """Return a flag; it chooses between methods, so it cannot be traced."""
    if not isinstance(x, bool):
        raise TypeError(f"`{call}`: {name}={brief(x)}; give True or False.")
    return x


def _geometry(path: str, nodes: Sequence[Any], call: str) -> Geometry:
    """Return the weight's geometry; a parameter without a layout is one column."""
    shape = shape_among(path, nodes, call)
    layout = next((x.layout for x in nodes if isinstance(x, LoraArray)), None)
    return Geometry.of(shape, "i" * len(shape) if layout is None else layout)


def _matrix(path: str, node: Any, geometry: Geometry, call: str) -> Array:
    if isinstance(node, FullArray):
        check_original(path, node, call)
        delta = node.value.astype(jnp.float32) - built(node.base).astype(jnp.float32)
    else:
        delta = forms.delta(node, geometry.shape, jnp.float32).astype(jnp.float32)
    return geometry.to_matrix(delta)


@functools.partial(jax.jit, static_argnames="fuse")
def _each_element(deltas: Array, weights: Array, key: Any, fuse: Fuse) -> Array:
    """Fuse the updates of each element of the stack by itself, as if it were a weight."""
    n, *stack, fan_in, fan_out = deltas.shape
    flat = jnp.moveaxis(deltas.reshape(n, -1, fan_in, fan_out), 1, 0)
    keys = None if key is None else jax.random.split(key, flat.shape[0])
    run = jax.vmap(fuse, in_axes=(0, None, None if key is None else 0))
    return run(flat, weights, keys).reshape(*stack, fan_in, fan_out)


def _node(
    path: str, nodes: Sequence[Any], geometry: Geometry, total: Array, rank: Any, call: str
) -> Any:
    """Return the update as A and B, or as W plus it where the rank is None or W trains in full."""
    lora = all(isinstance(x, LoraArray) for x in nodes)
    if lora and rank is not None:
        u, s, vt = svd(total)
        r = min(rank, s.shape[-1])
        root = jnp.sqrt(s[..., :r])
        a, b = u[..., :r] * root[..., None, :], root[..., :, None] * vt[..., :r, :]
        return LoraArray(
            None,
            a.reshape(*geometry.stack, *geometry.in_dims, r),
            b.reshape(*geometry.stack, r, *geometry.out_dims),
            jnp.ones(geometry.stack, jnp.float32),
            geometry.layout,
        )
    base = next((x.base for x in nodes if x.base is not None), None)
    if base is None:
        raise ValueError(
            f'`{call}`: without `rank=` the result is the weight itself, W plus an update, and "'
            f'{path}" has no base. Pass adapted parameters, `jlora.bind(base, adapter)`, or a rank.'
        )
    base = built(base)
    wide = accumulator(base.dtype)
    update = geometry.from_matrix(total).astype(wide)
    return FullArray(None, (base.astype(wide) + update).astype(base.dtype))


@jax.jit
def svd(x: Array) -> tuple[Array, Array, Array]:
    """Return U, S and Vᵀ, compiled once for a shape."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt


def kept_of(size: int, part: float) -> int:
    """Return how many of `size` values a part keeps: at least one."""
    return max(1, int(part * size))


def positions(x: Array, axis: int | None = None) -> Array:
    """Return the position of every value in the order of falling magnitude; 0 is the largest."""
    flat = x.reshape(-1) if axis is None else x
    size = jnp.where(jnp.isnan(flat), jnp.inf, jnp.abs(flat))  # no NaN is trimmed away
    order = jnp.argsort(-size, axis=-1 if axis is None else axis, stable=True)
    return jnp.argsort(order, axis=-1 if axis is None else axis).reshape(x.shape)


def trimmed(deltas: Array, density: float | int) -> Array:
    """Keep the largest part of each update and set the rest to zero."""
    keep = kept_of(deltas[0].size, density)
    return jax.vmap(lambda x: jnp.where(positions(x) < keep, x, 0))(deltas)


def weighted_sum(deltas: Array, weights: Array) -> Array:
    """Return `Σ wᵢ τᵢ`."""
    return jnp.tensordot(weights, deltas, 1, precision=_EXACT)


def elected(deltas: Array, weights: Array) -> Array:
    """Return `Σ wᵢ τᵢ / #` over the updates that have the sign of `Σ τᵢ`; # is their number."""
    sign = jnp.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = (jnp.sign(deltas) == sign[None]) | jnp.isnan(deltas)
    count = jnp.maximum(agree.sum(0), 1)
    return weighted_sum(jnp.where(agree, deltas, 0), weights) / count.astype(deltas.dtype)
