"""The data model: `LoraArray` and `FullArray`, pytree nodes that stand where a weight stood.

They hold arrays and say which axis is which. They know neither rules nor the transform.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora._paths import describe


def _not_an_array(self: Any, *_: Any, **__: Any) -> Any:
    """Answer JAX and NumPy, which ask an operand of an unknown type for its array."""
    raise TypeError(
        f"a `{type(self).__name__}` came where an array was meant: the function does not know "
        "adapted parameters. Wrap it, `jlora.lora(fn)(params, ...)`, with the parameters as an "
        "argument, not closed over; or give it plain ones, `jlora.merge(params)`."
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "lora_a", "lora_b", "scaling", "magnitude", "core", "lambda_b"),
    meta_fields=("layout", "slices", "residual", "frozen"),
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
        magnitude: DoRA's m, `(*stack, *out_dims)`, or `None`: with it the weight is
            `m · (W + s · A B) / ‖W + s · A B‖`. PEFT's `lora_magnitude_vector`.
        residual: whether `base` is not the model's own weight but what an initializer left of it,
            `W - s · A B` of the first A and B; see `jlora.arithmetic.residual_to_lora`.
        core: what stands between A and B, or `None`: LoRA-XS's R, `(*stack, rank, rank)`, in
            `W + s · A R B`, or the diagonal of VeRA's Λ_d or AdaLoRA's Λ, `(*stack, rank)`.
        lambda_b: the diagonal of VeRA's Λ_b, `(*stack, *out_dims)`, or `None`: with both the weight
            is `W + s · A Λ_d B Λ_b`. PEFT's `vera_lambda_d` and `vera_lambda_b`.
        frozen: the names of those parts of the update that do not train: `("lora_a",)` of
            LoRA-FA's, `("lora_a", "lora_b")` of LoRA-XS's and VeRA's.

    Example:
        >>> import jax.numpy as jnp
        >>> w = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.zeros((2, 4)), 2.0, "io")
        >>> w.shape, w.rank
        ((3, 4), 2)

    References: Hu et al. 2021, arXiv:2106.09685, eq. 3; Liu et al. 2024, arXiv:2402.09353, eq. 5;
    Bałazy et al. 2024, arXiv:2405.17604, eq. 1; Kopiczko et al. 2023, arXiv:2310.11454, eq. 2;
    Zhang et al. 2023, arXiv:2308.03303 and arXiv:2303.10512.
    """

    base: Any
    lora_a: Any
    lora_b: Any
    scaling: Any
    layout: str
    slices: tuple[tuple[int, int], ...] | None = None
    magnitude: Any = None
    residual: bool = False
    core: Any = None
    lambda_b: Any = None
    frozen: tuple[str, ...] = ()

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


def accumulator(dtype: Any) -> Any:
    """Return the dtype to sum in: float32, or the dtype itself where it is wider."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def slice_width(slices: tuple[tuple[int, int], ...] | None, whole: int) -> int:
    """Return how much of an output dimension has an update."""
    return whole if slices is None else sum(stop - start for start, stop in slices)


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

    def factor_shapes(
        self, rank: int, slices: tuple[tuple[int, int], ...] | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of `lora_a` and `lora_b`."""
        width = slice_width(slices, self.out_dims[0])
        ranks = rank * (1 if slices is None else len(slices))
        return (
            (*self.stack, *self.in_dims, ranks),
            (*self.stack, rank, width, *self.out_dims[1:]),
        )

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


def _scaled_b(node: LoraArray, geometry: Geometry) -> Array:
    """Return R B, or Λ_d B Λ_b, in B's dtype: what A meets."""
    if node.core is None:
        return node.lora_b
    wide = accumulator(node.lora_b.dtype)
    shape = node.lora_b.shape
    b = node.lora_b.astype(wide).reshape(*geometry.stack, node.rank, geometry.fan_out)
    core = node.core.astype(wide)
    if core.ndim == b.ndim:
        b = jnp.matmul(core, b, precision=jax.lax.Precision.HIGHEST)
    else:
        b = core[..., None] * b
    if node.lambda_b is not None:
        b = b * node.lambda_b.astype(wide).reshape(*geometry.stack, 1, geometry.fan_out)
    return b.reshape(shape).astype(node.lora_b.dtype)


