"""A `Probe`: a weight without factors, whose axes are tracked through the program.

The role of an axis is the set of (parameter, axis) pairs that went into it. `jlora.layouts` infers
from their uses whether each axis of a parameter is an input or an output. A stored weight without
an adapter is a probe too, so that the rules for rearrangements apply to it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jlora._arrays import Axes, along
from jlora._base import Deferred, built, deferred, is_stored
from jlora.transform._labeled import AnyArray, Label
from jlora.transform._weight import AnyBase, Move, Names, Role, Weight

Origins = frozenset[tuple[str, int]]
LOOKED_UP = -1  # in place of a parameter's axis: one entry for each index of a lookup


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base",), meta_fields=("roles", "names")
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Probe(Weight):
    """A weight without factors: operations on it are recorded in the roles of its axes."""

    base: Any
    roles: tuple[Any, ...]  # an Origins each
    names: Names

    gain = None
    new_role = repeated_role = Origins()

    @classmethod
    def of(cls, base: AnyArray | Deferred, name: str) -> "Probe":
        """Start tracking a parameter."""
        return cls(base, tuple(Origins([(name, k)]) for k in range(base.ndim)), Names([name]))

    @property
    def components(self) -> tuple[Array, ...]:
        return ()

    @property
    def rank(self) -> int:
        return 0

    @property
    def two_sided(self) -> bool:
        return False  # nothing is built, so nothing is reported

    def axes(self, component: int) -> list[int]:
        return []

    def along(self, component: int, of_base: Axes, rank: Label = None) -> Axes:
        return along("", self.roles, of_base)

    def remade(self, base: AnyBase, components: Sequence[Any], roles: Sequence[Role]) -> "Probe":
        return Probe(base, tuple(roles), self.names)

    def moved(self, base: AnyBase, roles: Sequence[Role], move: Move) -> "Probe":
        return Probe(base, tuple(roles), self.names)

    def on_side(self, base: AnyBase, side: int, change: Callable[[Array], Array]) -> "Probe":
        return Probe(base, self.roles, self.names)

    def sides_of(self, x: ArrayLike) -> list[int]:
        return [0]

    def settled(self, roles: Sequence[Role] = ()) -> "Probe":
        return self

    def of_one_role(self, axes: Sequence[int]) -> "Probe":
        return self

    def merged_role(self, axes: Sequence[int]) -> Role:
        return Origins().union(*(self.roles[k] for k in axes))

    def stays(self, looked_up: set[int], several: bool) -> bool:
        return not several or not looked_up

    def rows(self, base: AnyBase, roles: Sequence[Role]) -> "Probe | Any":
        """Return what a lookup of several rows yields: still a weight if each is a matrix."""
        new = Origins((name, LOOKED_UP) for name in self.names)
        matrices = sum(bool(role) for role in roles) > 1
        return self.remade(base, [], [role or new for role in roles]) if matrices and new else base

    def origins(self, axes: Sequence[int]) -> set[tuple[str, int]]:
        return {origin for k in axes for origin in self.roles[k]}

    def dense(self) -> Array:
        return built(self.base)

    @staticmethod
    def sum(probes: Sequence["Probe"], base: AnyBase, names: Names) -> "Probe":
        """Merge several probes: each axis tracks the origins of all of them."""
        groups = zip(*(x.roles for x in probes), strict=True)
        return Probe(base, tuple(Origins().union(*group) for group in groups), names)


def waiting(x: Any) -> Any:
    """Return the value in the walk of a leaf without an adapter: a stored weight is deferred."""
    return Probe(deferred(x), (Origins(),) * len(x.shape), Names()) if is_stored(x) else x


def unadapted(x: object) -> TypeGuard[Probe]:
    """Whether `x` is a stored weight without an adapter that has not been built."""
    return isinstance(x, Probe) and isinstance(x.base, Deferred)


def ready(operands: Sequence[Any], kind: str | None) -> list[Any]:
    """Prepare stored weights without an adapter for an equation: build them, or keep them deferred.

    `kind` is that of the equation's rule. A call receives them deferred, and so does a
    rearrangement whose operands are only weights and indices. A result that depends on an
    activation must not be deferred, so for anything else they are built.
    """
    if not any(map(unadapted, operands)):
        return list(operands)
    indices = (x for x in operands if not isinstance(x, Weight))
    moves = all(jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in indices)
    if kind == "call" or (kind == "rearrange" and moves):
        return list(operands)
    adapted = any(isinstance(x, Weight) and not unadapted(x) for x in operands)
    if not adapted or kind == "join":
        return [x.base if unadapted(x) else x for x in operands]
    return [x.dense() if unadapted(x) else x for x in operands]
