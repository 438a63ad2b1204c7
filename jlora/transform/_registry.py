"""From a primitive's name to its rule. Rule files write here; the walker reads."""

from collections.abc import Callable, Sequence
from typing import Any

# rule(walk, eqn, *operands) -> outputs, or NotImplemented where the factored form does not exist.
RuleFn = Callable[..., Sequence[Any]]
RULES: dict[str, RuleFn] = {}
# Rules that take a weight's own A, B and s; for the others the factors are made first.
TAKE_WHOLE: set[str] = set()
# Rules that know axes along which a weight is broadcast; the others see a stack of equal weights.
KNOW_EQUAL: set[str] = set()
# Rules that know DoRA's gains; for the others such a weight is built.
KNOW_GAIN: set[str] = set()


def rule(
    *primitives: str, whole: bool = False, equal: bool = False, gain: bool = False
) -> Callable[[RuleFn], RuleFn]:
    """Register a function as the rule of `primitives`, and what it can take."""

    def register(fn: RuleFn) -> RuleFn:
        RULES.update(dict.fromkeys(primitives, fn))
        TAKE_WHOLE.update(primitives if whole else ())
        KNOW_EQUAL.update(primitives if equal else ())
        KNOW_GAIN.update(primitives if gain else ())
        return fn

    return register
