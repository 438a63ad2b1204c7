"""Products of stored weights with activations: by the format, or with the weight, built for this.

Building a weight depends on codes alone, so a compiler may build all weights of an unrolled model
before the first product. Here a weight is built of codes that depend on the activations that it is
multiplied with, or in the backward pass on their gradient, so there is one at a time. For TPUs and
GPUs `lax.optimization_barrier` says so; the CPU's compiler drops it early and orders operations by
what they compute from, so there the codes are computed from the activations. The product is linear,
with a transpose of its own, and nothing but the stored arrays is kept for it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array

from jlora import _compat
from jlora._arrays import accumulator
from jlora.quant._format import Format

LEAST = 2**16  # the size of a weight below which it may be built at any time

Parts = Mapping[str, Array]


def product(
    format: Format,
    parts: Parts,
    x: Array,
    sides: tuple[int, int],
    kind: DTypeLike,
    dtype: DTypeLike,
    transposed: bool,
) -> Any:
    """Multiply `(..., in)` with rows `(out, in)` to `(..., out)`, or the reverse if `transposed`.

    `sides` are the numbers of outputs and inputs, and `kind` is the dtype of the weight. Returns
    NotImplemented where the caller should build the weight.
    """

    def times(parts: Parts, x: Array, dtype: DTypeLike, transposed: bool) -> Array:
        own = getattr(format, "dot_transposed" if transposed else "dot", None)
        if own is not None:
            return own(parts, x, dtype)
        rows = format.unpack(parts).astype(kind).astype(x.dtype)
        how = {"transposed": transposed, "wide": sum_dtype(x, dtype)}
        multiply = functools.partial(_times_rows, **how)
        blocks = functools.partial(_times_blocks, block=format.block, **how)
        return lax.platform_dependent(x, rows, tpu=blocks, default=multiply).astype(dtype)

    small = sides[0] * sides[1] < LEAST or x.size == 0
    if small or any(map(_on_mesh, (*parts.values(), x))):
        return times(parts, x, dtype, transposed) if hasattr(format, "dot") else NotImplemented

    blocks = sides[1] // format.block, format.block

    def forward(x: Array) -> Array:
        return times(*_together(parts, x, blocks, transposed), dtype, transposed)

    def backward(g: Array) -> Array:
        return times(*_together(parts, g, blocks, not transposed), x.dtype, not transposed)

    return _linear(forward, backward, x, dtype)


def sum_dtype(x: Array, dtype: DTypeLike) -> Any:
    """Return the dtype of a product with x that is then rounded to `dtype`.

    If several devices have parts of it, they are added in this dtype. For a bfloat16 model it is
    bfloat16, as for dense weights: float32 takes twice the bytes, and XLA would not add the
    gradients of several products before it reduces their sum.
    """
    same = x.dtype == dtype == jnp.bfloat16
    return dtype if same and _compat.is_distributed(x) else accumulator(x.dtype)


def _times_rows(x: Array, rows: Array, transposed: bool, wide: DTypeLike) -> Array:
    contract = (((x.ndim - 1,), (0 if transposed else 1,)), ((), ()))
    return lax.dot_general(x, rows, contract, preferred_element_type=wide)


def _times_blocks(x: Array, rows: Array, block: int, transposed: bool, wide: DTypeLike) -> Array:
    """Multiply as `_times_rows`, summing over the place in a block before the block.

    A TPU reads a weight into its matrix unit from tiles of the last two axes. With the axes (place,
    block, out) a scale is repeated along the first, which costs nothing; with (out, in) XLA writes
    each scale to memory as often as its block has weights.
    """
    w = rows.reshape(rows.shape[0], -1, block)
    if transposed:
        out = lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide)
        return out.reshape(*out.shape[:-2], -1)
    x = x.reshape(*x.shape[:-1], -1, block)
    contract = (((x.ndim - 1, x.ndim - 2), (2, 1)), ((), ()))
    return lax.dot_general(x, w, contract, preferred_element_type=wide)


def _on_mesh(x: Array) -> bool:
    explicit = _compat.is_explicit(jax.typeof(x).sharding)
    return explicit or bool(_compat.varying_axes(x))


def _linear(
    forward: Callable[[Array], Array],
    backward: Callable[[Array], Array],
    x: Array,
    dtype: DTypeLike,
) -> Array:
    """Return `forward(x)`, a linear map to a dtype, whose transpose is `backward`.

    Of JAX's functions that work in every transformation, only the solution of a linear system has a
    transpose of its own. Here it is the map `(x, y) -> (0, forward(x))` of joined arrays, with the
    transpose `(x, y) -> (backward(y), 0)`. No system is solved, and XLA removes the joining.
    """
    wide, n = jnp.promote_types(x.dtype, dtype), x.shape[-1]
    y = jax.eval_shape(forward, x)

    def join(x: Array, y: Array) -> Array:
        return jnp.concatenate([x.astype(wide), y.astype(wide)], axis=-1)

    def solve(_: Any, both: Array) -> Array:
        first = both[..., :n]
        return join(jnp.zeros_like(first), forward(first.astype(x.dtype)))

    def transpose_solve(_: Any, both: Array) -> Array:
        last = both[..., n:]
        return join(backward(last.astype(dtype)), jnp.zeros_like(last))

    both = join(x, jnp.zeros(y.shape, y.dtype))
    return lax.custom_linear_solve(lambda b: b, both, solve, transpose_solve)[..., n:].astype(dtype)


def _together(
    parts: Parts, x: Array, shape: tuple[int, int], transposed: bool
) -> tuple[dict[str, Array], Array]:
    """Return the same arrays, none of which is there before x: see the top of this file.

    Both results of the barrier are used, for XLA takes out of a barrier what nobody uses.
    """
    parts, x = lax.optimization_barrier((dict(parts), x))
    laid_out = functools.partial(_laid_out, shape=shape, transposed=transposed)
    parts = lax.platform_dependent(parts, tpu=laid_out, default=lambda parts: parts)
    never = _never(x)
    integers = {k for k, part in parts.items() if jnp.issubdtype(part.dtype, jnp.integer)}
    return {k: x ^ never.astype(x.dtype) if k in integers else x for k, x in parts.items()}, x


def _laid_out(
    parts: dict[str, Array], shape: tuple[int, int], transposed: bool
) -> dict[str, Array]:
    """Lay arrays out in the order of their axes, and then whole codes as the product reads them.

    XLA would lay out all of a scanned stack as the products want one layer, and so copy it. Codes
    that are not packed, `(out, blocks · block)`, it would multiply before it divides them into
    blocks, and copy the weight that this makes. After the two layouts it has to move the codes.
    `shape` is (blocks, block).
    """
    as_stored = {k: Layout(tuple(range(x.ndim))) for k, x in parts.items()}
    parts = with_layout_constraint(parts, as_stored)
    blocks, block = shape
    order = Layout((1, 2, 0) if transposed else (2, 1, 0))

    def moved(x: Array) -> Array:
        return with_layout_constraint(x.reshape(-1, *shape), order).reshape(x.shape)

    whole = {k for k, x in parts.items() if block > 1 and x.shape[1:] == (blocks * block,)}
    return {k: moved(x) if k in whole else x for k, x in parts.items()}


@custom_vmap
def _never(x: Array) -> Array:
    """Return False, and depend on x on a CPU. No compiler may know, for NaN differs from itself."""

    def of(x: Array) -> Array:
        first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
        return (first != first) & (first == first)

    return lax.platform_dependent(x, cpu=of, default=lambda _: jnp.array(False))


@_never.def_vmap
def _never_of_several(size: int, batched: Iterable[bool], x: Array) -> tuple[Array, bool]:
    """One weight serves a batch."""
    return _never(x[0]), False
