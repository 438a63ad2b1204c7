"""From a primitive's name to its rule. Rule files write here; the walker reads."""

from collections.abc import Callable, Sequence
from typing import Any

# rule(walk, eqn, *operands) -> outputs, or NotImplemented where the factored form does not exist.
RuleFn = Callable[..., Sequence[Any]]
RULES: dict[str, RuleFn] = {}


def rule(*primitives: str) -> Callable[[RuleFn], RuleFn]:
    """Register a function as the rule of `primitives`."""

    def register(fn: RuleFn) -> RuleFn:
        for name in primitives:
            RULES[name] = fn
        return fn

    return register
