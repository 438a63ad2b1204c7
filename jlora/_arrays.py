"""The data model: `LoraArray` and `FullArray`, pytree nodes that replace a weight.

They hold arrays and describe their axes. They know neither rules nor the transform.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from jlora import _serialization
from jlora._base import is_stored
from jlora._node import Node

# What one axis has: its size, its letter in an einsum, its entry in a `PartitionSpec`.
Label = Hashable
Axes = TypeVar("Axes", str, PartitionSpec, tuple[Any, ...])


def _content(part: Any) -> Any:
    """Return what a box of Flax holds, and any other part as it is."""
    return part if hasattr(part, "shape") else getattr(part, "value", part)


# The axes of A and B, for `along`.
AXES = {"lora_a": "si r", "lora_b": "s r o"}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "lora_a", "lora_b", "scaling", "extra"),
    meta_fields=("layout", "slices", "residual", "form"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoraArray(Node):
    """Hold a frozen weight and its low-rank update, `W + s · A B`, without adding them.

    Attributes:
        base: the frozen weight, `(*stack, *dims)`; `None` in a detached adapter.
        lora_a: input side, `(*stack, *in_dims, rank)`. PEFT's `lora_A.weight`, transposed.
        lora_b: output side, `(*stack, rank, *out_dims)`. PEFT's `lora_B.weight`, transposed.
        scaling: `s`, a scalar or `(*stack)`; a leaf, so another alpha never recompiles.
        layout: one letter per non-stack dimension of `base`, `i` (input) or `o` (output).
        slices: `(start, stop)` ranges of the first output dimension, or `None` for all of it. Each
            range has its own update: `lora_a` is `(*stack, *in_dims, n · rank)`, the A of all
            ranges concatenated, and that dimension of `lora_b` is the sum of the ranges' widths.
            loralib's `MergedLinear`, transposed.
        residual: whether `base` is the residual `W - s · A B` of an initializer, with the initial A
            and B, and not the model's weight; see `jlora.arithmetic.residual_to_lora`.
        extra: the other parts of the update by name, as defined by `form` and DoRA; see
            `jlora.forms`. A part removed by `jlora.partition` is `None`.
        form: the name of the variant, as in `LoraSpec(form=...)`. It defines what the parts mean
            and which of them train.

    Example:
        >>> import jax.numpy as jnp
        >>> w = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.zeros((2, 4)), 2.0, "io")
        >>> w.shape, w.rank
        ((3, 4), 2)

    Reference: Hu et al. 2021, arXiv:2106.09685, eq. 3; the variants are in `jlora.forms`.
    """

    base: Any
    lora_a: Any
    lora_b: Any
    scaling: Any
    layout: str
    slices: tuple[tuple[int, int], ...] | None = None
    residual: bool = False
    # Not `dict[str, Any]`: Orbax treats an empty dict as a leaf and replaces it by its own types.
    extra: Any = dataclasses.field(default_factory=dict)
    form: str = "lora"

    def __post_init__(self) -> None:
        _serialization.register_with_flax()

    @property
    def shape(self) -> tuple[int, ...]:
        """The base weight's shape."""
        return _content(self.base).shape

    @property
    def dtype(self) -> Any:
        """The base weight's dtype."""
        return _content(self.base).dtype

    @property
    def rank(self) -> int:
        """The rank r of the update; with slices, the rank of each slice's update."""
        return _content(self.lora_a).shape[-1] // (1 if self.slices is None else len(self.slices))

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of the update by name: A, B and `extra`."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b, **self.extra}

    def with_parts(self, parts: Mapping[str, Any]) -> "LoraArray":
        """Return the node with these parts replaced: A, B or entries of `extra`."""
        factors = {name: x for name, x in parts.items() if name in AXES}
        extra = {name: x for name, x in parts.items() if name not in AXES}
        return dataclasses.replace(self, **factors, extra={**self.extra, **extra})


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Tied:
    """Refers to a part of a `LoraArray` that another node owns: see `jlora.tie`."""

    owner: str


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "value"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FullArray(Node):
    """Hold a parameter that is trained in full, and its original.

    Attributes:
        base: the original, frozen; `None` in a detached adapter.
        value: the trained value, which the model sees; of the base's shape and dtype.

    Reference: PEFT's `modules_to_save` and `bias`.
    """

    base: Any
    value: Any

    def __post_init__(self) -> None:
        _serialization.register_with_flax()

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return _content(self.value).shape

    @property
    def dtype(self) -> Any:
        """The parameter's dtype."""
        return _content(self.value).dtype


_serialization.register(LoraArray, ("layout", "slices", "residual", "form"))
_serialization.register(FullArray)
_serialization.register(Tied, ("owner",))

Adapted = LoraArray | FullArray


