"""Rules for primitives that join weights: views, or views and arrays, become one view.

A sum of low-rank updates is one whose A and B are concatenated along the rank. So each operand's
update is padded to its place in the result, and the updates are summed.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora._base import Base, Deferred
from jlora.transform._join import aligned, of_one_rank, summed
from jlora.transform._labeled import AnyArray
from jlora.transform._registry import rule
from jlora.transform._view import View, on_factor
from jlora.transform._walk import Walk
from jlora.transform._weight import AnyBase, Operand, Value, Weight, all_names


@rule("concatenate", kind="join")
def _concatenate(walk: Walk, eqn: JaxprEqn, *operands: Value | Deferred) -> Any:
    views = aligned(operands)
    if views is None:
        return NotImplemented
    return [_joined(views, walk.bind(eqn, *operands)[0], int(eqn.params["dimension"]))]


def _joined(operands: Sequence[Any], base: Base, axis: int) -> Weight:
    """Join aligned weights, and arrays, along an axis."""
    if next(x.roles for x in operands if isinstance(x, Weight))[axis] == "s":
        return _stacked(operands, base, axis)
    placed, start = [], 0
    for x in operands:
        stop = start + x.shape[axis]
        if isinstance(x, Weight):
            placed.append(_placed(x, axis, start, base.shape[axis] - stop))
        start = stop
    return summed(placed, base)


def _placed(view: Weight, axis: int, before: int, after: int) -> Weight:
    """Pad a view's update with zeros along an axis of one side."""

    def move(f: Array, axes: list[int]) -> Array:
        if axis not in axes:
            return f
        width = [(0, 0, 0)] * f.ndim
        width[axes.index(axis)] = (before, after, 0)
        return lax.pad(f, jnp.zeros((), f.dtype), width)

    return view.moved(view.base, view.roles, move)


def _stacked(operands: Sequence[Any], base: AnyBase, axis: int) -> View:
    """Join along an axis that both factors have, at a common rank; an array's update is zero."""
    views = of_one_rank(operands)
    factors = tuple(
        lax.concatenate([x.factors[k] for x in views], views[0].axes(k).index(axis)) for k in (0, 1)
    )
    return View(base, factors, views[0].roles, all_names(operands))


@rule("stack", kind="join")
def _stack(walk: Walk, eqn: JaxprEqn, *operands: Value | Deferred) -> Any:
    axis = int(eqn.params["axis"])
    views = aligned(operands)
    if views is None:
        return NotImplemented
    return [_joined([_raised(x, axis) for x in views], walk.bind(eqn, *operands)[0], axis)]


def _raised(x: Operand | Deferred, axis: int) -> Weight | jax.ShapeDtypeStruct:
    """Insert a stack axis of size 1; bases and arrays become shapes, since only those are read."""
    dtype = (x.base if isinstance(x, Weight) else x).dtype
    shape = jax.ShapeDtypeStruct((*x.shape[:axis], 1, *x.shape[axis:]), dtype)
    if not isinstance(x, Weight):
        return shape
    roles = [*x.roles[:axis], x.new_role, *x.roles[axis:]]
    return x.moved(shape, roles, lambda f, axes: lax.expand_dims(f, [sum(n < axis for n in axes)]))


@rule("add", "sub", "add_any", kind="join")
def _add(walk: Walk, eqn: JaxprEqn, left: Value | Deferred, right: Value | Deferred) -> Any:
    views = aligned((left, right))
    result: Any = eqn.outvars[0].aval
    if views is None or any(isinstance(x, Weight) and x.shape != result.shape for x in views):
        return NotImplemented
    if eqn.primitive.name == "sub" and isinstance(views[1], Weight):
        views[1] = views[1].on_side(views[1].base, 1, lax.neg)
    return [summed(views, walk.bind(eqn, left, right)[0])]


@rule("select_n", kind="join")
def _select(walk: Walk, eqn: JaxprEqn, which: Value, *cases: Value | Deferred) -> Any:
    """Select in the factors too, if `which` varies only along one side or along the stack."""
    views = aligned(cases)
    if isinstance(which, Weight) or views is None:
        return NotImplemented
    like = next(x for x in views if isinstance(x, Weight))
    narrow = walk.narrowest(eqn.invars[0], which)
    sides = like.sides_of(narrow)
    if not sides:
        return NotImplemented
    base = walk.bind(eqn, which, *cases)[0]
    if len(sides) == 2:  # a scalar, or a mask over the stack
        return [_selected(narrow, of_one_rank(views), base)]

    def masked(n: int, x: Weight) -> Weight:
        def choose(f: Array) -> Array:
            chosen = on_factor(like, sides[0], narrow) == jnp.asarray(n, narrow.dtype)
            return jnp.where(chosen, f, jnp.zeros((), f.dtype))

        return x.on_side(x.base, sides[0], choose)

    return [summed([masked(n, x) for n, x in enumerate(views) if isinstance(x, Weight)], base)]


def _selected(which: AnyArray, views: list[View], base: AnyBase) -> View:
    def choose(k: int) -> Array:
        fs = [x.factors[k] for x in views]
        mask = jnp.broadcast_to(on_factor(views[0], k, which), fs[0].shape)
        return lax.select_n(mask, *fs)

    return View(base, (choose(0), choose(1)), views[0].roles, all_names(views))
