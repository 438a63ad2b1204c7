"""The walker: evaluates a jaxpr on arrays and weights. It knows the registry, not the rules."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core import Literal as JaxprLiteral
from jax.typing import ArrayLike, DTypeLike

from jlora import _base, _compat
from jlora._paths import describe
from jlora.transform import _registry
from jlora.transform._labeled import AnyArray
from jlora.transform._probe import LOOKED_UP, ready
from jlora.transform._weight import Key, Value, Weight

Fallback = Literal["warn", "error", "materialize"]
Atom = Var | JaxprLiteral
_MOST_COMPILED = 1024


class Use(NamedTuple):
    """One use of a parameter: a product, a lookup or any other operation on it."""

    name: str
    primitive: str
    line: str
    factored: bool
    why: str
    flops: int
    contracted: tuple[int, ...] = ()  # for a probe: the axes that are summed over or indexed
    free: tuple[int, ...] = ()  # for a probe: the axes that the result keeps
    looked_up: bool = False  # for a probe: whether it is a matrix for each token
    base: str = ""  # how a stored weight is used: see `_base.how`


@dataclasses.dataclass(eq=False)
class Settings:
    """The settings of one `lora(fn)`, shared by all its walks."""

    fallback: Fallback = "warn"
    dropout: Any = 0.0
    dtype: Any = None
    observe: Callable[[JaxprEqn, Use], None] | None = None
    # Applied to an equation with a view in place of its rule; `jlora.capture` sets it.
    instead: Callable[["Walk", JaxprEqn, list[Any]], Sequence[Any]] | None = None
    mix: Any = None  # the weights of several adapters in one: see `_mixed`
    warned: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    # Inner functions by their jaxpr: layers that share one are traced once, and eager calls of a
    # jitted function reuse the compiled one.
    compiled: dict[tuple[int, bool], tuple[Any, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Walk:
    """One level of one trace: the settings, and the key that each site's key is derived from."""

    settings: Settings
    key: Key = None
    where: str = ""  # the line of the enclosing call, for equations made by JAX's own code
    sites: int = 0
    # Whether all operands may depend on a tangent, and the variables that do: see `custom`.
    linear: bool = False
    tangents: set[Any] = dataclasses.field(default_factory=set)
    # For each variable made by a broadcast, over axes or over shards: its equation and operand.
    sources: dict[Any, tuple[JaxprEqn, Any]] = dataclasses.field(default_factory=dict)
    # For each variable that updates read: its value, and what they read for it: see `_gain`.
    apart: dict[Any, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def next_key(self) -> Key:
        """Return a key unique to this site and level; None without dropout."""
        if self.key is None:
            return None
        self.sites += 1
        return jax.random.fold_in(self.key, self.sites)

    def inside(self, eqn: JaxprEqn, key: Key) -> "Walk":
        """Return a walk for the body of `eqn`, with the keys of its sites derived from `key`."""
        return Walk(self.settings, key, self.line(eqn), linear=self.moves(eqn))

    def quiet(self, eqn: JaxprEqn) -> "Walk":
        """Return a walk for the body of `eqn` that only determines types, without reports."""
        settings = Settings("materialize", dtype=self.settings.dtype)
        return Walk(settings, where=self.where, linear=self.moves(eqn))

    def moves(self, eqn: JaxprEqn) -> bool:
        """Whether an equation depends on a tangent."""
        return bool(self.tangents) and any(
            v in self.tangents for v in eqn.invars if not isinstance(v, JaxprLiteral)
        )

    def line(self, eqn: JaxprEqn) -> str:
        """Return the user's source line for an equation, or for the call that contains it."""
        return _compat.source_line(eqn) or self.where

    def drop(self, x: AnyArray, atom: Atom) -> Any:
        """Apply dropout to `x`, an adapter's input and the value of `atom`."""
        if self.key is None:
            return x
        rate = self.settings.dropout
        keep = 1.0 - (rate if isinstance(rate, float | int) else jnp.asarray(rate, jnp.float32))
        key: Any = self.next_key()
        eqn, source = self._source(atom, "pvary")
        # Shards that differ get different masks; a replicated input gets the same mask everywhere.
        for axis in _compat.varying_axes(x if eqn is None else source):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        mask = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))

    def narrow_dtype(self, x_dtype: DTypeLike, out_dtype: DTypeLike) -> Any:
        """Return the dtype of the narrow products: `lora(dtype=)`, else the activation's."""
        if self.settings.dtype is not None:
            return self.settings.dtype
        dtype = x_dtype if jnp.issubdtype(x_dtype, jnp.inexact) else out_dtype
        # x A and s·(x A) would overflow in 8 bits and in float16: only x, W and x W fit in them.
        if dtype == jnp.float16:
            return jnp.dtype(jnp.float32)
        return jnp.dtype(jnp.bfloat16) if jnp.finfo(dtype).bits < 16 else dtype

    def used(
        self,
        eqn: JaxprEqn,
        view: Weight,
        flops: Any,
        contracted: Sequence[int],
        free: Sequence[int],
    ) -> None:
        """Report a factored use to the observer."""
        if self.settings.observe is None:
            return
        origins = [view.origins(group) for group in (contracted, free)]
        for name in view.names:
            sides = [tuple(sorted(axis for path, axis in o if path == name)) for o in origins]
            cost, row = flops // len(view.names), (name, LOOKED_UP)
            each = any(isinstance(role, frozenset) and row in role for role in view.roles)
            if any(row in group for group in origins):
                continue  # rows of an embedding, an activation
            primitive, base = eqn.primitive.name, _base.how(eqn, view.base)
            use = Use(
                name, primitive, self.line(eqn), True, "", cost, sides[0], sides[1], each, base
            )
            self.settings.observe(eqn, use)

    def evaluate(self, jaxpr: ClosedJaxpr | Jaxpr | _compat.Body, args: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr on arrays and weights."""
        body = jaxpr if isinstance(jaxpr, _compat.Body) else _compat.body(jaxpr)
        if self.linear:
            self.tangents.update(body.invars)
        env: dict[Any, Any] = {}
        env.update(zip(body.constvars, body.consts, strict=True))
        env.update(zip(body.invars, args, strict=True))

        def read(atom: Atom) -> Any:
            return atom.val if isinstance(atom, JaxprLiteral) else env[atom]

        pairs = zip(body.eqns, _last_uses(body), strict=True)
        # Entering an equation's context (mesh and config) costs more than most equations, so it is
        # entered once for consecutive equations that share it.
        for context, group in itertools.groupby(pairs, key=lambda pair: pair[0].ctx):
            with context.manager:
                for eqn, gone in group:
                    if gone is None:
                        continue
                    operands = [read(v) for v in eqn.invars]
                    with _compat.named_like(eqn):
                        outs = self.apply(eqn, operands)
                    env.update(zip(eqn.outvars, outs, strict=True))
                    if self.moves(eqn):
                        self.tangents.update(eqn.outvars)
                    for dead in gone:
                        env.pop(dead, None)
                        self.sources.pop(dead, None)
        return [read(v) for v in body.outvars]

    def apply(self, eqn: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        """Apply one equation: as it is without weights, else by its rule, else by the fallback."""
        if not any(isinstance(x, Weight) for x in operands):
            if eqn.primitive.name in ("broadcast_in_dim", "pvary"):
                self.sources[eqn.outvars[0]] = (eqn, operands[0])
            return _compat.bind(eqn, *operands)
        rule = _registry.find(eqn)
        operands = ready(operands, None if rule is None else rule.kind)
        if not any(isinstance(x, Weight) for x in operands):
            return _base.bind(eqn, *operands)
        if rule is None or not rule.own:
            repeated = rule is not None and rule.repeated
            operands = [
                x.settled("e" * x.ndim if repeated else ()) if isinstance(x, Weight) else x
                for x in operands
            ]
        if self.settings.instead is not None:
            return self.settings.instead(self, eqn, operands)
        outs = NotImplemented
        # In a tangent only A or only B is linear. In a sum of weights both are, and A B is not.
        if self.moves(eqn) and sum(isinstance(x, Weight) for x in operands) > 1:
            rule = rule if rule is not None and rule.kind in ("call", "custom") else None
        if rule is not None and (rule.takes_gain or not any(map(_gained, operands))):
            outs = rule.fn(self, eqn, *operands)
        if outs is NotImplemented:
            outs = _base.bind(
                eqn, *(self.materialize(eqn, x) if isinstance(x, Weight) else x for x in operands)
            )
        return outs

    def _source(self, atom: Atom, primitive: str) -> tuple[Any, Any]:
        found = None if isinstance(atom, JaxprLiteral) else self.sources.get(atom)
        return found if found and found[0].primitive.name == primitive else (None, None)

    def narrowest(self, atom: Atom, x: ArrayLike) -> Any:
        """Return an operand before broadcasting: axes along which it is constant have size 1."""
        eqn, source = self._source(atom, "broadcast_in_dim")
        if eqn is None:
            return x
        shape = [1] * len(eqn.params["shape"])
        for k, n in zip(eqn.params["broadcast_dimensions"], jnp.shape(source), strict=True):
            shape[k] = n
        return jnp.reshape(source, shape)

    def bind(
        self, eqn: JaxprEqn, *operands: Value | _base.Deferred, weight: bool | None = None
    ) -> list[Any]:
        """Apply an equation's own primitive to the bases of its operands.

        A stored base stays deferred if the results are weights again, which `weight` says and by
        default the kind of the rule.
        """
        rule = _registry.find(eqn)
        if weight is None:
            weight = rule is not None and rule.kind in ("rearrange", "join")
        apply = _base.rearrange if weight else _base.bind
        return apply(eqn, *(x.base if isinstance(x, Weight) else x for x in operands))

    def materialize(self, eqn: JaxprEqn, view: Weight) -> Any:
        """Build a weight for an equation that cannot use the factors; report per `fallback`."""
        if self.settings.mix is not None:
            self.settings.mix.refuse(f'the primitive "{eqn.primitive.name}" at {self.line(eqn)}')
        # A view that has lost one side (a single row) is an activation, not a weight.
        if view.two_sided:
            self._report(eqn, view)
        elif view.rank:
            self.used(eqn, view, 2 * math.prod(view.shape) * view.rank, (), ())
        return view.dense()

    def arrays(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """Materialize the weights among values that must be arrays."""
        return [
            self.materialize(eqn, x) if isinstance(x, Weight) else _base.built(x) for x in values
        ]

    def _report(self, eqn: JaxprEqn, view: Weight) -> None:
        line, primitive = self.line(eqn), eqn.primitive.name
        rule = _registry.find(eqn)
        why = "no factored form" if rule else "no rule for this primitive"
        if rule and view.gain is not None and not rule.takes_gain:
            why = "its rule does not support a weight with DoRA's gain"
        cost = 2 * math.prod(view.shape) * view.rank
        if self.settings.observe is not None:
            for name in view.names:
                base = _base.how(eqn, view.base)
                self.settings.observe(eqn, Use(name, primitive, line, False, why, cost, base=base))
            return
        if self.settings.fallback == "materialize" or (primitive, line) in self.settings.warned:
            return
        size = math.prod(view.shape) * jnp.dtype(view.base.dtype).itemsize
        message = (
            f"`jlora.lora`: {describe(', '.join(view.names), view.base)} must be "
            f'materialized for primitive "{primitive}" at {line} ({why}): building W + s·A·B there '
            f"takes {size:,} bytes and {cost:,} FLOPs per call. "
            "`jlora.explain` lists all such uses. "
            f"Ways out: {_instead(eqn)}; give the parameter the rule "
            'None (or "full"); or accept it with `jlora.lora(fn, fallback="materialize")`.'
        )
        if self.settings.fallback == "error":
            raise ValueError(message)
        self.settings.warned.add((primitive, line))
        warnings.warn(message, UserWarning, stacklevel=2)

    def jitted(self, eqn: JaxprEqn, wrap: Callable[[Any], Any]) -> Any:
        """Return `wrap` of the walked body, `(key, *operands) -> outs`, cached by jaxpr."""
        jaxpr = eqn.params["jaxpr"]

        def walked(key: Key, *operands: Value) -> list[Any]:
            return self.inside(eqn, key).evaluate(jaxpr, operands)

        if self.settings.observe is not None:  # an observer needs every use, not every trace
            return walked
        compiled, by = self.settings.compiled, (id(jaxpr), self.moves(eqn))
        if by not in compiled:
            if len(compiled) >= _MOST_COMPILED:  # a function that creates new jits at each call
                del compiled[next(iter(compiled))]
            compiled[by] = (jaxpr, wrap(walked))
        return compiled[by][1]


def _instead(eqn: JaxprEqn) -> str:
    """Say how to get a factored form, for a primitive without a rule by registering one."""
    way = "rewrite that line as a product with the weight"
    if _registry.find(eqn) is not None:
        return way
    name = _compat.kernel_name(eqn)
    kernel = "" if name is None else f', kernel="{name}"'
    return f'{way}; register a rule, `jlora.transform.rule("{eqn.primitive.name}"{kernel}, ...)`'


def _gained(x: object) -> bool:
    return isinstance(x, Weight) and x.gain is not None


def _last_uses(body: _compat.Body) -> list[list[Any] | None]:
    """Return, per equation, the variables last used by it; None for a dead equation."""
    seen = {v for v in body.outvars if not isinstance(v, JaxprLiteral)}
    dead: list[list[Any] | None] = []
    for eqn in reversed(body.eqns):
        if not eqn.effects and seen.isdisjoint(eqn.outvars):
            dead.append(None)
            continue
        mine = [v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, JaxprLiteral)]
        dead.append([v for v in mine if v not in seen])
        seen.update(mine)
    return dead[::-1]
