"""The registry: one record per primitive. Rule files write to it; the walker reads it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax.extend.core import JaxprEqn

from jlora import _compat

# rule(walk, eqn, *operands) -> outputs, or NotImplemented if there is no factored form.
RuleFn = Callable[..., Sequence[Any]]
Kind = Literal["rearrange", "product", "call", "join", "custom"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the walker knows about a primitive.

    `kind` is required. The other fields are optimizations: without them the result is the same at
    a higher cost.

    Attributes:
        fn: the rule, `fn(walk, eqn, *operands)`.
        kind: what happens to a weight. "rearrange": its entries are moved, repeated, dropped or
            scaled along one side, and DoRA's gain is carried along; "product": the result is an
            activation, and the rule applies the gain; "call": it is passed to a body; "join": it
            is combined with other operands, or padded; "custom": the user's own derivative rule.
            The last two cannot carry a gain, so a weight with one is materialized first.
        own: accepts a node's own A, B and s; for other rules s·B is computed first.
        repeated: supports axes along which a weight is broadcast; other rules see them as stack.
        sums: for a product, computes the sums over the weight's inputs for `jlora.capture`.
        body: for a call that only runs a jaxpr, the name of the equation's parameter that has it.
    """

    fn: RuleFn
    kind: Kind
    own: bool = False
    repeated: bool = False
    sums: Callable[..., Any] | None = None
    body: str | None = None

    @property
    def takes_gain(self) -> bool:
        """Whether the rule accepts a weight with DoRA's gain."""
        return self.kind in ("rearrange", "product", "call")


_RULES: dict[str, Rule] = {}
# For primitives shared by many functions, such as `pallas_call`: by the name of the function.
_KERNELS: dict[str, dict[str | None, Rule]] = {}


def find(eqn: JaxprEqn) -> Rule | None:
    """Return the rule for an equation, by kernel, then by primitive; None if there is none."""
    name = eqn.primitive.name
    if name in _KERNELS:
        own = _KERNELS[name].get(_compat.kernel_name(eqn))
        if own is not None:
            return own
    return _RULES.get(name)


def register(rule: Rule, primitive: str, kernel: str | None = None, replace: bool = False) -> None:
    """Add a rule; an existing one is replaced only if `replace` is set."""
    table: dict[Any, Rule] = _RULES if kernel is None else _KERNELS.setdefault(primitive, {})
    key = primitive if kernel is None else kernel
    if key in table and not replace:
        of = f'"{primitive}"' + ("" if kernel is None else f' and the kernel "{kernel}"')
        old = table[key].fn
        raise ValueError(
            f"`jlora.transform.rule`: the primitive {of} already has a rule, "
            f"`{old.__module__}.{old.__qualname__}`. To replace it, pass `replace=True`; for one "
            'function of a shared primitive, pass the name of the function, `kernel="..."`.'
        )
    table[key] = rule


def rule(
    *primitives: str,
    kind: Kind,
    own: bool = False,
    repeated: bool = False,
    sums: Callable[..., Any] | None = None,
    body: str | None = None,
) -> Callable[[RuleFn], RuleFn]:
    """Register a function as the rule of `primitives`."""

    def enter(fn: RuleFn) -> RuleFn:
        for primitive in primitives:
            register(Rule(fn, kind, own, repeated, sums, body), primitive)
        return fn

    return enter
