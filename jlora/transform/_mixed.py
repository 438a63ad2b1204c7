"""The updates of several adapters in one product, each with its own weight for each example.

    x·W + Σ_n m[n] · ((x·A[n]) B[n])  =  x·W + ((x·A) ∘ m)·B

A and B have the ranks of all adapters, and these alternate: component q of the rank belongs to
adapter `q % N`. So the weights m apply to any view whose ranks were padded, repeated or joined.
Only products know m: other operations raise `Unmixed`, and the caller chooses another form.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jlora.transform import _registry
from jlora.transform._form import TOKENS, Form, places
from jlora.transform._labeled import AnyArray, Labels, contract, expanded
from jlora.transform._view import RANK, View, narrowed, plus
from jlora.transform._walk import Settings, Walk
from jlora.transform._weight import Weight

Sizes = dict[Any, int]
_KINDS = ("rearrange", "call", "join")
_EXCLUDED = ("shard_map", "while")  # their bodies cannot close over the weights


class Unmixed(Exception):
    """An operation that has no form for several adapters at once."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """The weights of N adapters.

    Attributes:
        weights: `(*tokens, N)`: one set of weights, or one per token; the tokens' axes are the
            first axes of every activation that meets a weight.
        most: raise `Unmixed` at a product with more tokens than this.
    """

    weights: Array
    most: int | None = None

    def refuse(self, what: str) -> None:
        """Raise `Unmixed`."""
        raise Unmixed(what)

    def updated(
        self, form: Form, free: Labels, view: View, base: AnyArray, x: AnyArray, sizes: Sizes
    ) -> Array:
        """Return `base + ((x·A) ∘ m)·B` for an x whose free axes are `free`."""
        (*tokens, n), shape = self.weights.shape, [sizes[k] for k in free]
        if self.most is not None and math.prod(shape) > self.most:
            self.refuse("a product with more tokens")
        if shape[: len(tokens)] != tokens:
            self.refuse(f"a product with an activation whose axes are {shape}, not {tokens}")
        m = jnp.tile(self.weights, view.rank // n)
        labels: Labels = (*free[: len(tokens)], RANK)
        if tokens and TOKENS in form.x:  # all free axes of x, as one
            m = m.reshape(*tokens, *(1,) * (len(free) - len(tokens)), view.rank)
            m = jnp.broadcast_to(m, (*shape, view.rank)).reshape(-1, view.rank)
            labels = (TOKENS, RANK)
        return _low_rank(base, x, view.parts, m, form, labels)


@functools.partial(jax.jit, static_argnames=("form", "labels"))
def _low_rank(
    base: AnyArray, x: AnyArray, parts: tuple[Any, ...], m: AnyArray, form: Form, labels: Labels
) -> Array:
    """Return x·W + (m ∘ s·(x·A))·B, where `base` is x·W."""
    pair, s = parts[:2], parts[2:]
    x = narrowed(lax.reshape(x, form.x_shape), form.dtype)
    of, last = form.factors[form.first], form.factors[1 - form.first]
    narrow, wide = places(base, x, form)
    z = contract(x, form.x, pair[form.first], of, form.between, form.precision, narrow)
    z = z * expanded(narrowed(m, z.dtype), labels, form.between)
    if s:
        axes = [*(k for k in of if k in last and k != RANK), RANK]
        z = z * narrowed(expanded(s[0], axes[-s[0].ndim :], form.between), z.dtype)
    z = narrowed(z, form.dtype)
    other, how = pair[1 - form.first], (last, form.out, form.precision, wide)
    update = contract(z, form.between, other, *how)
    return plus(base, lax.reshape(update, base.shape))


def settings_of(settings: Settings, mix: Mix) -> Settings:
    """Return settings under which products use `mix`, and other operations raise `Unmixed`."""
    return dataclasses.replace(settings, mix=mix, instead=_apply, compiled={}, warned=set())


def _apply(walk: Walk, eqn: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
    """Apply the rule of an equation that keeps the ranks apart, or of a product with one weight."""
    rule, name = _registry.find(eqn), eqn.primitive.name
    several = sum(isinstance(x, Weight) for x in operands) > 1
    if name == "dot_general" and not several:
        allowed = True
    else:
        allowed = rule is not None and rule.kind in _KINDS and name not in _EXCLUDED
    outs = rule.fn(walk, eqn, *operands) if allowed and rule is not None else NotImplemented
    if outs is NotImplemented or (name == "gather" and not isinstance(outs[0], Weight)):
        raise Unmixed(f'the primitive "{name}" at {walk.line(eqn)}')
    return outs
