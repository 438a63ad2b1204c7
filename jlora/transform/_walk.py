"""The walker: evaluate a jaxpr with views among its values. Knows the registry, not the rules."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.extend.core import Literal as JaxprLiteral

from jlora import _base, _compat
from jlora._paths import describe
from jlora.transform import _registry
from jlora.transform._probe import unadapted
from jlora.transform._weight import Weight

Fallback = Literal["warn", "error", "materialize"]
_MOST_COMPILED = 1024


class Use(NamedTuple):
    """One place where the program multiplies, looks up or otherwise reads a parameter."""

    name: str
    primitive: str
    line: str
    factored: bool
    why: str
    flops: int
    contracted: tuple[int, ...] = ()  # of a probe: the axes that are summed over or indexed
    free: tuple[int, ...] = ()  # of a probe: the axes that the result keeps


@dataclasses.dataclass(eq=False)
class Settings:
    """What one `lora(fn)` holds for all its walks."""

    fallback: Fallback = "warn"
    dropout: float = 0.0
    dtype: Any = None
    observe: Callable[[JaxprEqn, Use], None] | None = None
    # What applies an equation that meets a view, in place of its rule: `jlora.capture` does.
    instead: Callable[["Walk", JaxprEqn, list[Any]], Sequence[Any]] | None = None
    told: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    # Walked inner functions, by the jaxpr they came from: layers that share one are traced once,
    # and an eager call of a jitted function finds its compiled self again.
    compiled: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Walk:
    """One level of one trace: the settings, and the key from which each site draws its own."""

    settings: Settings
    key: Any = None
    where: str = ""  # the enclosing call's line, for equations that JAX's own code made
    sites: int = 0
    # What was repeated to make an array, by variable: along axes, or over the shards of a mesh.
    sources: dict[Any, tuple[JaxprEqn, Any]] = dataclasses.field(default_factory=dict)

    def next_key(self) -> Any:
        """Return a key that no other site of this level has; None without dropout."""
        if self.key is None:
            return None
        self.sites += 1
        return jax.random.fold_in(self.key, self.sites)

    def inside(self, eqn: JaxprEqn, key: Any) -> "Walk":
        """Return a walk of `eqn`'s inner body, whose sites draw from `key`."""
        return Walk(self.settings, key, self.line(eqn))

    def quiet(self) -> "Walk":
        """Return a walk that only finds out what comes of views: no report, no dropout."""
        settings = Settings("materialize", dtype=self.settings.dtype)
        return Walk(settings, where=self.where)

    def line(self, eqn: JaxprEqn) -> str:
        """Return the user's line that made an equation, or that called what made it."""
        return _compat.source_line(eqn) or self.where

    def drop(self, x: Any, atom: Any) -> Any:
        """Apply dropout to an adapter's input, the value of `atom`."""
        if self.key is None:
            return x
        keep, key = 1.0 - self.settings.dropout, self.next_key()
        eqn, source = self._source(atom, "pvary")
        # The shards of an input are not dropped alike; one that all have is dropped as one.
        for axis in _compat.varying_axes(x if eqn is None else source):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        mask = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(mask, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))

    def narrow_dtype(self, x_dtype: Any, out_dtype: Any) -> Any:
        """Return the dtype of the narrow products: the option's, else the activation's."""
        if self.settings.dtype is not None:
            return self.settings.dtype
        dtype = x_dtype if jnp.issubdtype(x_dtype, jnp.inexact) else out_dtype
        # x A overflows in 8 bits, where whoever wrote the model scaled x and W to fit.
        return jnp.dtype(jnp.bfloat16) if jnp.finfo(dtype).bits < 16 else dtype

    def used(
        self,
        eqn: JaxprEqn,
        view: Weight,
        flops: Any,
        contracted: Sequence[int],
        free: Sequence[int],
    ) -> None:
        """Tell the observer of a factored use."""
        if self.settings.observe is None:
            return
        origins = [view.origins(group) for group in (contracted, free)]
        for name in view.names:
            sides = [tuple(sorted(axis for path, axis in o if path == name)) for o in origins]
            cost = flops // len(view.names)
            use = Use(name, eqn.primitive.name, self.line(eqn), True, "", cost, *sides)
            self.settings.observe(eqn, use)

    def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Run a jaxpr on arrays and views."""
        body = jaxpr if isinstance(jaxpr, _compat.Body) else _compat.body(jaxpr)
        env: dict[Any, Any] = {}
        env.update(zip(body.constvars, body.consts, strict=True))
        env.update(zip(body.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, JaxprLiteral) else env[atom]

        pairs = zip(body.eqns, _last_uses(body), strict=True)
        # Entering an equation's context (its mesh, its settings) costs more than most equations.
        for context, group in itertools.groupby(pairs, key=lambda pair: pair[0].ctx):
            with context.manager:
                for eqn, gone in group:
                    if gone is None:
                        continue
                    operands = [read(v) for v in eqn.invars]
                    with _compat.named_like(eqn):
                        outs = self.apply(eqn, operands)
                    env.update(zip(eqn.outvars, outs, strict=True))
                    for dead in gone:
                        env.pop(dead, None)
                        self.sources.pop(dead, None)
        return [read(v) for v in body.outvars]

    def apply(self, eqn: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        """Apply one equation: its own primitive without views, else its rule, else the fallback."""
        if not any(isinstance(x, Weight) for x in operands):
            if eqn.primitive.name in ("broadcast_in_dim", "pvary"):
                self.sources[eqn.outvars[0]] = (eqn, operands[0])
            return _compat.bind(eqn, *operands)
        rule = _registry.find(eqn)
        operands = _stored_for(rule, eqn, operands)
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
        if rule is not None and (rule.takes_gain or not any(map(_gained, operands))):
            outs = rule.fn(self, eqn, *operands)
        if outs is NotImplemented:
            outs = _base.bind(
                eqn, *(self.materialize(eqn, x) if isinstance(x, Weight) else x for x in operands)
            )
        return outs

    def _source(self, atom: Any, primitive: str) -> tuple[Any, Any]:
        found = None if isinstance(atom, JaxprLiteral) else self.sources.get(atom)
        return found if found and found[0].primitive.name == primitive else (None, None)

    def narrowest(self, atom: Any, x: Any) -> Any:
        """Return an operand as it was before it was broadcast: size 1 where it does not vary."""
        eqn, source = self._source(atom, "broadcast_in_dim")
        if eqn is None:
            return x
        shape = [1] * len(eqn.params["shape"])
        for k, n in zip(eqn.params["broadcast_dimensions"], jnp.shape(source), strict=True):
            shape[k] = n
        return jnp.reshape(source, shape)

    def bind(self, eqn: JaxprEqn, *operands: Any, weight: bool | None = None) -> list[Any]:
        """Apply an equation's own primitive to the bases of its operands.

        A stored base is not built where the results are weights again: as the rule's kind says, or
        `weight`.
        """
        rule = _registry.find(eqn)
        if weight is None:
            weight = rule is not None and rule.kind in ("rearrange", "join")
        apply = _base.rearrange if weight else _base.bind
        return apply(eqn, *(x.base if isinstance(x, Weight) else x for x in operands))

    def materialize(self, eqn: JaxprEqn, view: Weight) -> Any:
        """Build a view's weight because `eqn` needs it whole, and say so as the fallback asks."""
        # A view that has lost one side (a row that was sliced out) is an activation, not a weight.
        if view.two_sided:
            self._report(eqn, view)
        elif view.rank:
            self.used(eqn, view, 2 * math.prod(view.shape) * view.rank, (), ())
        return view.dense()

    def arrays(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """Build the views among values that must be arrays."""
        return [
            self.materialize(eqn, x) if isinstance(x, Weight) else _base.built(x) for x in values
        ]

    def _report(self, eqn: JaxprEqn, view: Weight) -> None:
        line, primitive = self.line(eqn), eqn.primitive.name
        rule = _registry.find(eqn)
        why = "no factored form" if rule else "no rule for this primitive"
        if rule and view.gain is not None and not rule.takes_gain:
            why = "its rule takes no weight with DoRA's gain"
        cost = 2 * math.prod(view.shape) * view.rank
        if self.settings.observe is not None:
            for name in view.names:
                self.settings.observe(eqn, Use(name, primitive, line, False, why, cost))
            return
        if self.settings.fallback == "materialize" or (primitive, line) in self.settings.told:
            return
        size = math.prod(view.shape) * jnp.dtype(view.base.dtype).itemsize
        message = (
            f"`jlora.lora`: {describe(', '.join(view.names), view.base)} is used whole by the "
            f'primitive "{primitive}" at {line} ({why}), so W + s·A·B is built there: {size:,} '
            f"bytes, {cost:,} FLOPs a call. "
            "`jlora.explain` lists every such use. "
            f"Ways out: {_instead(eqn)}; give the parameter the rule "
            'None (or "full"); or accept it with `jlora.lora(fn, fallback="materialize")`.'
        )
        if self.settings.fallback == "error":
            raise ValueError(message)
        self.settings.told.add((primitive, line))
        warnings.warn(message, UserWarning, stacklevel=2)

    def doubt_stack(self, eqn: JaxprEqn, view: Weight) -> None:
        """Warn of layers that are taken for a side of a convolution, the layout of 4-D weights."""
        silent = self.settings.fallback == "materialize" or self.settings.observe is not None
        site = ("stack", self.line(eqn))
        if silent or site in self.settings.told:
            return
        if view.ndim < 4 or view.roles[0] not in ("i", "o"):
            return
        self.settings.told.add(site)
        side, shared = ("input", "B") if view.roles[0] == "i" else ("output", "A")
        message = (
            f"`jlora.lora`: {describe(', '.join(view.names), view.base)} is scanned along its "
            f"first axis at {site[1]}, but its layout takes that axis for an {side}, so that all "
            f"layers share one {shared}. Let the program say which axes are layers: "
            "`jlora.attach(..., layouts=jlora.layouts(fn, params, x))`."
        )
        warnings.warn(message, UserWarning, stacklevel=2)

    def jitted(self, eqn: JaxprEqn, wrap: Callable[[Any], Any]) -> Any:
        """Return `wrap(eqn's walked body)`, the same each time, as `(key, *operands) -> outs`."""
        jaxpr = eqn.params["jaxpr"]

        def walked(key: Any, *operands: Any) -> list[Any]:
            return self.inside(eqn, key).evaluate(jaxpr, operands)

        if self.settings.observe is not None:  # an observer wants every use, not every trace
            return walked
        compiled = self.settings.compiled
        if id(jaxpr) not in compiled:
            if len(compiled) >= _MOST_COMPILED:  # a function that makes its jits anew at each call
                del compiled[next(iter(compiled))]
            compiled[id(jaxpr)] = (jaxpr, wrap(walked))
        return compiled[id(jaxpr)][1]


def _instead(eqn: JaxprEqn) -> str:
    """Say how the factored form can be had: of a primitive without a rule, by one of one's own."""
    way = "write that line as a product with the weight"
    if _registry.find(eqn) is not None:
        return way
    name = _compat.kernel_name(eqn)
    kernel = "" if name is None else f', kernel="{name}"'
    return f'{way}; register a rule, `jlora.transform.rule("{eqn.primitive.name}"{kernel}, ...)`'


def _gained(x: Any) -> bool:
    return isinstance(x, Weight) and x.gain is not None


def _stored_for(rule: _registry.Rule | None, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Prepare stored weights without an adapter for an equation: it may build them, or keep them.

    A call hands them on, and a rearrangement of weights and indices alone is noted. An activation
    that is joined with one must not wait for it, so anything else is computed.
    """
    if not any(map(unadapted, operands)):
        return operands
    kind = None if rule is None else rule.kind
    adapted = any(isinstance(x, Weight) and not unadapted(x) for x in operands)
    if kind == "call" or (kind == "rearrange" and _base.rearranges(operands)):
        return operands
    if not adapted or kind == "join":
        return [x.base if unadapted(x) else x for x in operands]
    return [x.dense() if unadapted(x) else x for x in operands]


def _last_uses(body: _compat.Body) -> list[list[Any] | None]:
    """Return, per equation, the variables that nothing after it reads; None for a dead equation."""
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
