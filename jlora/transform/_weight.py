"""`Weight`: what stands for a weight in the walk. A rule calls its methods and asks no further.

There are two: a `View`, an adapted weight with its factors, and a `Probe`, which has none and only
remembers which axis came from where.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jax import Array
from jax.typing import ArrayLike

from jlora._arrays import Axes
from jlora._base import built

W = TypeVar("W", bound="Weight")
# The side of an axis: of a view "s", "i", "o" or "e"; of a probe the (parameter, axis) behind it.
Role = str | frozenset[tuple[str, int]]
Move = Callable[[Array, list[int]], Array]


class Names(tuple[str, ...]):
    """The paths of a weight's parameters, equal to any others: layers share one traced function."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names)

    def __hash__(self) -> int:
        return 0


class Weight:
    """A weight inside the traced program: its base, the role of each axis, and what goes along.

    Attributes:
        base: the weight without its update; anything with a shape and a dtype.
        roles: one per axis of the base.
        names: the paths of the parameters it came from.
        gain: DoRA's gain, the last of the components, or None.
        new_role: the role of an axis that the weight itself does not have.
        repeated_role: the role of an axis along which the weight is repeated.
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

    def over(self: W, base: Any) -> W:
        """Return the same weight with another base of the same shape."""
        return dataclasses.replace(self, base=base)  # pyrefly: ignore  # each is a dataclass

    def with_built_base(self: W) -> W:
        """Return the weight over an array: what a loop carries, a branch returns, a mesh splits."""
        return self.over(built(self.base))

    @property
    @abc.abstractmethod
    def components(self) -> tuple[Array, ...]:
        """What is laid out as the base is: A, s·B and, of DoRA's, the gain; nothing of a probe.

        Each has some of the base's axes, in the base's order, and the rank last.
        """

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """The rank of the update; 0 of a probe."""

    @property
    @abc.abstractmethod
    def two_sided(self) -> bool:
        """Whether it still has both sides. A row that was cut out is an activation."""

    @abc.abstractmethod
    def axes(self, component: int) -> list[int]:
        """Return which axes of the base a component has, in order."""

    @abc.abstractmethod
    def along(self, component: int, of_base: Axes, rank: Any = None) -> Axes:
        """Return what a component's axes have, given what the base's have."""

    @abc.abstractmethod
    def remade(self: W, base: Any, components: Sequence[Any], roles: Sequence[Role]) -> W:
        """Return the weight whose components have become these."""

    @abc.abstractmethod
    def moved(self: W, base: Any, roles: Sequence[Role], move: Move) -> W:
        """Return the weight after an operation: `move(component, its axes)` does it to each."""

    @abc.abstractmethod
    def on_side(self: W, base: Any, side: int, change: Callable[[Array], Array]) -> W:
        """Return the weight after an operation on one of its factors, 0 for A and 1 for s·B."""

    @abc.abstractmethod
    def sides_of(self, x: ArrayLike) -> list[int]:
        """Return the factors that have every axis along which `x` varies; both for a stack's."""

    @abc.abstractmethod
    def settled(self: W, roles: Sequence[Role] = ()) -> W:
        """Make s·B, and give each axis of repetition the role asked for, or that of a stack."""

    @abc.abstractmethod
    def of_one_role(self: W, axes: Sequence[int]) -> W | None:
        """Give axes that are about to be merged one role; None where no product is left."""

    @abc.abstractmethod
    def merged_role(self, axes: Sequence[int]) -> Role:
        """Return the role of what axes of one role are merged to."""

    @abc.abstractmethod
    def stays(self, looked_up: set[int], several: bool) -> bool:
        """Whether it is still a weight after a lookup along axes, of `several` indices or one."""

    @abc.abstractmethod
    def origins(self, axes: Sequence[int]) -> set[tuple[str, int]]:
        """Return the axes of parameters behind these; nothing of a view."""

    @abc.abstractmethod
    def dense(self) -> Array:
        """Build the weight."""


def all_names(operands: Sequence[Any]) -> Names:
    """Return the parameters of several weights."""
    return Names(dict.fromkeys(n for x in operands if isinstance(x, Weight) for n in x.names))
