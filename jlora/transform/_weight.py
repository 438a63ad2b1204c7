"""`Weight`: a weight as the walk sees it. Rules call its methods, whichever kind it is.

There are two kinds: a `View`, an adapted weight with its factors, and a `Probe`, which has no
factors and only tracks where each axis came from.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray

from jlora._arrays import Axes
from jlora._base import Deferred, built
from jlora._paths import short_repr
from jlora.transform._labeled import AnyArray, Label

W = TypeVar("W", bound="Weight")
# The role of an axis. View: "s", "i", "o" or "e". Probe: the (parameter, axis) pairs behind it.
Role = str | frozenset[tuple[str, int]]
Move = Callable[[Array, list[int]], Array]
# The base of a weight; a shape or a sharding where a rule only computes what becomes of those.
AnyBase = AnyArray | Deferred | jax.ShapeDtypeStruct | PartitionSpec
Key = PRNGKeyArray | None  # None without dropout


class Names(tuple[str, ...]):
    """The paths of a weight's parameters. All compare equal, so that layers share one trace."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names)

    def __hash__(self) -> int:
        return 0


class Weight:
    """A weight inside the traced program: its base, a role for each axis, and its components.

    Attributes:
        base: the weight without its update; anything with a shape and a dtype.
        roles: one per axis of the base.
        names: the paths of the parameters it came from.
        gain: DoRA's gain, the last of the components, or None.
        new_role: the role of an axis that is added to the weight.
        repeated_role: the role of an axis along which the weight is broadcast.
    """

    new_role: Role
    repeated_role: Role
    if TYPE_CHECKING:  # fields of frozen dataclasses, which for a type checker are read-only

        @property
        def base(self) -> Any: ...
        @property
        def roles(self) -> tuple[Any, ...]: ...
        @property
        def names(self) -> Names: ...
        @property
        def gain(self) -> Any: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The base's number of dimensions."""
        return len(self.roles)

    def __repr__(self) -> str:
        return short_repr(self)

    def over(self: W, base: AnyBase) -> W:
        """Return the same weight with another base of the same shape."""
        return dataclasses.replace(self, base=base)  # pyrefly: ignore  # each is a dataclass

    def with_built_base(self: W) -> W:
        """Return the weight with its base built, as loop carries, branches and meshes need it."""
        return self.over(built(self.base))

    @property
    @abc.abstractmethod
    def components(self) -> tuple[Array, ...]:
        """A, s·B and, under DoRA, the gain; empty for a probe.

        Each has a subset of the base's axes, in the base's order, and the rank last.
        """

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """The rank of the update; 0 for a probe."""

    @property
    @abc.abstractmethod
    def two_sided(self) -> bool:
        """Whether it still has both sides. A single row or column is an activation."""

    @abc.abstractmethod
    def axes(self, component: int) -> list[int]:
        """Return which axes of the base a component has, in order."""

    @abc.abstractmethod
    def along(self, component: int, of_base: Axes, rank: Label = None) -> Axes:
        """Select a component's entries from one entry per axis of the base; `rank` comes last."""

    @abc.abstractmethod
    def remade(self: W, base: AnyBase, components: Sequence[Any], roles: Sequence[Role]) -> W:
        """Return the weight with new components."""

    @abc.abstractmethod
    def moved(self: W, base: AnyBase, roles: Sequence[Role], move: Move) -> W:
        """Return the weight after an operation; `move(component, axes)` applies it to each."""

    @abc.abstractmethod
    def on_side(self: W, base: AnyBase, side: int, change: Callable[[Array], Array]) -> W:
        """Return the weight after an operation on one of its factors, 0 for A and 1 for s·B."""

    @abc.abstractmethod
    def sides_of(self, x: ArrayLike) -> list[int]:
        """Return the factors that have every axis along which `x` varies: one, both or none."""

    @abc.abstractmethod
    def settled(self: W, roles: Sequence[Role] = ()) -> W:
        """Compute s·B, and turn each broadcast axis into the given role, by default stack."""

    @abc.abstractmethod
    def of_one_role(self: W, axes: Sequence[int]) -> W | None:
        """Give axes that are about to be merged one role; None if no factored form is left."""

    @abc.abstractmethod
    def merged_role(self, axes: Sequence[int]) -> Role:
        """Return the role of the axis that axes of one role merge into."""

    @abc.abstractmethod
    def stays(self, looked_up: set[int], several: bool) -> bool:
        """Whether a lookup along these axes, of `several` indices or one, leaves a weight."""

    @abc.abstractmethod
    def origins(self, axes: Sequence[int]) -> set[tuple[str, int]]:
        """Return the axes of parameters behind these; empty for a view."""

    def peeled(self: W) -> tuple[Sequence[Any], Sequence[bool], Callable[[AnyBase, Any], W]]:
        """Return the arrays that a scan may slice, whether each has the first axis, and the rest.

        The rest is a function that rebuilds the weight from a slice of its base and of the arrays.
        """
        has = [0 in self.axes(k) for k in range(len(self.components))]
        return self.components, has, lambda base, x: self.remade(base, x, self.roles[1:])

    @abc.abstractmethod
    def dense(self) -> Array:
        """Build the weight."""


def all_names(operands: Sequence[Any]) -> Names:
    """Return the parameters of several weights."""
    return Names(dict.fromkeys(n for x in operands if isinstance(x, Weight) for n in x.names))


Operand = AnyArray | Weight  # of a rule for a product
Value = ArrayLike | Weight  # of any variable or literal of the jaxpr; scalars are Python's
