"""Rules for what joins weights: several views, or views and arrays, become one view.

A sum of low-rank updates is a low-rank update: A's side by side and B's below one another, the
ranks added. So each operand's update is placed where it belongs in the result, and all are summed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora.transform._registry import rule
from jlora.transform._view import View, aligned, all_names, even, on_factor, summed, varying_sides
from jlora.transform._walk import Walk


@rule("concatenate")
def _concatenate(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    axis = int(eqn.params["dimension"])
    views = aligned(operands)
    if views is None:
        return NotImplemented
    base = walk.bind(eqn, *operands)[0]
    like = next(x for x in views if isinstance(x, View))
    if not like.parts:
        return [summed(views, base)]
    if like.roles[axis] == "s":
        return [_stacked(views, base, lambda pieces, k: lax.concatenate(pieces, k), axis)]
    placed, start = [], 0
    for x in views:
        stop = start + x.shape[axis]
        if isinstance(x, View):
            placed.append(_placed(x, axis, start, base.shape[axis] - stop))
        start = stop
    return [summed(placed, base)]


def _placed(view: View, axis: int, before: int, after: int) -> View:
    """Surround a view's update by zeros along an axis of one side."""

    def move(f: Any, axes: list[int]) -> Any:
        if axis not in axes:
            return f
        width = [(0, 0, 0)] * f.ndim
        width[axes.index(axis)] = (before, after, 0)
        return lax.pad(f, jnp.zeros((), f.dtype), width)

    return view.moved(view.base, view.roles, move)


def _stacked(
    views: Sequence[Any], base: Any, join: Callable[[list[Any], int], Any], axis: int
) -> View:
    """Join along an axis that both factors have, at one rank; an array's update is zero."""
    pieces = even(views)
    factors = tuple(
        join([x.factors[k] for x in pieces], sum(n < axis for n in pieces[0].axes(k)))
        for k in (0, 1)
    )
    return View(base, factors, pieces[0].roles, all_names(views))


@rule("stack")
def _stack(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    axis = int(eqn.params["axis"])
    views = aligned(operands)
    if views is None:
        return NotImplemented
    base = walk.bind(eqn, *operands)[0]
    like = next(x for x in views if isinstance(x, View))
    roles = [*like.roles[:axis], like.new_role, *like.roles[axis:]]
    if not like.parts:
        joined = summed(views, base)
        roles = [*joined.roles[:axis], like.new_role, *joined.roles[axis:]]
        return [View(base, (), tuple(roles), joined.names)]
    joined = _stacked(views, base, lambda pieces, k: jnp.stack(pieces, axis=k), axis)
    return [View(base, joined.factors, tuple(roles), joined.names)]


@rule("add", "sub", "add_any")
def _add(walk: Walk, eqn: JaxprEqn, left: Any, right: Any) -> Any:
    views = aligned((left, right))
    base = walk.bind(eqn, left, right)[0]
    if views is None or any(isinstance(x, View) and x.shape != base.shape for x in views):
        return NotImplemented
    if eqn.primitive.name == "sub" and isinstance(views[1], View):
        negative = views[1]
        factors = (*negative.factors[:1], *(-f for f in negative.factors[1:]))
        views[1] = View(negative.base, factors, negative.roles, negative.names)
    return [summed(views, base)]


@rule("select_n")
def _select(walk: Walk, eqn: JaxprEqn, which: Any, *cases: Any) -> Any:
    """Choose by what varies along one side only, or along the stack: the factors choose too."""
    views = aligned(cases)
    if isinstance(which, View) or views is None:
        return NotImplemented
    base = walk.bind(eqn, which, *cases)[0]
    like = next(x for x in views if isinstance(x, View))
    if not like.parts:
        return [summed(views, base)]
    narrow = walk.narrowest(eqn.invars[0], which)
    sides = varying_sides(like, narrow)
    if not sides:
        return NotImplemented
    if len(sides) == 2:  # a scalar, or a stack's mask
        return [_selected(narrow, even(views), base)]
    masked = []
    for n, x in enumerate(views):
        if isinstance(x, View):
            chosen = on_factor(like, sides[0], narrow) == jnp.asarray(n, narrow.dtype)
            factors = tuple(
                jnp.where(chosen, f, jnp.zeros((), f.dtype)) if k == sides[0] else f
                for k, f in enumerate(x.factors)
            )
            masked.append(View(x.base, factors, x.roles, x.names))
    return [summed(masked, base)]


def _selected(which: Any, views: list[View], base: Any) -> View:
    def choose(k: int) -> Any:
        fs = [x.factors[k] for x in views]
        mask = jnp.broadcast_to(on_factor(views[0], k, which), fs[0].shape)
        return lax.select_n(mask, *fs)

    return View(base, (choose(0), choose(1)), views[0].roles, all_names(views))
