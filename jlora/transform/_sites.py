"""The walk of `jlora.capture`: sum over the inputs of each product of a weight.

The function is walked on the base weights. A note is a scalar whose derivative with respect to A is
a product's sums. They are thus propagated to the parameters as gradients are, through all slices,
joins and transposes of the weight. The model itself is not differentiated, and a loop accumulates
the sums of its own body.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.typing import ArrayLike

from jlora import _compat
from jlora._base import built
from jlora.transform import _registry
from jlora.transform._inputs import Sums
from jlora.transform._labeled import AnyArray
from jlora.transform._loops import Scan, While, carried_on, peeled
from jlora.transform._view import View
from jlora.transform._walk import Walk
from jlora.transform._weight import Value


class Sites:
    """The state of one capture.

    Attributes:
        met: the paths of weights whose inputs were summed.
        missed: the primitive and source line of a use without inputs, by path of the weight.
    """

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.missed: dict[str, str] = {}
        self._notes: list[Sums] = []

    def apply(self, walk: Walk, eqn: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        """Apply an equation with a view among its operands to the bases; return views if it can."""
        name, rule = eqn.primitive.name, _registry.find(eqn)
        if rule is not None and rule.body is not None:
            # The model is not differentiated, so a custom rule does not apply: walk the body.
            return walk.inside(eqn, None).evaluate(eqn.params[rule.body], operands)
        loop = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
        if loop is not None:
            return loop(walk, eqn, *operands)
        if rule is not None and rule.sums is not None and self._product(eqn, rule.sums, operands):
            return walk.bind(eqn, *operands)
        views = [x for x in operands if isinstance(x, View)]
        if name == "stop_gradient":  # but propagate the sums
            return [views[0].over(walk.bind(eqn, *operands)[0])]
        followed = rule is not None and rule.kind in ("rearrange", "join")
        outs = rule.fn(walk, eqn, *operands) if rule and followed else NotImplemented
        if outs is NotImplemented or not any(isinstance(x, View) for x in outs):
            for path in (path for view in views for path in view.names):
                self.missed.setdefault(path, f"{name} at {walk.line(eqn)}")
            return walk.bind(eqn, *operands)
        if all(isinstance(x, View) for x in outs):
            return outs
        arrays = walk.bind(eqn, *operands)
        return [x if isinstance(x, View) else y for x, y in zip(outs, arrays, strict=True)]

    def pulled(
        self, walk: Walk, jaxpr: ClosedJaxpr | Jaxpr, args: Sequence[Any]
    ) -> tuple[list[Any], dict[int, Sums]]:
        """Walk a jaxpr; return its outputs as arrays, and the sums for each view in `args`."""
        views = {k: x for k, x in enumerate(args) if isinstance(x, View)}

        def run(probes: dict[int, Any]) -> tuple[Sums, list[Any]]:
            outer, self._notes = self._notes, [Sums(*(jnp.zeros(()) for _ in range(3)))]
            filled = [_with(x, probes[k]) if k in views else x for k, x in enumerate(args)]
            outs = walk.evaluate(jaxpr, filled)
            notes, self._notes = self._notes, outer
            return jax.tree.map(lambda *xs: sum(xs), *notes), _arrays(outs)

        probes = {k: lax.stop_gradient(x.parts[0]) for k, x in views.items()}
        notes, pull, outs = jax.vjp(run, probes, has_aux=True)
        second, total, count = (
            pull(Sums(*(jnp.full_like(x, k == n) for n, x in enumerate(notes))))[0]
            for k in range(len(notes))
        )
        return outs, {
            k: Sums(
                second[k],
                total[k][..., :1],  # the same at every rank
                (count[k] * probes[k]).sum(_ins(x), keepdims=True),
            )
            for k, x in views.items()
        }

    def _product(self, eqn: JaxprEqn, summed: Callable[..., Any], operands: list[Any]) -> bool:
        """Note the sums over a product's inputs; return whether it contracts any."""
        operands = [x.settled() if isinstance(x, View) and "e" in x.roles else x for x in operands]
        views = [x for x in operands if isinstance(x, View)]
        sums = summed(eqn, *operands) if len(views) == 1 else None
        if sums is None:
            return False
        self._note(views[0], sums)
        self.met.update(views[0].names)
        return True

    def _note(self, view: View, sums: Sums) -> None:
        """Note sums that have the axes of the view's A."""
        a = view.parts[0]
        # <A, count> is the count at each rank, even if A was scaled or rows of it were dropped.
        square = (a * a).sum(_ins(view), keepdims=True)
        count = jnp.where(square == 0, 0.0, sums.count * a / jnp.where(square == 0, 1.0, square))
        fixed = (lax.stop_gradient(x) for x in (sums.second, sums.total, count))
        self._notes.append(Sums(*((x.astype(a.dtype) * a).sum() for x in fixed)))

    def _scan(self, walk: Walk, eqn: JaxprEqn, *operands: Value) -> list[Any]:
        loop, inner = Scan.of(eqn, operands), walk.inside(eqn, None)
        n, first = len(loop.init), len(loop.consts) + len(loop.init)
        held = _held(loop)
        sliced = {first + k: x for k, x in enumerate(loop.xs) if isinstance(x, View)}
        by_step = {k for k, x in sliced.items() if 0 in x.axes(0)}
        scanned, rebuild = peeled(loop.xs)

        def step(state: tuple[Any, Any], pieces: Sequence[Any]) -> Any:
            carry, sums = state
            args = [*_arrays(loop.consts), *carry, *rebuild(pieces)]
            for k, x in held.items():
                args[k] = x
            outs, found = self.pulled(inner, loop.jaxpr, args)
            sums = {k: jax.tree.map(jnp.add, sums[k], found[k]) for k in sums}
            return (outs[:n], sums), (outs[n:], {k: found[k] for k in by_step})

        views = {**held, **sliced}
        start = {k: _zeros(x) for k, x in views.items() if k not in by_step}
        xs = lax.stop_gradient(scanned)
        (carry, sums), (ys, stacked) = loop.run(step, (_arrays(loop.init), start), xs)
        for k, found in (*sums.items(), *stacked.items()):
            self._note(operands[k], found)
        return [*carry, *ys]

    def _while(self, walk: Walk, eqn: JaxprEqn, *operands: Value) -> list[Any]:
        loop, inner = While.of(eqn, operands), walk.inside(eqn, None)
        condition, held = _compat.body(loop.condition), _held(loop)

        def going(state: Sequence[Any]) -> Any:
            args = [*_arrays(loop.condition_consts), *state[0]]
            return walk.quiet(eqn).evaluate(condition, args)[0]

        def step(state: Sequence[Any]) -> Any:
            args = [*_arrays(loop.consts), *state[0]]
            for k, x in held.items():
                args[k] = x
            outs, found = self.pulled(inner, loop.jaxpr, args)
            return outs, {k: jax.tree.map(jnp.add, x, found[k]) for k, x in state[1].items()}

        start = {k: _zeros(x) for k, x in held.items()}
        carry, sums = lax.while_loop(going, step, (_arrays(loop.init), start))
        seen = [*loop.consts, *loop.init]
        for k, found in sums.items():
            self._note(seen[k], found)
        return carry

    def _cond(self, walk: Walk, eqn: JaxprEqn, index: ArrayLike, *operands: Value) -> list[Any]:
        args = [_fixed(x) if isinstance(x, View) else x for x in operands]
        branches = [
            functools.partial(self.pulled, walk.inside(eqn, None), jaxpr, args)
            for jaxpr in eqn.params["branches"]
        ]
        outs, sums = lax.switch(index, branches)
        for k, found in sums.items():
            self._note(operands[k], found)
        return outs


def _arrays(values: Sequence[Any]) -> list[Any]:
    return [built(x.base) if isinstance(x, View) else x for x in values]


def _with(view: View, a: AnyArray) -> View:
    return dataclasses.replace(view, parts=(a, *view.parts[1:]))


def _fixed(view: View) -> View:
    """Stop the derivative: the sums of a loop are noted after the loop."""
    return _with(view, lax.stop_gradient(view.parts[0]))


def _held(loop: Scan | While) -> dict[int, View]:
    """Return the views that are the same in every step of a loop, by position in its body."""
    first = len(loop.consts)
    held = {**dict(enumerate(loop.consts)), **{first + k: x for k, x in carried_on(loop).items()}}
    return {k: _fixed(x) for k, x in held.items() if isinstance(x, View)}


def _zeros(view: View) -> Sums:
    a = jnp.zeros_like(view.parts[0])
    return Sums(a, a[..., :1], a.sum(_ins(view), keepdims=True))


def _ins(view: View) -> tuple[int, ...]:
    """Return which axes of A are inputs."""
    return tuple(n for n, k in enumerate(view.axes(0)) if view.roles[k] == "i")
