"""Rules for control flow: call JAX's public function again on the walked body.

Views are pytrees, so `jax.jit`, `jax.checkpoint` and `lax.scan` accept them directly.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import Sharding
from jax.typing import ArrayLike

from jlora import _compat
from jlora._paths import describe
from jlora.transform import _registry
from jlora.transform._join import aligned, fitted
from jlora.transform._loops import Scan, While, carried_on, peeled
from jlora.transform._probe import unadapted
from jlora.transform._registry import rule
from jlora.transform._walk import Walk
from jlora.transform._weight import Key, Value, Weight


@rule("jit", kind="call", own=True, body="jaxpr")
def _jit(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    p = eqn.params

    def wrap(walked: Callable[..., Any]) -> Any:
        def constrained(key: Key, *operands: Value) -> list[Any]:
            return _constrained(
                walked(key, *_constrained(operands, p["in_shardings"])), p["out_shardings"]
            )

        constrained.__name__ = p["name"]
        return jax.jit(constrained)

    return walk.jitted(eqn, wrap)(walk.next_key(), *operands)


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Apply the `in_shardings` or `out_shardings` of a `jax.jit` to arrays; leave factors free."""
    return [
        x
        if isinstance(x, Weight) or not isinstance(sharding, Sharding)
        else lax.with_sharding_constraint(x, sharding)
        for x, sharding in zip(values, shardings, strict=True)
    ]


