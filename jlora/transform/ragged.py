"""The rule for ragged products: rows grouped by expert, times that expert's A, then its B."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora import _compat
from jlora._arrays import accumulator
from jlora._partition import still
from jlora._paths import describe
from jlora.transform._gain import NONE, Gain, multiplied
from jlora.transform._inputs import EXACT, Sums, pulled, wide
from jlora.transform._labeled import AnyArray, expanded, in_dtype_of_first
from jlora.transform._registry import rule
from jlora.transform._view import GAIN, View, plus
from jlora.transform._walk import Walk
from jlora.transform._weight import Operand, Weight
from jlora.transform._wide import bound


def of_ragged(eqn: JaxprEqn, x: AnyArray, view: Operand, group_sizes: AnyArray) -> Sums | None:
    """Sum over the rows of each expert."""
    if not isinstance(view, View) or meeting(eqn, view)[0] != 0:
        return None
    a, axes = view.factors[0], view.axes(0)
    x = wide(x).astype(a.dtype)

    def narrow(x: AnyArray) -> Callable[[Any], Any]:
        return lambda a: into_rank(eqn, x, a, axes, group_sizes, EXACT)

    _, second, total = pulled(narrow(x), a)
    rows = pulled(narrow(jnp.ones_like(x)), a)[2]
    ins = [n for n, k in enumerate(axes) if view.roles[k] == "i"]
    return Sums(second, total, rows.max(ins, keepdims=True))


@rule("ragged_dot_general", kind="product", sums=of_ragged)
def _ragged_dot(walk: Walk, eqn: JaxprEqn, x: Operand, view: Operand, group_sizes: AnyArray) -> Any:
    if not isinstance(view, Weight) or isinstance(x, Weight):
        return NotImplemented
    first, w_sum, free = meeting(eqn, view)
    if first is None:
        return NotImplemented
    result: Any = eqn.outvars[0].aval
    dtype = walk.narrow_dtype(x.dtype, result.dtype)
    x, view, group_sizes, one = _in_lanes(walk, eqn, x, view, group_sizes)

    def product(x: AnyArray) -> Array:
        return bound(walk, eqn, x, view, group_sizes)

    def updated(view: View, base: AnyArray, x: AnyArray) -> Array:
        return plus(base, _narrow(eqn, x.astype(dtype), view, first, group_sizes))

    gain = NONE if view.gain is None else _gain(eqn, x, view, first, group_sizes, one)
    out = multiplied(walk, eqn, 0, view, x, gain, dtype, product, updated)
    walk.used(eqn, view, 2 * view.rank * (x.size + result.size), w_sum, free)
    return [out]


def meeting(eqn: JaxprEqn, view: Weight) -> tuple[int | None, Sequence[int], Sequence[int]]:
    """Return the factor applied to x (None if neither), and the axes summed and kept."""
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (x_sum, w_sum), (x_batch, w_batch) = dn.dot_dimension_numbers
    groups, ragged = [*dn.rhs_group_dimensions], [*dn.lhs_ragged_dimensions]
    free = [k for k in range(len(view.roles)) if k not in (*w_sum, *w_batch, *groups)]
    sides = {view.roles[k] for k in w_sum}, {view.roles[k] for k in free}
    fits = bool(groups) and not set(ragged) & {*x_sum, *x_batch}
    if isinstance(view, View):
        stacks = {view.roles[k] for k in (*groups, *w_batch)}
        fits &= stacks == {"s"} and sides in (({"i"}, {"o"}), ({"o"}, {"i"}))
    return int(sides[0] == {"o"}) if fits else None, w_sum, free


def into_rank(
    eqn: JaxprEqn,
    x: AnyArray,
    factor: AnyArray,
    axes: list[int],
    group_sizes: AnyArray,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Multiply x by the first factor, which has these axes of the weight."""
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (x_sum, w_sum), (x_batch, w_batch) = dn.dot_dimension_numbers
    numbers = ((x_sum, _at(axes, w_sum)), (x_batch, _at(axes, w_batch)))
    groups, ragged = _at(axes, dn.rhs_group_dimensions), [*dn.lhs_ragged_dimensions]
    return _ragged(eqn, x, factor, group_sizes, numbers, ragged, groups, precision)


def _narrow(eqn: JaxprEqn, x: AnyArray, view: View, first: int, group_sizes: AnyArray) -> Array:
    """Multiply by one factor and then by the other, in the dtype of x."""
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (x_sum, _), (x_batch, _) = dn.dot_dimension_numbers

    def narrow(x: AnyArray, factor: AnyArray) -> Array:
        return into_rank(eqn, x, factor, view.axes(first), group_sizes)

    z = in_dtype_of_first(narrow, x, view.factors[first])
    x_free = [k for k in range(x.ndim) if k not in (*x_sum, *x_batch)]
    row = len(x_batch) + x_free.index(dn.lhs_ragged_dimensions[0])
    return _out_of_rank(eqn, z.astype(x.dtype), view, 1 - first, group_sizes, row)


