"""The data model: `LoraArray` and `FullArray`, pytree nodes that stand where a weight stood.

They hold arrays and say which axis is which. They know neither rules nor the transform.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jlora._base import is_stored

Axes = TypeVar("Axes", str, PartitionSpec, tuple[Any, ...])


def _not_an_array(self: Any, *_: Any, **__: Any) -> Any:
    """Answer JAX and NumPy, which ask an operand of an unknown type for its array."""
    raise TypeError(
        f"a `{type(self).__name__}` came where an array was meant: the function does not know "
        "adapted parameters. Wrap it, `jlora.lora(fn)(params, ...)`, with the parameters as an "
        "argument, not closed over; or give it plain ones, `jlora.merge(params)`."
    )


# The axes of A and B, for `along`.
AXES = {"lora_a": "si r", "lora_b": "s r o"}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "lora_a", "lora_b", "scaling", "extra"),
    meta_fields=("layout", "slices", "residual", "form"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class LoraArray:
    """A frozen weight and its low-rank update, `W + s · A B`, never summed.

    Attributes:
        base: the frozen weight, `(*stack, *dims)`; `None` in a detached adapter.
        lora_a: input side, `(*stack, *in_dims, rank)`. PEFT's `lora_A.weight`, transposed.
        lora_b: output side, `(*stack, rank, *out_dims)`. PEFT's `lora_B.weight`, transposed.
        scaling: `s`, a scalar or `(*stack)`; a leaf, so another alpha never recompiles.
        layout: one letter per non-stack dimension of `base`, `i` (input) or `o` (output).
        slices: `(start, stop)` ranges of the first output dimension, or `None` for all of it. Each
            range has an update of its own: `lora_a` is `(*stack, *in_dims, n · rank)`, the ranges'
            A side by side, and `lora_b` has the ranges' widths, side by side, for that dimension.
            loralib's `MergedLinear`, transposed.
        residual: whether `base` is not the model's own weight but what an initializer left of it,
            `W - s · A B` of the first A and B; see `jlora.arithmetic.residual_to_lora`.
        extra: the other parts of the update by name, which `form` and DoRA define; see
            `jlora.forms`. A part that `jlora.partition` took out is `None`.
        form: the name of the variant, as in `LoraSpec(form=...)`: what the parts mean, and which of
            them train.

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
    # Not `dict[str, Any]`: Orbax takes an empty dict for a leaf, and puts others of its own there.
    extra: Any = dataclasses.field(default_factory=dict)
    form: str = "lora"

    __jax_array__ = __array__ = _not_an_array

    @property
    def shape(self) -> tuple[int, ...]:
        """The base weight's shape."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The base weight's dtype."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """The base weight's number of dimensions."""
        return len(self.shape)

    @property
    def rank(self) -> int:
        """The rank r of the update, of each slice's where it has slices."""
        return self.lora_a.shape[-1] // (1 if self.slices is None else len(self.slices))

    @property
    def parts(self) -> dict[str, Any]:
        """The parts of the update by name: A, B and `extra`."""
        return {"lora_a": self.lora_a, "lora_b": self.lora_b, **self.extra}

    def with_parts(self, parts: Mapping[str, Any]) -> "LoraArray":
        """Return the node with other values for these parts, A and B or in `extra`."""
        factors = {name: x for name, x in parts.items() if name in AXES}
        extra = {name: x for name, x in parts.items() if name not in AXES}
        return dataclasses.replace(self, **factors, extra={**self.extra, **extra})


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Tied:
    """Stands for a part of a `LoraArray` that another node has: see `jlora.tie`."""

    owner: str


@functools.partial(jax.tree_util.register_dataclass, data_fields=("base", "value"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class FullArray:
    """A parameter that is trained whole, keeping its original.

    Attributes:
        base: the original, frozen; `None` in a detached adapter.
        value: what trains and what the model sees, of the base's shape and dtype.

    Reference: PEFT's `modules_to_save` and `bias`.
    """

    base: Any
    value: Any

    __jax_array__ = __array__ = _not_an_array

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The parameter's dtype."""
        return self.value.dtype


Adapted = LoraArray | FullArray


def is_adapted(x: Any) -> bool:
    """Whether `x` is a node of jlora's (for `is_leaf=`)."""
    return isinstance(x, Adapted)


def is_leaf(x: Any) -> bool:
    """Whether `x` is one leaf of a tree of parameters (for `is_leaf=`)."""
    return is_adapted(x) or is_stored(x)


def accumulator(dtype: Any) -> Any:
    """Return the dtype to sum in: float32, or the dtype itself where it is wider."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


@functools.cache
def _groups(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group) for group in axes.split())


def along(axes: str, roles: Sequence[Any], of_base: Axes, rank: Any = None) -> Axes:
    """Return what a part's axes have, given what the base's axes have: the one derivation of it.

    Args:
        axes: the part's, in groups: "si r" has the base's axes of roles s (stack) and i (input), in
            the base's order, and then the rank; "s r o" stack axes, the rank and output axes.
        roles: of the base's axes.
        of_base: what each axis of the base has: its size, its letter in an einsum, its entry in a
            `PartitionSpec` (which may be shorter than the base's axes are many).
        rank: what the rank's axis has.

    Returns:
        As many as the part has axes, of the type of `of_base`.

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
    """How a layout divides a shape: `(*stack, *dims)` into stack, input and output dimensions."""

    stack: tuple[int, ...]
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    layout: str

    @classmethod
    def of(cls, shape: tuple[int, ...], layout: str) -> "Geometry":
        """Divide `shape`; its leading dimensions beyond the layout's length are stack."""
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

    def along(self, axes: str, of_base: Axes, rank: Any = None) -> Axes:
        """Return what a part's axes have, given what the base's have: `along` by the layout."""
        return along(axes, "s" * len(self.stack) + self.layout, of_base, rank)

    def sliced(self, slices: tuple[tuple[int, int], ...] | None) -> "Geometry":
        """Return the geometry of the outputs in the slices, side by side."""
        if slices is None:
            return self
        width = sum(stop - start for start, stop in slices)
        return dataclasses.replace(self, out_dims=(width, *self.out_dims[1:]))

    def across(self, outputs: Array) -> Array:
        """Arrange `(*stack, *out_dims)` to broadcast against a weight."""
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