@rule("remat2", kind="call", own=True, body="jaxpr")
def _remat(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    def walked(key: Key, *operands: Value) -> list[Any]:
        return walk.inside(eqn, key).evaluate(eqn.params["jaxpr"], operands)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(walked, policy=policy, prevent_cse=prevent_cse)(
        walk.next_key(), *operands
    )


class _Carry:
    """The carry of a loop: an entry stays a weight if the body returns a weight of the same type.

    An entry that the body returns unchanged is a constant of the loop. Any other entry that starts
    as a view must come back as a view with the same roles, rank and dtypes, because the type of a
    carry is fixed. Whether it does depends on the other entries: once one of them is materialized,
    a product with it is no longer a view. So find a fixpoint from above: start with all weights,
    trace one step on their shapes, materialize the entries that did not keep their type, and
    repeat until all do. Each round materializes at least one, so there are at most as many rounds
    as weights. Entries are never turned back into weights; if two sets are mapped to themselves
    (x + y has the rank of x only if y is an array), the result need not be the larger one.
    """

    def __init__(
        self,
        walk: Walk,
        eqn: JaxprEqn,
        loop: Scan | While,
        step: Callable[[Sequence[Any]], Sequence[Any]],
    ) -> None:
        self.fixed = carried_on(loop)
        self.size, self.walk, self.eqn = len(loop.init), walk, eqn
        self.init = self._moving(loop.init)
        while any(isinstance(x, Weight) for x in self.init):
            after = jax.eval_shape(lambda xs: self._moving(step(self.full(xs))), self.init)
            stays = [_alike(x, y) for x, y in zip(self.init, after, strict=True)]
            if all(stays):
                break
            self.init = [
                x if same else walk.arrays(eqn, [x])[0]
                for x, same in zip(self.init, stays, strict=True)
            ]

    def full(self, moving: Sequence[Any]) -> list[Any]:
        rest = iter(moving)
        return [self.fixed[k] if k in self.fixed else next(rest) for k in range(self.size)]

    def _moving(self, full: Sequence[Any]) -> list[Any]:
        return _built([x for k, x in enumerate(full) if k not in self.fixed])

    def moving(self, full: Sequence[Any]) -> list[Any]:
        return [
            x if isinstance(start, Weight) else self.walk.arrays(self.eqn, [x])[0]
            for start, x in zip(self.init, self._moving(full), strict=True)
        ]


def _built(values: Sequence[Any]) -> list[Any]:
    """Build the bases of weights in a loop's carry or in a branch's outputs."""
    return [
        x.dense() if unadapted(x) else x.with_built_base() if isinstance(x, Weight) else x
        for x in values
    ]


def _alike(x: Value, y: object) -> bool:
    """Whether a carry that starts as `x` may become `y`: arrays, or weights of one type."""
    if not isinstance(x, Weight):
        return True
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        jnp.shape(a) == jnp.shape(b) and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


@rule("scan", kind="call", own=True)
def _scan(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    loop = Scan.of(eqn, operands)
    kept = [[x.settled() if isinstance(x, Weight) else x for x in xs] for xs in loop[1:3]]
    loop = loop._replace(consts=kept[0], init=kept[1])  # not what is scanned: see `View.peeled`
    body, n_carry = _compat.body(loop.jaxpr), len(loop.init)
    for x in loop.xs:
        if isinstance(x, Weight):
            _doubt_stack(walk, eqn, x)
    scanned, rebuild = peeled(loop.xs)
    quiet = walk.quiet(eqn)

    def once(full: Sequence[Any]) -> list[Any]:
        slices = jax.tree.map(  # with length 0 there is no first slice, only its shape
            lambda x: x[0] if len(x) else jnp.zeros(x.shape[1:], x.dtype), scanned
        )
        return quiet.evaluate(body, [*loop.consts, *full, *rebuild(slices)])[:n_carry]

    carry = _Carry(walk, eqn, loop, once)
    key = walk.next_key()
    steps = None if key is None else jnp.arange(loop.length)

    def step(moving: Sequence[Any], inputs: tuple[Any, Any]) -> tuple[Any, Any]:
        step_number, pieces = inputs
        inner = walk.inside(eqn, None if key is None else jax.random.fold_in(key, step_number))
        args = [*loop.consts, *carry.full(moving), *rebuild(pieces)]
        outs = inner.evaluate(loop.jaxpr, args)
        return carry.moving(outs[:n_carry]), _built(outs[n_carry:])

    final, ys = loop.run(step, carry.init, (steps, scanned))
    stacked = [
        y.remade(y.base, y.components, (y.new_role, *y.roles)) if isinstance(y, Weight) else y
        for y in ys
    ]
    return [*carry.full(final), *stacked]


def _doubt_stack(walk: Walk, eqn: JaxprEqn, view: Weight) -> None:
    """Warn if stacked layers are read as a side of a convolution, the default in 4-D."""
    silent = walk.settings.fallback == "materialize" or walk.settings.observe is not None
    site = ("stack", walk.line(eqn))
    if silent or site in walk.settings.warned:
        return
    if view.ndim < 4 or view.roles[0] not in ("i", "o"):
        return
    walk.settings.warned.add(site)
    side, shared = ("input", "B") if view.roles[0] == "i" else ("output", "A")
    message = (
        f"`jlora.lora`: {describe(', '.join(view.names), view.base)} is scanned along its "
        f"first axis at {site[1]}, but its layout marks that axis as an {side}, so all layers "
        f"share one {shared}. Infer from the program which axes are layers: "
        "`jlora.attach(..., layouts=jlora.layouts(fn, params, x))`."
    )
    warnings.warn(message, UserWarning, stacklevel=2)


@rule("while", kind="call")
def _while(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    loop = While.of(eqn, operands)
    body, quiet = _compat.body(loop.jaxpr), walk.quiet(eqn)
    # Under `vmap` each lane has its own condition. The loop runs while any of them holds, and lanes
    # that are done keep their state by a select, so everything in the moving carry is an array.
    lanes = bool(_compat.body(loop.condition).outvars[0].aval.shape)

    def once(full: Sequence[Any]) -> list[Any]:
        outs = quiet.evaluate(body, [*loop.consts, *full])
        return quiet.arrays(eqn, outs) if lanes else outs

    carry = _Carry(walk, eqn, loop, once)
    keys = walk.next_key(), walk.next_key()  # separate keys for condition and body

    def inside(key: Key, step_number: Any) -> Walk:
        return walk.inside(eqn, None if key is None else jax.random.fold_in(key, step_number))

    def condition(state: tuple[Any, Any]) -> Any:
        step_number, moving = state
        args = [*loop.condition_consts, *carry.full(moving)]
        return inside(keys[0], step_number).evaluate(loop.condition, args)[0]

    def going(state: tuple[Any, Any]) -> Any:
        return jnp.any(condition(state)) if lanes else condition(state)

    def step(state: tuple[Any, Any]) -> Any:
        step_number, moving = state
        args = [*loop.consts, *carry.full(moving)]
        moved = carry.moving(inside(keys[1], step_number).evaluate(loop.jaxpr, args))
        if lanes:
            goes = condition(state)
            moved = [
                lax.select(lax.broadcast_in_dim(goes, x.shape, range(goes.ndim)), x, before)
                for x, before in zip(moved, moving, strict=True)
            ]
        return None if step_number is None else step_number + 1, moved

    start = None if walk.key is None else jnp.zeros((), jnp.int32)
    return carry.full(lax.while_loop(going, step, (start, carry.init))[1])


@rule("cond", kind="call")
def _cond(walk: Walk, eqn: JaxprEqn, index: ArrayLike, *operands: Value) -> Any:
    settle = _agreement(walk, eqn, operands)

    def branch(jaxpr: ClosedJaxpr | Jaxpr) -> Callable[..., list[Any]]:
        def walked(key: Key, *operands: Value) -> list[Any]:
            return settle(_settled(walk.inside(eqn, key).evaluate(jaxpr, operands)))

        return walked

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return lax.switch(index, branches, walk.next_key(), *operands)
    # From `lax.platform_dependent`: branches for other platforms must not be compiled here.
    pairs = list(zip(platforms, branches, strict=True))
    by_name = {name: walked for names, walked in pairs for name in names or ()}
    rest = next((walked for names, walked in pairs if names is None), None)
    return lax.platform_dependent(walk.next_key(), *operands, default=rest, **by_name)


def _agreement(walk: Walk, eqn: JaxprEqn, operands: Sequence[Any]) -> Callable[..., list[Any]]:
    """Return a function that gives the branches' outputs one type, views where possible."""

    def arrays(outs: Sequence[Any]) -> list[Any]:
        return walk.arrays(eqn, outs)

    branches = [_compat.body(jaxpr) for jaxpr in eqn.params["branches"]]
    if not any(_may_return_views(body, operands) for body in branches):
        return arrays
    quiet = walk.quiet(eqn)
    kinds = [
        jax.eval_shape(lambda *xs, b=b: _settled(quiet.evaluate(b, xs)), *operands)
        for b in branches
    ]
    plans = [aligned(outs) if _joinable(outs) else None for outs in zip(*kinds, strict=True)]
    if not any(plans):
        return arrays

    def settle(outs: Sequence[Any]) -> list[Any]:
        return [
            fitted(plan, x) if plan else walk.arrays(eqn, [x])[0]
            for plan, x in zip(plans, outs, strict=True)
        ]

    return settle


def _settled(outs: Sequence[Any]) -> list[Any]:
    """Turn broadcast axes into stack axes, and build the bases."""
    return _built([x.settled() if isinstance(x, Weight) else x for x in outs])


def _joinable(values: Sequence[Any]) -> bool:
    """Whether one view can represent all of these; those with a gain cannot be joined."""
    views = [x for x in values if isinstance(x, Weight)]
    return bool(views) and all(x.gain is None for x in views)


def _may_return_views(body: _compat.Body, operands: Sequence[Any]) -> bool:
    """Whether an output may still be a weight, judged from the equations without tracing."""
    weights = {v for v, x in zip(body.invars, operands, strict=True) if isinstance(x, Weight)}
    for e in body.eqns:
        found = _registry.find(e)
        if found is not None and found.kind == "product":
            continue
        if any(not isinstance(v, Literal) and v in weights for v in e.invars):
            weights.update(e.outvars)
    return any(not isinstance(v, Literal) and v in weights for v in body.outvars)