def whole_b(node: LoraArray, geometry: Geometry) -> Array:
    """Return what A meets, over all outputs: B, or B and what scales it.

    A sliced one's ranges are one below the other, with zeros elsewhere.
    """
    if node.slices is None:
        return _scaled_b(node, geometry)
    axis, rows, first = len(geometry.stack) + 1, [], 0
    for start, stop in node.slices:
        width = [(0, 0, 0)] * node.lora_b.ndim
        width[axis] = (start, geometry.out_dims[0] - stop, 0)
        piece = jax.lax.slice_in_dim(node.lora_b, first, first + stop - start, axis=axis)
        rows.append(jax.lax.pad(piece, jnp.zeros((), piece.dtype), width))
        first += stop - start
    return jnp.concatenate(rows, axis - 1)


def plain(node: LoraArray, shape: tuple[int, ...]) -> LoraArray:
    """Write an update of a weight of `shape` as one A and one B: slices and cores go into B."""
    whole = whole_b(node, Geometry.of(shape, node.layout))
    parts = {"slices": None, "core": None, "lambda_b": None, "frozen": ()}
    return dataclasses.replace(node, lora_b=whole, **parts)


def delta(node: LoraArray, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Return `s · A B` in a base weight's `shape`, in float32 or what of it and A is wider."""
    geometry = Geometry.of(shape, node.layout)
    rank = node.lora_a.shape[-1]
    a = node.lora_a.reshape(*geometry.stack, geometry.fan_in, rank)
    b = whole_b(node, geometry).reshape(*geometry.stack, rank, geometry.fan_out)
    wide = max(accumulator(node.lora_a.dtype), accumulator(dtype), key=lambda k: jnp.finfo(k).bits)
    ab = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    s = jnp.asarray(node.scaling, wide)
    return geometry.from_matrix(ab * s.reshape(*s.shape, *(1,) * (ab.ndim - s.ndim)))


def check(path: str, node: LoraArray, call: str) -> None:
    """Refuse a `LoraArray` whose parts do not fit one another, before anything is computed."""
    if any(isinstance(x, Tied) for x in (node.lora_a, node.lora_b, node.core)):
        raise ValueError(
            f'`{call}`: "{path}" is tied: a part of it is another node\'s. Give '
            "`jlora.untie(params)`, inside the function that is differentiated."
        )
    if node.base is None or node.lora_a is None or node.lora_b is None or node.scaling is None:
        raise ValueError(
            f'`{call}`: "{path}" is a part of a LoraArray (its base or its factors are taken out). '
            "Put it together first: `jlora.bind(base, adapter)` or "
            "`jlora.combine(trainable, frozen)`."
        )
    geometry = Geometry.of(node.shape, node.layout)
    a, b = geometry.factor_shapes(node.rank, node.slices)
    if node.lora_a.shape != a or node.lora_b.shape != b:
        raise ValueError(
            f"`{call}`: {describe(path, node.base)} with layout {node.layout!r} needs lora_a {a} "
            f"and lora_b {b}; got {node.lora_a.shape} and {node.lora_b.shape}. "
            "The adapter belongs to another model, or was stacked along another axis than its base."
        )
    if jnp.shape(node.scaling) not in ((), geometry.stack):
        raise ValueError(
            f"`{call}`: {describe(path, node.base)} needs a scaling of shape () or "
            f"{geometry.stack}; got {jnp.shape(node.scaling)}."
        )
    outs = (*geometry.stack, *geometry.out_dims)
    for name in ("magnitude", "lambda_b"):
        value = getattr(node, name)
        if value is not None and jnp.shape(value) != outs:
            raise ValueError(
                f"`{call}`: {describe(path, node.base)} with layout {node.layout!r} needs a {name} "
                f"of shape {outs}, one per output; got {jnp.shape(value)}."
            )
    matrix = (*geometry.stack, node.rank, node.rank)
    if node.core is not None and jnp.shape(node.core) not in (matrix, matrix[:-1]):
        raise ValueError(
            f"`{call}`: {describe(path, node.base)} of rank {node.rank} needs a core of shape "
            f"{matrix} or, of its diagonal, {matrix[:-1]}; got {jnp.shape(node.core)}."
        )
