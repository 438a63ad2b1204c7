"""Products of rows with activations: by the format, or a block of outputs at a time.

XLA's CPU compiler keeps all weights that a program builds from codes alive together, so an unrolled
model would hold a dense copy of itself. A loop over blocks of outputs inside each product bounds
what is built to one block. Other compilers fuse or order the products, and there the weight is
built as a whole.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from jlora import _compat
from jlora._arrays import accumulator
from jlora.quant._format import Format

BLOCKS = 4  # of outputs
LEAST = 2**16  # the weights of a product below which a loop costs more than it saves

Parts = Mapping[str, Array]
Product = Callable[[Parts, Array, DTypeLike], Array]  # to a dtype


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
    if hasattr(format, "by_rows"):
        format, parts = format.by_rows(parts)
    own = getattr(format, "dot_transposed" if transposed else "dot", None)

    def plain(parts: Parts, x: Array, dtype: DTypeLike) -> Array:
        if own is not None:
            return own(parts, x, dtype)
        rows = format.unpack(parts).astype(kind).astype(x.dtype)
        contract = (((x.ndim - 1,), (0 if transposed else 1,)), ((), ()))
        wide = accumulator(x.dtype)
        return lax.dot_general(x, rows, contract, preferred_element_type=wide).astype(dtype)

    if not _in_blocks(*sides, (*parts.values(), x)):
        return NotImplemented if own is None else plain(parts, x, dtype)
    looped = _summed if transposed else _joined
    return lax.platform_dependent(
        parts,
        x,
        cpu=lambda parts, x: looped(plain, parts, x, dtype),
        default=lambda parts, x: plain(parts, x, dtype),
    )


def _in_blocks(out: int, inputs: int, arrays: Iterable[Array]) -> bool:
    """Whether a product may be a loop: a large weight, on no mesh whose axes it would cut."""
    return out % BLOCKS == 0 and out * inputs >= LEAST and not any(map(_on_mesh, arrays))


def _on_mesh(x: Array) -> bool:
    explicit = _compat.is_explicit(jax.typeof(x).sharding)
    return explicit or bool(_compat.varying_axes(x))


def _pieces(parts: Parts) -> dict[str, Array]:
    return {k: x.reshape(BLOCKS, x.shape[0] // BLOCKS, *x.shape[1:]) for k, x in parts.items()}


def _joined(plain: Product, parts: Parts, x: Array, dtype: DTypeLike) -> Array:
    """Compute blocks of outputs one after another; each is built again for the gradient."""
    outs = lax.map(jax.checkpoint(lambda piece: plain(piece, x, dtype)), _pieces(parts))
    outs = jnp.moveaxis(outs, 0, -2)
    return outs.reshape(*outs.shape[:-2], -1)


def _summed(plain: Product, parts: Parts, x: Array, dtype: DTypeLike) -> Array:
    """Add the products of blocks of outputs with the rows of each."""
    split = jnp.moveaxis(x.reshape(*x.shape[:-1], BLOCKS, -1), -2, 0)
    wide = accumulator(x.dtype)

    @jax.checkpoint
    def add(total: Array, both: tuple[Parts, Array]) -> tuple[Array, None]:
        return total + plain(*both, wide), None

    first = jax.eval_shape(lambda parts, x: plain(parts, x, wide), dict(parts), x)
    zeros = jnp.zeros(first.shape, wide)
    return lax.scan(add, zeros, (_pieces(parts), split))[0].astype(dtype)
