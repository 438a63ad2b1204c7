"""A `View`: a `LoraArray` inside the traced program, transposed, sliced or cast but never summed.

Every axis of a view has a role: `s` stack, `i` input, `o` output, `e` equal (the weight was
broadcast along it). The first factor (A) has the axes with roles s and i, the second (s·B) those
with roles s and o, each in the order of the base and with the rank last. So an operation on the
axes of the base applies to the same axes of each factor, in the same order.

DoRA's gain, in `gain ∘ (W + s·A·B)`, has the axes of the second factor, with a rank of 1.

Three words for what a view has:
- `parts`, the field: A and s·B or, until an operation moves them, the node's own A, B and s
  (`own`), which a matmul uses without computing s·B;
- `factors`: A and s·B, computed from the parts where needed;
- `components`: the factors and, under DoRA, the gain.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jlora import _base, _compat, forms
from jlora._arrays import Axes, Geometry, LoraArray, accumulator, along
from jlora.transform._labeled import AnyArray, Label, contract
from jlora.transform._weight import AnyBase, Move, Names, Role, Weight

RANK = "rank"
AXES = ("si r", "so r", "so r")  # of A, of s·B, of the gain
GAIN = 2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "parts", "gain"),
    meta_fields=("roles", "names", "own"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class View(Weight):
    """A rearranged `LoraArray`."""

    base: Any
    parts: tuple[Any, ...]  # A and s·B, or the weight's own A, B and s
    roles: tuple[Any, ...]
    names: Names
    own: bool = False  # whether the parts are the node's own A, B and s
    gain: Any = None  # DoRA's m / ‖W + s·A·B‖

    new_role = "s"
    repeated_role = "e"

    @classmethod
    def of(cls, node: LoraArray, name: str) -> "View":
        """Return the view of a `LoraArray`."""
        geometry = Geometry.of(node.shape, node.layout)
        parts = (*forms.factors(node), jnp.asarray(node.scaling))
        roles = ("s",) * len(geometry.stack) + tuple(node.layout)
        gain = forms.gain(node)
        by = None if gain is None else gain[..., None]
        return cls(_base.deferred(node.base), parts, roles, Names([name]), True, by)

    def axes(self, component: int) -> list[int]:
        return axes_of(component, self.roles)

    def along(self, component: int, of_base: Axes, rank: Label = None) -> Axes:
        return along(AXES[component], self.roles, of_base, rank)

    def labels(self, component: int, base_labels: Sequence[Any]) -> list[Any]:
        """Return a component's axis labels, given the base's."""
        return list(self.along(component, tuple(base_labels), RANK))

    @property
    def two_sided(self) -> bool:
        """Whether there is more than one input and more than one output."""
        return {"i", "o"} <= {r for r, n in zip(self.roles, self.shape, strict=True) if n > 1}

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.parts[0].shape[-1]

    @property
    def factors(self) -> tuple[Any, ...]:
        """A and s·B, the rank last."""
        if not self.own:
            return self.parts
        a, b, s = self.parts
        stack = self.roles.count("s")
        with _compat.in_mesh_of(b):
            b = scaled(b, s)
            return a, lax.transpose(b, [*range(stack), *range(stack + 1, b.ndim), stack])

    @property
    def components(self) -> tuple[Any, ...]:
        """A, s·B and, under DoRA, the gain."""
        return (*self.factors, *(() if self.gain is None else (self.gain,)))

    def remade(self, base: AnyBase, components: Sequence[Any], roles: Sequence[Role]) -> "View":
        by = components[GAIN:]
        return View(base, tuple(components[:GAIN]), tuple(roles), self.names, False, *by)

    def peeled(self) -> tuple[Sequence[Any], Sequence[bool], Callable[[AnyBase, Any], "View"]]:
        if not (self.own and self.roles[0] == "s"):
            return super().peeled()
        # The node's own parts: s·B of all layers would be a copy of B's stack for the whole step.
        arrays = *self.parts, *(() if self.gain is None else (self.gain,))
        n = len(self.parts)

        def rebuild(base: AnyBase, x: Sequence[Any]) -> View:
            parts, by = tuple(x[:n]), x[n:]
            return View(base, parts, self.roles[1:], self.names, True, *by)

        return arrays, [x.ndim > 0 for x in arrays], rebuild

    def moved(self, base: AnyBase, roles: Sequence[Role], move: Move) -> "View":
        return self.remade(
            base, [move(f, self.axes(k)) for k, f in enumerate(self.components)], roles
        )

    def on_side(self, base: AnyBase, side: int, change: Callable[[Array], Array]) -> "View":
        changed = [change(f) if k == side else f for k, f in enumerate(self.components)]
        return self.remade(base, changed, self.roles)

    def sides_of(self, x: ArrayLike) -> list[int]:
        varying = {k for k, n in enumerate(jnp.shape(x)) if n > 1}
        return [k for k in (0, 1) if varying <= set(self.axes(k))]

    def settled(self, roles: Sequence[Role] = ()) -> "View":
        if not self.own and "e" not in self.roles:
            return self
        roles = roles or ["s"] * len(self.roles)
        roles = tuple(r if r != "e" else w for r, w in zip(self.roles, roles, strict=True))

        def move(f: AnyArray, k: int) -> AnyArray:
            before, after = self.axes(k), axes_of(k, roles)
            if before == after:
                return f
            where = [after.index(n) for n in before] + [len(after)]
            return lax.broadcast_in_dim(f, [*(self.shape[n] for n in after), f.shape[-1]], where)

        return self.remade(self.base, [move(f, k) for k, f in enumerate(self.components)], roles)

    def of_one_role(self, axes: Sequence[int]) -> "View | None":
        big = [k for k in axes if self.shape[k] > 1]
        kinds = {self.roles[k] for k in big} - {"e"}
        sides = kinds & {"i", "o"}
        if len(sides) > 1:
            return None
        role = next(iter(sides or kinds), "e")
        if role == "e":
            return self
        view = self.settled([role if k in big else "e" for k in range(self.ndim)])
        stack = [k for k in big if view.roles[k] != role]
        if stack and role == "i" and view.gain is not None:
            return None  # each block of the inputs would need its own gain for the outputs
        blocks = math.prod(view.shape[k] for k in stack)
        roles = [role if k in stack else r for k, r in enumerate(view.roles)]
        most = min(
            math.prod(n for n, r in zip(view.shape, roles, strict=True) if r == side)
            for side in "io"
        )
        if stack and view.rank * blocks > most:
            return None  # the ranks of all blocks add up to more than the weight's own rank
        for k in stack:
            view = view.folded(k, "io".index(role))
        return view

    def merged_role(self, axes: Sequence[int]) -> Role:
        return self.roles[axes[0]]

    def stays(self, looked_up: set[int], several: bool) -> bool:
        return all(self.roles[k] == "s" for k in looked_up)

    def origins(self, axes: Sequence[int]) -> set[tuple[str, int]]:
        return set()

    def folded(self, axis: int, side: int) -> "View":
        """Turn a stack axis into an axis of one side: one block per element, the ranks added up.

        For the inputs, with n the stack axis: the update is Σ_r A[n,i,r] B[n,r,o]. As a matrix with
        rows (n, i) it is Σ_(m,r) A'[(n,i),(m,r)] B'[(m,r),o], where A'[(n,i),(m,r)] = A[n,i,r] if
        n = m, else 0, and B'[(m,r),o] = B[m,r,o]. So A becomes block diagonal, B's stack axis moves
        next to its rank, and the rank becomes n·r. For the outputs, exchange A and B.
        """
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
        return self.remade(self.base, [*pair, *self.components[GAIN:]], roles)

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
        view = self.settled()
        weight = _base.built(self.base).astype(accumulator(self.base.dtype)) + view.delta()
        if view.gain is not None:
            has = view.axes(GAIN)
            weight *= lax.reshape(
                view.gain, [n if k in has else 1 for k, n in enumerate(self.shape)]
            )
        return weight.astype(self.base.dtype)


def axes_of(component: int, roles: Sequence[Role]) -> list[int]:
    """Return which axes a component has, given the roles of the base's axes."""
    return list(along(AXES[component], roles, tuple(range(len(roles))))[:-1])


def on_factor(view: Weight, k: int, x: ArrayLike) -> AnyArray:
    """Reshape `x`, a scalar or with the base's number of axes, to broadcast against a factor."""
    if jnp.ndim(x) == 0:
        return jnp.reshape(x, (1,) * (len(view.axes(k)) + 1))
    return jnp.reshape(x, [*(jnp.shape(x)[n] for n in view.axes(k)), 1])


def scaled(b: AnyArray, s: AnyArray) -> Array:
    """Return s·B, where s is a scalar or has the leading axes of B; float16 is widened first."""
    b = narrowed(b, accumulator(b.dtype)) if b.dtype == jnp.float16 else b
    s = narrowed(s, b.dtype)
    return lax.mul(b, lax.reshape(s, [*s.shape, *(1,) * (b.ndim - s.ndim)]) if s.ndim else s)


def plus(base: AnyArray, delta: AnyArray) -> Array:
    """Add the delta in the base output's dtype: a bfloat16 layer stays bfloat16."""
    return lax.add(base, _compat.sharded_like(narrowed(delta, base.dtype), base))


def narrowed(x: AnyArray, dtype: DTypeLike) -> Any:
    """Cast `x` only if its dtype differs, because every traced equation costs time."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
