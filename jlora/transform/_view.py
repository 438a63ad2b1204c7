"""A `View`: a `LoraArray` inside the traced program, its axes moved, cut or cast, never summed.

Every axis of a view has a role: `s` stack, `i` input, `o` output, `e` equal (the weight was
broadcast along it). The first factor (A) has the axes of roles s and i, the second (s·B) those of s
and o, each in the order of the base and with the rank last, so what happens to the base's axes
happens to each factor's own axes in the same order.

DoRA's gain, in `gain ∘ (W + s·A·B)`, is laid out like the second factor, with a rank of 1.

The factors of a whole weight are made when an operation moves them; a plain product takes the
weight's own A, B and s, as they lie.

A view without factors is a probe: the role of an axis is the set of (parameter, axis) that went
into it, and `jlora.layouts` reads from where they go which side each axis of a parameter is on.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat, forms
from jlora._arrays import Axes, Geometry, LoraArray, accumulator, along
from jlora.transform._labeled import contract

RANK = "rank"
AXES = ("si r", "so r", "so r")  # of A, of s·B, of the gain
GAIN = 2


class Names(tuple[str, ...]):
    """The paths of a view's parameters, equal to any others: layers share one traced function."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names)

    def __hash__(self) -> int:
        return 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "parts", "gain"),
    meta_fields=("roles", "names", "whole"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A rearranged `LoraArray` (or a probe, with no factors)."""

    base: Any
    parts: tuple[Any, ...]  # the factors, nothing in a probe, or lora_a, lora_b, scaling
    roles: tuple[Any, ...]
    names: Names
    whole: bool = False  # whether the parts are still the weight's own
    gain: Any = None  # DoRA's, m / ‖W + s·A·B‖

    @classmethod
    def of(cls, node: LoraArray, name: str) -> "View":
        """See a whole `LoraArray`."""
        geometry = Geometry.of(node.shape, node.layout)
        parts = (*forms.factors(node), jnp.asarray(node.scaling))
        roles = ("s",) * len(geometry.stack) + tuple(node.layout)
        gain = forms.gain(node)
        by = None if gain is None else gain[..., None]
        return cls(node.base, parts, roles, Names([name]), True, by)

    @classmethod
    def probe(cls, base: Any, name: str) -> "View":
        """See a plain weight whose axes are to be followed."""
        roles = tuple(frozenset([(name, k)]) for k in range(base.ndim))
        return cls(base, (), roles, Names([name]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def new_role(self) -> Any:
        """The role of an axis that the weight itself does not have."""
        return "s" if self.parts else frozenset()

    @property
    def ndim(self) -> int:
        """The base's number of dimensions."""
        return len(self.roles)

    def axes(self, factor: int) -> list[int]:
        """Return which axes of the base a factor has, in order."""
        return list(self.along(factor, tuple(range(len(self.roles))))[:-1])

    def along(self, factor: int, of_base: Axes, rank: Any = None) -> Axes:
        """Return what a factor's axes have, given what the base's have."""
        return along(AXES[factor], self.roles, of_base, rank)

    def labels(self, factor: int, base_labels: Sequence[Any]) -> list[Any]:
        """Return a factor's axis labels, given the base's."""
        return list(self.along(factor, tuple(base_labels), RANK))

    def having(self, role: str) -> list[int]:
        """Return the axes of one role that are longer than 1."""
        return [
            k
            for k, (r, n) in enumerate(zip(self.roles, self.shape, strict=True))
            if r == role and n > 1
        ]

    @property
    def rank(self) -> int:
        """The rank of the update; 0 of a probe."""
        return self.parts[0].shape[-1] if self.parts else 0

    @property
    def factors(self) -> tuple[Any, ...]:
        """A and s·B, the rank last."""
        if not self.whole:
            return self.parts
        a, b, s = self.parts
        stack = self.roles.count("s")
        with _compat.in_mesh_of(b):
            b = lax.transpose(b, [*range(stack), *range(stack + 1, b.ndim), stack])
            return a, scaled(b, s)

    @property
    def laid(self) -> tuple[Any, ...]:
        """All that is laid out as the base is: A, s·B and, of DoRA's, the gain."""
        return (*self.factors, *(() if self.gain is None else (self.gain,)))

    def remade(self, base: Any, laid: Sequence[Any], roles: Sequence[Any]) -> "View":
        """Return the view of what `laid` has become."""
        return View(base, tuple(laid[:GAIN]), tuple(roles), self.names, False, *laid[GAIN:])

    def over(self, base: Any) -> "View":
        """Return the same update over another base of the same shape."""
        return dataclasses.replace(self, base=base)

    def moved(
        self, base: Any, roles: Sequence[Any], move: Callable[[Any, list[int]], Any]
    ) -> "View":
        """Return the view after an operation: `move(factor, its axes)` does it to each factor."""
        return self.remade(base, [move(f, self.axes(k)) for k, f in enumerate(self.laid)], roles)

    def settled(self, roles: Sequence[Any] = ()) -> "View":
        """Make the factors, and give each `e` axis the role asked for, or s."""
        if not self.whole and "e" not in self.roles:
            return self
        roles = roles or ["s"] * len(self.roles)
        roles = tuple(r if r != "e" else w for r, w in zip(self.roles, roles, strict=True))
        new = View(self.base, (), roles, self.names)

        def move(f: Any, k: int) -> Any:
            before, after = self.axes(k), new.axes(k)
            if before == after:
                return f
            where = [after.index(n) for n in before] + [len(after)]
            return lax.broadcast_in_dim(f, [*(self.shape[n] for n in after), f.shape[-1]], where)

        return self.remade(self.base, [move(f, k) for k, f in enumerate(self.laid)], roles)

    def folded(self, axis: int, side: int) -> "View":
        """Make a stack axis one of a side's: a block per stack element, the ranks added up."""
        n, rank = self.shape[axis], self.rank * self.shape[axis]
        one, other = self.factors[side], self.factors[1 - side]
        where = [1] * one.ndim
        where[self.axes(side).index(axis)] = n
        blocks = one[..., None, :] * jnp.eye(n, dtype=one.dtype).reshape(*where[:-1], n, 1)
        other = jnp.moveaxis(other, self.axes(1 - side).index(axis), -2)
        pair = [
            blocks.reshape(*one.shape[:-1], rank),
            other.reshape(*other.shape[:-2], rank),
        ]
        roles = (*self.roles[:axis], "io"[side], *self.roles[axis + 1 :])
        pair = pair if side == 0 else pair[::-1]
        return self.remade(self.base, [*pair, *self.laid[GAIN:]], roles)

    def delta(self) -> Any:
        """Build `s · A B` in float32 or wider."""
        axes = list(range(len(self.roles)))
        (a, b), la, lb = self.factors, self.labels(0, axes), self.labels(1, axes)
        wide = accumulator(self.base.dtype)
        return contract(
            a.astype(wide), la, b.astype(wide), lb, axes, precision=lax.Precision.HIGHEST
        )

    def dense(self) -> Any:
        """Build the weight, in float32 and rounded once to the base's dtype."""
        if not self.parts:
            return self.base
        view = self.settled()
        weight = self.base.astype(accumulator(self.base.dtype)) + view.delta()
        if view.gain is not None:
            has = view.axes(GAIN)
            weight *= lax.reshape(
                view.gain, [n if k in has else 1 for k, n in enumerate(self.shape)]
            )
        return weight.astype(self.base.dtype)


def varying_sides(view: View, x: Any) -> list[int]:
    """Return the factors that have every axis along which `x` varies; both for a stack's."""
    varying = {k for k, n in enumerate(jnp.shape(x)) if n > 1}
    return [k for k in (0, 1) if varying <= set(view.axes(k))]


def on_factor(view: View, k: int, x: Any) -> Any:
    """Arrange `x`, of the base's rank or a scalar, to broadcast against a factor."""
    if jnp.ndim(x) == 0:
        return jnp.reshape(x, (1,) * (len(view.axes(k)) + 1))
    return jnp.reshape(x, [*(x.shape[n] for n in view.axes(k)), 1])


def all_names(operands: Sequence[Any]) -> Names:
    """Return the parameters of several views."""
    return Names(dict.fromkeys(n for x in operands if isinstance(x, View) for n in x.names))


def aligned(operands: Sequence[Any]) -> list[Any] | None:
    """Give all views the roles of the first, sides exchanged where that does it; None if not."""
    out = list(operands)
    roles = next(x.roles for x in out if isinstance(x, View))
    for n, x in enumerate(out):
        if not isinstance(x, View) or not x.parts or x.roles == roles:
            continue
        swapped = tuple({"s": "s", "i": "o", "o": "i"}[r] for r in x.roles)
        if swapped != roles:
            return None
        out[n] = View(x.base, x.factors[::-1], swapped, x.names)
    return out


def summed(operands: Sequence[Any], base: Any) -> View:
    """Sum the updates of aligned views over one base: the ranks add up, unless A or B is shared."""
    views = [x for x in operands if isinstance(x, View)]
    names = all_names(views)
    if not views[0].parts:
        roles = tuple(
            frozenset().union(*group) for group in zip(*(x.roles for x in views), strict=True)
        )
        return View(base, (), roles, names)
    sides = [[x.factors[k] for x in views] for k in (0, 1)]
    shared = [all(f is fs[0] for f in fs) for fs in sides]
    factors = []
    for k, fs in enumerate(sides):
        wide = max((f.dtype for f in fs), key=lambda d: jnp.finfo(d).bits)
        fs = [f.astype(wide) for f in fs]
        if shared[k]:
            factors.append(fs[0])
        elif shared[1 - k]:
            factors.append(functools.reduce(lax.add, fs))
        else:
            factors.append(lax.concatenate(fs, fs[0].ndim - 1))
    if all(shared):  # the very same update, several times
        factors[1] = factors[1] * jnp.asarray(len(views), factors[1].dtype)
    return View(base, tuple(factors), views[0].roles, names)


def even(operands: Sequence[Any], among: Sequence[Any] = ()) -> list[View]:
    """Make of aligned views and arrays views of one rank and dtype, theirs and those `among`."""
    views = [x for x in (*among, *operands) if isinstance(x, View)]
    rank, like = max(x.rank for x in views), views[0]
    wide = [
        max((x.factors[k].dtype for x in views), key=lambda d: jnp.finfo(d).bits) for k in (0, 1)
    ]

    def factor(x: Any, k: int) -> Any:
        if not isinstance(x, View):  # an array's update is zero
            return jnp.zeros((*(x.shape[n] for n in like.axes(k)), rank), wide[k])
        f = x.factors[k]
        f = f if f.dtype == wide[k] else f.astype(wide[k])
        more = [(0, 0, 0)] * (f.ndim - 1) + [(0, rank - x.rank, 0)]
        return f if x.rank == rank else lax.pad(f, jnp.zeros((), f.dtype), more)

    return [
        View(
            x.base if isinstance(x, View) else x,
            (factor(x, 0), factor(x, 1)),
            like.roles,
            x.names if isinstance(x, View) else Names(),
        )
        for x in operands
    ]


def scaled(b: Any, s: Any) -> Any:
    """Return s·B for a scaling of B's leading axes, or a scalar."""
    s = narrowed(s, b.dtype)
    return lax.mul(b, lax.reshape(s, [*s.shape, *(1,) * (b.ndim - s.ndim)]) if s.ndim else s)


def plus(base: Any, delta: Any) -> Any:
    """Add the delta in the base output's dtype: a bfloat16 layer stays bfloat16."""
    return lax.add(base, narrowed(delta, base.dtype))


def narrowed(x: Any, dtype: Any) -> Any:
    """Cast where that changes anything: tracing is not free."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
