"""From a primitive to its rule: one record each. Rule files write here; the walker reads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax.extend.core import JaxprEqn

from jlora import _compat

# rule(walk, eqn, *operands) -> outputs, or NotImplemented where the factored form does not exist.
RuleFn = Callable[..., Sequence[Any]]
Kind = Literal["rearrange", "product", "call", "join", "custom"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the walker knows of a primitive.

    `kind` has no default, so it cannot be forgotten. The other fields can: without them the result
    is the same and costs more.

    Attributes:
        fn: the rule, `fn(walk, eqn, *operands)`.
        kind: what becomes of a weight. "rearrange": its entries are moved, repeated, left out or
            scaled along one side, and DoRA's gain goes along; "product": it makes an activation,
            and the rule applies the gain; "call": it is handed to a body; "join": it is combined
            with something else, or filled up; "custom": the user's own derivative rule. The last
            two have no place for a gain, so a weight with one is built first.
        own: takes a weight's own A, B and s; for the others s·B is made first.
        repeated: knows axes along which a weight is repeated; the others see a stack of copies.
        sums: of a product, the sums of the inputs that the weight meets, for `jlora.capture`.
        body: of a call that only runs one, the parameter of the equation that has its jaxpr.
    """

    fn: RuleFn
    kind: Kind
    own: bool = False
    repeated: bool = False
    sums: Callable[..., Any] | None = None
    body: str | None = None

    @property
    def takes_gain(self) -> bool:
        """Whether the rule may be given a weight with DoRA's gain."""
        return self.kind in ("rearrange", "product", "call")


_RULES: dict[str, Rule] = {}
# Of primitives that many functions share, such as `pallas_call`: by the function's name.
_KERNELS: dict[str, dict[str | None, Rule]] = {}


def find(eqn: JaxprEqn) -> Rule | None:
    """Return the rule of an equation: its kernel's, else its primitive's; None if there is none."""
    name = eqn.primitive.name
    if name in _KERNELS:
        own = _KERNELS[name].get(_compat.kernel_name(eqn))
        if own is not None:
            return own
    return _RULES.get(name)


def register(rule: Rule, primitive: str, kernel: str | None = None, replace: bool = False) -> None:
    """Enter a rule; another one's place is taken only where `replace` says so."""
    table: dict[Any, Rule] = _RULES if kernel is None else _KERNELS.setdefault(primitive, {})
    key = primitive if kernel is None else kernel
    if key in table and not replace:
        of = f'"{primitive}"' + ("" if kernel is None else f' and the kernel "{kernel}"')
        old = table[key].fn
        raise ValueError(
            f"`jlora.transform.rule`: the primitive {of} already has a rule, "
            f"`{old.__module__}.{old.__qualname__}`. To replace it pass `replace=True`; for one "
            'function of a primitive that many share pass its name, `kernel="..."`.'
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
