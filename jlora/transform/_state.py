"""State that a function changes in place: Variables of NNX, such as the count of a dropout's keys.

A traced function gets copies of its arguments, so what it changes in them would be lost. Here the
new values are outputs of the trace. Those of a module that the function got as an argument are
written back to it, as by a plain call. Those of an `nnx.State` must be returned, because a state is
a value: under `jax.jit` the function has a copy of it in any case.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import PyTree

from jlora import _compat
from jlora._boxes import outside
from jlora._nnx import Opened, is_variable, nnx
from jlora._paths import describe, path_strs
from jlora.transform._registry import find


class Change(NamedTuple):
    """A Variable with a new value: its path for errors, and in the states of modules, if there."""

    name: str
    variable: Any
    path: tuple[Any, ...] | None


class Arguments:
    """The arguments of one call, and what the function changes in them.

    Attributes:
        opened: `(args, kwargs)`, with states in place of modules, and boxes around nodes.
        has_state: whether there are Variables, which can change in place.
    """

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
        self._fn, self._nodes = fn, Opened((args, kwargs))
        self.opened = outside(self._nodes.tree)
        self.has_state = nnx() is not None and bool(_variables(self.opened))
        self._changes: list[Change] = []
        self._kept: list[bool] = []

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any], list[Any]]:
        """Call the function; also return the values that it replaces: the new, and the old."""
        if not self.has_state:
            return self._fn(*args, **kwargs), [], []
        tree = (args, kwargs)
        pairs = _variables(tree)
        names = path_strs([path for path, _ in pairs], tree, start=2)
        before = [v.get_raw_value() for _, v in pairs]
        modules = _variables(self._nodes.states(tree)) if self._nodes.modules else []
        own = {id(v): tuple(key.key for key in path) for path, v in modules}
        args, kwargs = self._nodes.closed(tree)
        out = self._fn(*args, **kwargs)
        returned = {id(x) for x in jax.tree.leaves(out)}
        self._changes, self._kept, new, old = [], [], [], []
        for name, (_, v), value in zip(names, pairs, before, strict=True):
            now = v.get_raw_value()
            if now is value or not isinstance(now, jax.Array):
                continue
            if id(v) in own or id(now) not in returned:
                self._changes.append(Change(name, v, own.get(id(v))))
                new.append(now)
                old.append(value)
        return out, new, old

    def check(self, jaxpr: Any) -> None:
        """Keep the changes that are more than a copy; refuse those that would be lost."""
        outs = _compat.body(jaxpr).outvars
        n = len(self._changes)
        new, old = outs[len(outs) - 2 * n : len(outs) - n], outs[len(outs) - n :]
        self._kept = [_source(jaxpr, a) is not b for a, b in zip(new, old, strict=True)]
        lost = [c for c, kept in zip(self._changes, self._kept, strict=True) if kept and not c.path]
        if lost:
            name, variable, _ = lost[0]
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise ValueError(
                f"`jlora.lora(fn)(...)`: `fn` changes {describe(name, variable.get_raw_value())}, "
                f"an nnx.{type(variable).__name__}{more}, in place and does not return it, so the "
                "new value would be lost: the next call would draw the same dropout mask, or start "
                "from the same running statistics. Return the state, and pass it to the next call:"
                "\n    graph, params, state = nnx.split(model, nnx.Param, ...)\n"
                "    def fn(params, state, x):\n"
                "        model = nnx.merge(graph, params, state)\n"
                "        return model(x), nnx.state(model, nnx.Not(nnx.Param))\n"
                "    y, state = jlora.lora(fn)(params, state, x)\n"
                "To drop it on purpose, change a copy: `nnx.merge(graph, params, copy=True)`."
            )

    def without_copies(self, outs: Sequence[Any]) -> list[Any]:
        """Drop the outputs that are no changes, so that no weight is materialized for them.

        A function that is lifted, such as `nnx.remat`, returns every Variable that it was given.
        """
        n = len(self._changes)
        end = len(outs) - 2 * n
        kept = self._kept or [False] * n
        new = [x if k else None for x, k in zip(outs[end : end + n], kept, strict=True)]
        return [*outs[:end], *new, *[None] * n]

    def write(self, values: Sequence[Any]) -> None:
        """Write new values to the modules that the caller passed."""
        pairs = zip(self._changes, self._kept, values, strict=True)
        flat = [(c.path, c.variable.replace(x)) for c, kept, x in pairs if kept]
        if flat:
            nnx().update(self._nodes.modules, nnx().from_flat_state(flat))


def _variables(tree: PyTree) -> list[tuple[Any, Any]]:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return [(path, x) for path, x in pairs if is_variable(x)]


def _source(jaxpr: Any, var: Any) -> Any:
    """Return the variable that `var` is equal to: calls and loops may only pass it on."""
    made = {v: (e, k) for e in _compat.body(jaxpr).eqns for k, v in enumerate(e.outvars)}
    while not isinstance(var, Literal) and var in made:
        eqn, k = made[var]
        operand = _passed(eqn, k)
        if operand is None:
            return var
        var = eqn.invars[operand]
    return var


def _passed(eqn: JaxprEqn, k: int) -> int | None:
    """Return which operand an equation's output k is equal to; None for any other output."""
    rule, scan = find(eqn), eqn.primitive.name == "scan"
    body = "jaxpr" if scan else None if rule is None else rule.body
    if body is None:
        return None
    inner = _compat.body(eqn.params[body])
    source = _source(eqn.params[body], inner.outvars[k])
    at = next((n for n, v in enumerate(inner.invars) if v is source), None)
    if at is None or not scan:
        return at
    consts, carry = _compat.scan_arity(eqn.params)
    passed = at == consts + k if k < carry else at >= consts + carry
    return at if passed else None
