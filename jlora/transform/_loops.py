"""The structure of `scan` and `while` equations: their operands, and how to run another body.

Shared by the rules in `control`, which carry weights from step to step, and by `jlora.capture`,
which accumulates sums.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import PyTree

from jlora import _base, _compat
from jlora.transform._weight import W, Weight


class Scan(NamedTuple):
    """A scan: `jaxpr` maps constants, carry and a slice of each of `xs` to carry and outputs."""

    jaxpr: Any
    consts: Sequence[Any]
    init: Sequence[Any]
    xs: Sequence[Any]
    length: int
    reverse: bool
    unroll: int

    @classmethod
    def of(cls, eqn: JaxprEqn, operands: Sequence[Any]) -> "Scan":
        """Read an equation."""
        p, (consts, carry) = eqn.params, _compat.scan_arity(eqn.params)
        first = consts + carry
        groups = operands[:consts], operands[consts:first], operands[first:]
        return cls(p["jaxpr"], *groups, p["length"], p["reverse"], p["unroll"])

    def run(self, step: Callable[[Any, Any], Any], init: PyTree, xs: PyTree) -> Any:
        """Scan as the equation does, with another body."""
        return lax.scan(step, init, xs, self.length, reverse=self.reverse, unroll=self.unroll)


class While(NamedTuple):
    """A while loop: `jaxpr` maps constants and carry to the carry, while `condition` holds."""

    jaxpr: Any
    consts: Sequence[Any]
    init: Sequence[Any]
    condition: Any
    condition_consts: Sequence[Any]

    @classmethod
    def of(cls, eqn: JaxprEqn, operands: Sequence[Any]) -> "While":
        """Read an equation."""
        p, n = eqn.params, eqn.params["cond_nconsts"]
        first = n + p["body_nconsts"]
        bodies = p["body_jaxpr"], p["cond_jaxpr"]
        return cls(bodies[0], operands[n:first], operands[first:], bodies[1], operands[:n])


def carried_on(loop: Scan | While) -> dict[int, Weight]:
    """Return the weights of the carry that the body returns unchanged, by position in the carry."""
    body, first = _compat.body(loop.jaxpr), len(loop.consts)
    return {
        k: x
        for k, x in enumerate(loop.init)
        if isinstance(x, Weight) and body.invars[first + k] is body.outvars[k]
    }


def peeled(xs: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """Split operands into what a scan slices, and a function that rebuilds them from one slice."""
    pairs = [_peel(x) if isinstance(x, Weight) else (x, lambda piece: piece) for x in xs]

    def rebuild(pieces: Sequence[Any]) -> list[Any]:
        return [see(piece) for (_, see), piece in zip(pairs, pieces, strict=True)]

    return [scanned for scanned, _ in pairs], rebuild


def _peel(weight: W) -> tuple[Any, Callable[[Any], W]]:
    """Split a weight into the arrays that have its first axis, and a function that rebuilds it."""
    arrays, has, rebuild = weight.peeled()
    scanned = [f for f, h in zip(arrays, has, strict=True) if h]
    layers, layer_of = _base.peel(weight.base)

    def see(piece: tuple[Any, Any]) -> W:
        base, sliced = layer_of(piece[0]), iter(piece[1])
        return rebuild(base, [next(sliced) if h else f for f, h in zip(arrays, has, strict=True)])

    return (layers, scanned), see
