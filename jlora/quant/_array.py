"""`QuantArray`: a weight in a storage format, as a pytree node in place of the array."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jlora import _compat, _serialization
from jlora._arrays import Geometry
from jlora._node import Node
from jlora._spec import check_layout
from jlora.quant import _axes
from jlora.quant._format import Format
from jlora.quant._formats import read_format
from jlora.quant._product import product


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("parts",),
    meta_fields=("format", "layout", "dims", "kind"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantArray(Node):
    """Hold a weight in a storage format: what `jlora.quantize` puts in place of an array.

    Everything treats it as the weight that it stands for. `jlora.lora(fn)` builds it where it is
    multiplied and drops it, or multiplies with the codes.

    Attributes:
        parts: the stored arrays by name, as `format` defines them; each begins with the stack axes.
        format: how they are stored, such as `jlora.quant.NF4()`.
        layout: one letter per non-stack dimension, `i` (input) or `o` (output). Blocks and groups
            are runs of inputs.
        dims: the shape without stack dimensions.
        kind: the dtype of the weight, as text.

    Example:
        >>> import jlora
        >>> w = jlora.quantize({"w": jnp.ones((64, 4), jnp.bfloat16)}, {"w": "nf4"})["w"]
        >>> w.shape, str(w.dtype), w.dequantize().dtype.name
        ((64, 4), 'bfloat16', 'bfloat16')
    """

    parts: Any
    format: Any
    layout: str
    dims: tuple[int, ...]
    kind: str

    def __post_init__(self) -> None:
        _serialization.register_with_flax()

    @property
    def stack(self) -> int:
        """The number of leading stack dimensions, which every part has."""
        return max(x.ndim for x in self.parts.values()) - 2

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        longest = max(self.parts.values(), key=lambda x: x.ndim)
        return (*longest.shape[: longest.ndim - 2], *self.dims)

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return jnp.dtype(self.kind)

    @property
    def builds(self) -> bool:
        """Whether products build the weight."""
        return not hasattr(self.format, "dot")

    def dequantize(self) -> Array:
        """Build the weight: in float32, then cast to its dtype."""
        return _compat.without_shardings(self._built, self.explicit_sharding(), self.parts)

    def explicit_sharding(self) -> Any:
        """Return the sharding of the weight along explicit axes of a mesh; None without any."""
        return _axes.explicit(self)

    def _built(self, parts: Mapping[str, Array]) -> Array:
        rows = self.format.unpack(parts).astype(self.dtype)
        return Geometry.of(self.shape, self.layout).from_matrix(jnp.swapaxes(rows, -1, -2))

    def as_layout(self, layout: str, dims: Sequence[int]) -> "QuantArray":
        """Return the same rows as a weight of another layout and shape; no byte changes.

        Args:
            layout: one letter per dimension, `i` (input) or `o` (output).
            dims: the shape, without stack dimensions: the inputs in their order, and the outputs.

        Returns:
            A node that shares its arrays with this one.

        Raises:
            ValueError: the inputs or outputs are not as many.

        Example:
            >>> import jlora
            >>> w = jlora.quantize({"w": jnp.ones((6, 64))}, {"w": "nf4"}, layouts={"w": "oi"})["w"]
            >>> w.as_layout("io", (64, 6)).shape, w.as_layout("ioo", (64, 2, 3)).shape
            ((64, 6), (64, 2, 3))
        """
        check_layout(layout, f"QuantArray.as_layout({layout!r}, ...)")
        own, dims = Geometry.of(self.dims, self.layout), tuple(dims)
        new = Geometry.of(dims, layout) if len(dims) == len(layout) else None
        if new is None or (new.fan_in, new.fan_out) != (own.fan_in, own.fan_out):
            raise ValueError(
                f"`QuantArray.as_layout({layout!r}, {dims})`: the weight has {own.fan_in} inputs "
                f"and {own.fan_out} outputs, in the shape {self.dims} with layout {self.layout!r}. "
                "Give dimensions with these products."
            )
        return dataclasses.replace(self, layout=layout, dims=dims)

    def axes_of(self, entries: Sequence[Any], mesh: Any) -> tuple[Any, ...]:
        """Return the mesh axes of each axis of the weight, given those of its codes."""
        return _axes.of_weight(entries, self.layout, self.dims, mesh)

    def dot(self, x: Array, axes: tuple[tuple[int, ...], tuple[int, ...]], dtype: DTypeLike) -> Any:
        """Return the format's own product with x, if it has one: see `jlora._base.StoredWeight`."""
        floats = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 16
        if self.stack or not floats:
            return NotImplemented
        of_x, of_w = (list(side) for side in axes)
        sides = {side: [k for k, c in enumerate(self.layout) if c == side] for side in "io"}
        for side, other in (("i", "o"), ("o", "i")):
            if sorted(of_w) != sides[side]:
                continue
            free = [k for k in range(x.ndim) if k not in of_x]
            order = [of_x[of_w.index(k)] for k in sides[side]]
            last = lax.transpose(x, (*free, *order))
            last = last.reshape(*last.shape[: len(free)], -1)
            own = Geometry.of(self.dims, self.layout)
            both = own.fan_out, own.fan_in
            out = product(self.format, self.parts, last, both, self.kind, dtype, side == "o")
            if out is NotImplemented:
                return out
            return out.reshape(*out.shape[:-1], *(self.dims[k] for k in sides[other]))
        return NotImplemented


def _decode(values: Any) -> tuple[Any, ...]:
    (name, settings), *rest = values
    return (read_format(name, settings), *rest)


_serialization.register(QuantArray, ("format", "layout", "dims", "kind"), _decode)


def pack(weight: Array, format: Format, layout: str) -> QuantArray:
    """Store a weight, `(*stack, *dims)`, in a format."""
    geometry = Geometry.of(weight.shape, layout)
    on_host = getattr(format, "on_host", False)
    run = functools.partial(_packed, format=None if on_host else format, layout=layout)
    parts = _compat.without_shardings(run, _axes.explicit_parts(run, weight, layout), weight)
    parts = format.pack(parts["rows"]) if on_host else parts
    parts = _axes.placed(parts, weight, layout)
    dims = tuple(weight.shape[len(geometry.stack) :])
    return QuantArray(parts, format, layout, dims, jnp.dtype(weight.dtype).name)


@functools.partial(jax.jit, static_argnames=("format", "layout"))
def _packed(weight: Array, format: Format | None, layout: str) -> dict[str, Array]:
    """Pack a weight's float32 rows, `(*stack, out, in)`; without a format, return these."""
    matrix = Geometry.of(weight.shape, layout).to_matrix(weight)
    rows = jnp.swapaxes(matrix, -1, -2).astype(jnp.float32)
    return {"rows": rows} if format is None else format.pack(rows)
