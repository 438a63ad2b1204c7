"""Rules for control flow: call the public function again on the walked body.

Views are pytrees, so `jax.jit`, `jax.checkpoint`, `lax.scan`, ... take them as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from jlora import _compat
from jlora.transform._registry import rule
from jlora.transform._view import SIDES, View
from jlora.transform._walk import Walk


@rule("jit", "pjit")
def _jit(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    def wrap(walked: Callable[..., Any]) -> Any:
        walked.__name__ = eqn.params["name"]
        return jax.jit(walked)

    return walk.jitted(eqn, wrap)(walk.next_key(), *operands)


@rule("remat2", "checkpoint", "remat")
def _remat(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    def walked(key: Any, *operands: Any) -> list[Any]:
        return walk.inside(eqn, key).evaluate(eqn.params["jaxpr"], operands)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(walked, policy=policy, prevent_cse=prevent_cse)(
        walk.next_key(), *operands
    )


def _peel(view: View) -> tuple[Any, Callable[[Any], View]]:
    """Split a view into what a scan over its first axis slices, and how to see one slice."""
    has = [view.roles[0] in SIDES[k] for k in range(len(view.factors))]
    scanned = [f for f, h in zip(view.factors, has, strict=True) if h]

    def rebuild(piece: Any) -> View:
        base, sliced = piece[0], iter(piece[1])
        factors = tuple(next(sliced) if h else f for f, h in zip(view.factors, has, strict=True))
        return View(base, factors, view.roles[1:], view.name)

    return (view.base, scanned), rebuild


class _Carry:
    """A loop's carry: views that the body hands on unchanged are constants; others are summed."""

    def __init__(
        self,
        walk: Walk,
        eqn: JaxprEqn,
        init: Sequence[Any],
        ins: Sequence[Any],
        outs: Sequence[Any],
    ) -> None:
        self.fixed = {k: x for k, x in enumerate(init) if isinstance(x, View) and ins[k] is outs[k]}
        self.size = len(init)
        self.init = [
            walk.materialize(eqn, x) if isinstance(x, View) else x
            for k, x in enumerate(init)
            if k not in self.fixed
        ]

    def full(self, moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [self.fixed[k] if k in self.fixed else next(rest) for k in range(self.size)]

    def moving(self, walk: Walk, eqn: JaxprEqn, full: Sequence[Any]) -> list[Any]:
        return arrays(walk, eqn, [x for k, x in enumerate(full) if k not in self.fixed])


def arrays(walk: Walk, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Sum the views among values that must be arrays."""
    return [walk.materialize(eqn, x) if isinstance(x, View) else x for x in values]


@rule("scan")
def _scan(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    p = eqn.params
    body = _compat.body(p["jaxpr"])
    n_consts, n_carry = _compat.scan_arity(p)
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    carry = _Carry(walk, eqn, init, body.invars[n_consts:], body.outvars)
    peeled = {k: _peel(x) for k, x in enumerate(xs) if isinstance(x, View)}
    scanned = [peeled[k][0] if k in peeled else x for k, x in enumerate(xs)]
    key = walk.next_key()
    steps = None if key is None else jnp.arange(p["length"])

    def step(moving: Any, inputs: Any) -> tuple[Any, Any]:
        step_number, pieces = inputs
        inner = walk.inside(eqn, None if key is None else jax.random.fold_in(key, step_number))
        pieces = [peeled[k][1](x) if k in peeled else x for k, x in enumerate(pieces)]
        outs = inner.evaluate(p["jaxpr"], [*consts, *carry.full(moving), *pieces])
        return carry.moving(walk, eqn, outs[:n_carry]), arrays(walk, eqn, outs[n_carry:])

    final, ys = lax.scan(
        step, carry.init, (steps, scanned), p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carry.full(final), *ys]


@rule("while")
def _while(walk: Walk, eqn: JaxprEqn, *operands: Any) -> Any:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    body = _compat.body(p["body_jaxpr"])
    carry = _Carry(walk, eqn, operands[n_cond + n_body :], body.invars[n_body:], body.outvars)
    keys = walk.next_key(), walk.next_key()  # condition and body draw apart

    def inside(key: Any, step_number: Any) -> Walk:
        return walk.inside(eqn, None if key is None else jax.random.fold_in(key, step_number))

    def going(state: Any) -> Any:
        step_number, moving = state
        inner = inside(keys[0], step_number)
        return inner.evaluate(p["cond_jaxpr"], [*cond_consts, *carry.full(moving)])[0]

    def step(state: Any) -> Any:
        step_number, moving = state
        outs = inside(keys[1], step_number).evaluate(
            p["body_jaxpr"], [*body_consts, *carry.full(moving)]
        )
        return None if step_number is None else step_number + 1, carry.moving(walk, eqn, outs)

    start = None if walk.key is None else jnp.zeros((), jnp.int32)
    return carry.full(lax.while_loop(going, step, (start, carry.init))[1])


@rule("cond")
def _cond(walk: Walk, eqn: JaxprEqn, index: Any, *operands: Any) -> Any:
    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        def walked(key: Any, *operands: Any) -> list[Any]:
            return arrays(walk, eqn, walk.inside(eqn, key).evaluate(jaxpr, operands))

        return walked

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    return lax.switch(index, branches, walk.next_key(), *operands)
