"""Combining several weights into one: align them, pad them to one rank, sum their updates."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora._base import Deferred
from jlora.transform._probe import Probe
from jlora.transform._view import View
from jlora.transform._weight import AnyBase, Names, Operand, Weight, all_names


def aligned(operands: Sequence[Any]) -> list[Any] | None:
    """Give all views the roles of the first, exchanging A and B if needed; None if impossible."""
    out = list(operands)
    roles = next(x.roles for x in out if isinstance(x, Weight))
    for n, x in enumerate(out):
        if not isinstance(x, View) or x.roles == roles:
            continue
        swapped = tuple({"s": "s", "i": "o", "o": "i"}[r] for r in x.roles)
        if swapped != roles:
            return None
        out[n] = View(x.base, x.factors[::-1], swapped, x.names)
    return out


def summed(operands: Sequence[Any], base: AnyBase) -> Weight:
    """Sum the updates of aligned weights over one base: the ranks add up, or A or B is shared."""
    weights = [x for x in operands if isinstance(x, Weight)]
    names = all_names(weights)
    views = [x for x in weights if isinstance(x, View)]
    if not views:
        return Probe.sum([x for x in weights if isinstance(x, Probe)], base, names)
    sides = [[x.factors[k] for x in views] for k in (0, 1)]
    shared = [all(f is fs[0] for f in fs) for fs in sides]
    factors = []
    for k, fs in enumerate(sides):
        wide = max((f.dtype for f in fs), key=lambda d: jnp.finfo(d).bits)
        fs = [f.astype(wide) for f in fs]
        if shared[k]:
            factors.append(fs[0])
        elif shared[1 - k]:
            factors.append(functools.reduce(lax.add, fs))
        else:
            factors.append(lax.concatenate(fs, fs[0].ndim - 1))
    if all(shared):  # the same update several times
        factors[1] = factors[1] * jnp.asarray(len(views), factors[1].dtype)
    return View(base, tuple(factors), views[0].roles, names)


def of_one_rank(operands: Sequence[Any], among: Sequence[Any] = ()) -> list[View]:
    """Pad aligned views, and arrays as zero updates, to the rank and dtype of all and `among`."""
    views = [x for x in (*among, *operands) if isinstance(x, View)]
    rank, like = max(x.rank for x in views), views[0]
    wide = [
        max((x.factors[k].dtype for x in views), key=lambda d: jnp.finfo(d).bits) for k in (0, 1)
    ]

    def factor(x: Operand | Deferred | jax.ShapeDtypeStruct, k: int) -> Array:
        if not isinstance(x, View):  # an array's update is zero
            return jnp.zeros((*(x.shape[n] for n in like.axes(k)), rank), wide[k])
        f = x.factors[k]
        f = f if f.dtype == wide[k] else f.astype(wide[k])
        more = [(0, 0, 0)] * (f.ndim - 1) + [(0, rank - x.rank, 0)]
        return f if x.rank == rank else lax.pad(f, jnp.zeros((), f.dtype), more)

    return [
        View(
            x.base if isinstance(x, View) else x,
            (factor(x, 0), factor(x, 1)),
            like.roles,
            x.names if isinstance(x, View) else Names(),
        )
        for x in operands
    ]


def fitted(plan: Sequence[Any], x: Operand) -> Weight:
    """Convert `x`, a weight or an array, to the common type of the aligned weights in `plan`."""
    weights = [w for w in plan if isinstance(w, Weight)]
    if not any(isinstance(w, View) for w in weights):
        return summed([*weights, x], x.base if isinstance(x, Weight) else x)
    (out,) = of_one_rank((aligned([*weights, x]) or [])[-1:], weights)
    return View(out.base, out.factors, out.roles, all_names(weights))
