"""A `View`: a `LoraArray` inside the traced program, its axes moved, cut or cast, never summed.

Every axis of a view has a role: `s` stack, `i` input, `o` output. The first factor (A) has the axes
of roles s and i, the second (s·B) those of s and o, each in the order of the base and with the rank
last, so what happens to the base's axes happens to each factor's own axes in the same order.

A view without factors is a probe: its roles are one capital letter per axis of the parameter, and
`jlora.layouts` reads from where the letters go which side each axis is on.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._arrays import Geometry, LoraArray, accumulator

RANK = "rank"
SIDES = ("si", "so")


class Name(str):
    """A parameter's path, equal to any other: layers go on sharing one traced function."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name)

    def __hash__(self) -> int:
        return 0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base", "factors"), meta_fields=("roles", "name")
)
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A rearranged `LoraArray` (or a probe, with no factors)."""

    base: Any
    factors: tuple[Any, ...]
    roles: tuple[str, ...]
    name: Name

    @classmethod
    def of(cls, node: LoraArray, name: str) -> "View":
        """See a whole `LoraArray`; the scaling goes into B, once per weight and not per use."""
        stack = len(Geometry.of(node.shape, node.layout).stack)
        b = jnp.moveaxis(node.lora_b, stack, -1)
        s = jnp.asarray(node.scaling, b.dtype)
        b = b * s.reshape(*s.shape, *(1,) * (b.ndim - s.ndim))
        return cls(node.base, (node.lora_a, b), ("s",) * stack + tuple(node.layout), Name(name))

    @classmethod
    def probe(cls, base: Any, name: str) -> "View":
        """See a plain weight whose axes are to be followed."""
        return cls(base, (), tuple(chr(ord("A") + k) for k in range(base.ndim)), Name(name))

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    def axes(self, factor: int) -> list[int]:
        """Return which axes of the base a factor has, in order."""
        return [k for k, role in enumerate(self.roles) if role in SIDES[factor]]

    def labels(self, factor: int, base_labels: Sequence[Any]) -> list[Any]:
        """Return a factor's axis labels, given the base's."""
        return [base_labels[k] for k in self.axes(factor)] + [RANK]

    def having(self, role: str) -> list[int]:
        """Return the axes of one role that are longer than 1."""
        return [
            k
            for k, (r, n) in enumerate(zip(self.roles, self.shape, strict=True))
            if r == role and n > 1
        ]

    def moved(
        self, base: Any, roles: Sequence[str], move: Callable[[Any, list[int]], Any]
    ) -> "View":
        """Return the view after an operation: `move(factor, its axes)` does it to each factor."""
        factors = tuple(move(f, self.axes(k)) for k, f in enumerate(self.factors))
        return View(base, factors, tuple(roles), self.name)

    def dense(self) -> Any:
        """Build `W + s · A B`, summed in float32 and rounded once to the base's dtype."""
        if not self.factors:
            return self.base
        axes = list(range(len(self.roles)))
        (a, b), la, lb = self.factors, self.labels(0, axes), self.labels(1, axes)
        wide = accumulator(self.base.dtype)
        update = contract(
            a.astype(wide), la, b.astype(wide), lb, axes, precision=lax.Precision.HIGHEST
        )
        return (self.base.astype(wide) + update).astype(self.base.dtype)


def contract(
    x: Any,
    x_labels: Sequence[Any],
    y: Any,
    y_labels: Sequence[Any],
    out_labels: Sequence[Any],
    precision: Any = None,
) -> Any:
    """Multiply two labeled arrays and sum over the labels that `out_labels` lacks: an einsum.

    Neighboring free axes of x (batch and time) become one axis first. Contracting two token axes in
    the gradient of A would otherwise make XLA transpose and copy every saved input.
    """
    batch = [k for k in x_labels if k in y_labels and k in out_labels]
    summed = [k for k in x_labels if k in y_labels and k not in out_labels]
    x_free = [k for k in x_labels if k not in y_labels]
    y_free = [k for k in y_labels if k not in x_labels]
    sizes = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(y_labels, y.shape, strict=True))
    x_labels = list(x_labels)
    if len(x_free) > 1 and _adjacent(x_labels, x_free) and _may_merge(x, x_labels, x_free):
        first = x_labels.index(x_free[0])
        rest = first + len(x_free)
        x = x.reshape(*x.shape[:first], -1, *x.shape[rest:])
        x_labels[first:rest] = ["tokens"]
    y_labels = list(y_labels)

    def at(group: list[Any]) -> tuple[list[int], list[int]]:
        return [x_labels.index(k) for k in group], [y_labels.index(k) for k in group]

    out = lax.dot_general(
        x,
        y,
        (at(summed), at(batch)),
        precision=precision,
        preferred_element_type=accumulator(x.dtype),
    )
    made = batch + x_free + y_free
    out = out.reshape([sizes[k] for k in made])
    if made != list(out_labels):
        out = lax.transpose(out, [made.index(k) for k in out_labels])
    return out


def _adjacent(labels: list[Any], run: list[Any]) -> bool:
    first = labels.index(run[0])
    return labels[first : first + len(run)] == run


def _may_merge(x: Any, labels: list[Any], run: list[Any]) -> bool:
    """Whether merging axes keeps a sharded array where it lies: at most the first is sharded."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)
    if spec is None:
        return True
    spec = tuple(spec) + (None,) * (len(labels) - len(tuple(spec)))
    return all(spec[labels.index(k)] is None for k in run[1:])


def flops(sizes: dict[Any, int], *label_sets: Sequence[Any]) -> int:
    """Count multiply-adds, twice, of one contraction over these labels."""
    return 2 * math.prod(sizes[k] for k in set().union(*label_sets))