def _out_of_rank(
    eqn: JaxprEqn,
    z: Array,
    view: Weight,
    k: int,
    group_sizes: AnyArray,
    row: int,
    precision: lax.PrecisionLike = None,
) -> Array:
    """Multiply (batch, ..., rows, ..., rank) by a factor or the gain, which have the rank last."""
    dn, axes = eqn.params["ragged_dot_dimension_numbers"], view.axes(k)
    _, (x_batch, w_batch) = dn.dot_dimension_numbers
    batch = list(range(len(x_batch)))
    numbers = (([z.ndim - 1], [len(axes)]), (batch, _at(axes, w_batch)))
    groups = _at(axes, dn.rhs_group_dimensions)

    def product(z: AnyArray, factor: AnyArray) -> Array:
        return _ragged(eqn, z, factor, group_sizes, numbers, [row], groups, precision)

    return in_dtype_of_first(product, z, view.components[k])


def _gain(
    eqn: JaxprEqn, x: AnyArray, view: Weight, first: int, group_sizes: AnyArray, one: AnyArray
) -> Gain:
    """Give every row its expert's gain, on the outputs or, if those are contracted, the inputs."""
    dn = eqn.params["ragged_dot_dimension_numbers"]
    (x_sum, w_sum), (x_batch, w_batch) = dn.dot_dimension_numbers
    row, batch = dn.lhs_ragged_dimensions[0], len(x_batch)
    ones = jnp.ones((*(x.shape[k] for k in x_batch), x.shape[row], 1), accumulator(x.dtype))
    ones *= one.astype(ones.dtype)
    highest = lax.Precision.HIGHEST
    rows = _out_of_rank(eqn, ones, view, GAIN, group_sizes, batch, highest)
    lead = [*w_batch, *dn.rhs_group_dimensions]
    labels = [*x_batch, row, *(("w", k) for k in view.axes(GAIN) if k not in lead)]
    x_labels: list[Any] = list(range(x.ndim))
    if first == 0:
        x_free = [k for k in x_labels if k not in (*x_sum, *x_batch)]
        return Gain(after=expanded(rows, labels, [*x_batch, *x_free, *labels[batch + 1 :]]))
    for k, n in zip(x_sum, w_sum, strict=True):
        x_labels[k] = ("w", n)
    return Gain(before=expanded(rows, labels, x_labels))


def _in_lanes(
    walk: Walk, eqn: JaxprEqn, x: AnyArray, view: Weight, group_sizes: AnyArray
) -> tuple[Any, Weight, Any, Any]:
    """Under `jax.vmap` map every operand, because JAX requires it, or raise if W is not mapped.

    A factor of 1 that is mapped if an operand is makes the others mapped too; return it last. W is
    not repeated.
    """
    operands = (view.base, x, group_sizes, view.components)
    if not any(_compat.is_traced(leaf) for leaf in jax.tree.leaves(operands)):
        return x, view, group_sizes, jnp.ones((), jnp.int32)
    line = walk.line(eqn)

    @jax.custom_batching.custom_vmap
    def one(*operands: Any) -> Any:
        return jnp.ones((), jnp.int32)

    @one.def_vmap
    def _(size: int, mapped: Any, *operands: Any) -> Any:
        if not any(jax.tree.leaves(mapped[0])):
            raise ValueError(
                f"`jlora.lora`: `jax.vmap` maps the ragged product at {line}, but not its weight "
                f"{describe(', '.join(view.names), view.base)}, which JAX cannot batch. Loop over "
                "the adapters, `jax.lax.map(run, adapters)` in place of `jax.vmap(run)(adapters)`."
            )
        return jnp.ones(size, jnp.int32), True

    same = one(*jax.tree.map(still, operands))
    x, sizes, parts = jax.tree.map(lambda leaf: leaf * same.astype(leaf.dtype), operands[1:])
    return x, view.remade(view.base, parts, view.roles), sizes, same


def _at(axes: list[int], wanted: Sequence[int]) -> list[int]:
    return [axes.index(k) for k in wanted]


def _ragged(
    eqn: JaxprEqn,
    x: Any,
    w: Any,
    group_sizes: Any,
    numbers: lax.DotDimensionNumbers,
    ragged: Sequence[int],
    groups: Sequence[int],
    precision: lax.PrecisionLike = None,
) -> Array:
    return lax.ragged_dot_general(
        x,
        w,
        group_sizes,
        lax.RaggedDotDimensionNumbers(numbers, ragged, groups),
        precision=precision or eqn.params["precision"],
        preferred_element_type=accumulator(x.dtype),
        group_offset=eqn.params["group_offset"],
    )