def is_adapted(x: object) -> bool:
    """Whether `x` is one of jlora's nodes (for `is_leaf=`)."""
    return isinstance(x, Adapted)


def is_leaf(x: object) -> bool:
    """Whether `x` is one leaf of a tree of parameters (for `is_leaf=`)."""
    return is_adapted(x) or is_stored(x)


def accumulator(dtype: DTypeLike) -> Any:
    """Return the dtype to sum in: float32, or `dtype` if that is wider and JAX has it."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else jax.dtypes.canonicalize_dtype(dtype)


@functools.cache
def _groups(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group) for group in axes.split())


def along(axes: str, roles: Sequence[Label], of_base: Axes, rank: Label = None) -> Axes:
    """Derive a property of a part's axes from the same property of the base's axes.

    Shapes, einsum letters and `PartitionSpec`s of all parts are derived here and nowhere else.

    Args:
        axes: the part's axes, in groups: "si r" are the base's axes with role s (stack) or i
            (input), in the base's order, then the rank; "s r o" are the stack axes, the rank and
            the output axes.
        roles: the roles of the base's axes.
        of_base: one entry per axis of the base: its size, its letter in an einsum or its entry in a
            `PartitionSpec`, which may have fewer entries than the base has axes.
        rank: the entry of the rank's axis.

    Returns:
        One entry per axis of the part, in the type of `of_base`.

    Example:
        >>> along("s r o", "sio", (5, 3, 4), 2), along("si r", "sio", "abc", "R")
        ((5, 2, 4), 'abR')
        >>> tuple(along("si r", "sio", PartitionSpec("data")))
        ('data', None, None)
    """
    each = [*of_base]
    if isinstance(of_base, PartitionSpec):
        each += [None] * (len(roles) - len(each))
    found: list[Any] = []
    for group in _groups(axes):
        if group == ("r",):
            found.append(rank)
        else:
            found += [x for x, role in zip(each, roles, strict=True) if role in group]
    if isinstance(of_base, str):
        return "".join(found)
    made: Any = PartitionSpec(*found) if isinstance(of_base, PartitionSpec) else tuple(found)
    return made


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Stack, input and output dimensions of a weight: its shape, divided by its layout."""

    stack: tuple[int, ...]
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    layout: str

    @classmethod
    def of(cls, shape: tuple[int, ...], layout: str) -> "Geometry":
        """Divide `shape`; leading dimensions beyond the layout's length are stack dimensions."""
        split = len(shape) - len(layout)
        by_letter = {
            c: tuple(n for n, k in zip(shape[split:], layout, strict=True) if k == c) for c in "io"
        }
        return cls(shape[:split], by_letter["i"], by_letter["o"], layout)

    @property
    def fan_in(self) -> int:
        """The number of inputs of one stack element."""
        return math.prod(self.in_dims)

    @property
    def fan_out(self) -> int:
        """The number of outputs of one stack element."""
        return math.prod(self.out_dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that was divided."""
        sides = {"i": iter(self.in_dims), "o": iter(self.out_dims)}
        return (*self.stack, *(next(sides[letter]) for letter in self.layout))

    def along(self, axes: str, of_base: Axes, rank: Label = None) -> Axes:
        """Derive a property of a part's axes from the base's: `along`, with the layout's roles."""
        return along(axes, "s" * len(self.stack) + self.layout, of_base, rank)

    def sliced(self, slices: tuple[tuple[int, int], ...] | None) -> "Geometry":
        """Return the geometry with the outputs restricted to the slices, concatenated."""
        if slices is None:
            return self
        width = sum(stop - start for start, stop in slices)
        return dataclasses.replace(self, out_dims=(width, *self.out_dims[1:]))

    def across(self, outputs: Array) -> Array:
        """Reshape `(*stack, *out_dims)` to broadcast against a weight."""
        rest = iter(outputs.shape[len(self.stack) :])
        dims = (next(rest) if letter == "o" else 1 for letter in self.layout)
        return outputs.reshape(*self.stack, *dims)

    @property
    def _sorted_axes(self) -> tuple[int, ...]:
        split = len(self.stack)
        order = sorted(range(len(self.layout)), key=lambda k: self.layout[k])  # i before o, stable
        return (*range(split), *(split + k for k in order))

    def to_matrix(self, weight: Array) -> Array:
        """Arrange a weight as `(*stack, in, out)`."""
        return jnp.transpose(weight, self._sorted_axes).reshape(
            *self.stack, self.fan_in, self.fan_out
        )

    def from_matrix(self, matrix: Array) -> Array:
        """Undo `to_matrix`."""
        weight = matrix.reshape(*self.stack, *self.in_dims, *self.out_dims)
        axes = self._sorted_axes
        return jnp.transpose(weight, sorted(range(len(axes)), key=axes.__getitem__))
