"""What `LoraArray` and `FullArray` share: a short repr, and an error where an array is expected."""

import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jlora._paths import short_repr


class NotAnArrayError(TypeError, AttributeError):
    """Raised for an attribute of arrays; also an AttributeError, so that `hasattr` is False."""


_OF_ARRAYS = {name for kind in (jax.Array, np.ndarray) for name in dir(kind) if name[0] != "_"}
_OF_ARRAYS |= {"block_until_ready", "devices"}  # of JAX's arrays, not of their abstract class


def _not_an_array(self: object, *_: object, **__: object) -> Any:
    """Raise where JAX, NumPy or an operator asks a node for its values."""
    raise TypeError(_unwrapped(self, "an array"))


def _unwrapped(node: object, expected: str) -> str:
    return (
        f"expected {expected}, got a `{type(node).__name__}`: the function does not support "
        "adapted parameters. Wrap it, `jlora.lora(fn)(params, ...)`, with the parameters as an "
        "argument, not closed over; or pass plain parameters, `jlora.merge(params)`."
    )


class Node:
    """A pytree node that replaces an array: it has a shape and a dtype, but no values."""

    __array__ = __jax_array__ = __getitem__ = _not_an_array
    __matmul__ = __rmatmul__ = __add__ = __radd__ = __sub__ = __rsub__ = _not_an_array
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _not_an_array
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _not_an_array
    __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = _not_an_array
    __lt__ = __le__ = __gt__ = __ge__ = _not_an_array
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        # Nodes are compared by identity; with numbers that would be False, where an array's is not.
        if isinstance(other, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            _not_an_array(self)
        return NotImplemented

    if TYPE_CHECKING:  # of the subclasses

        @property
        def shape(self) -> tuple[int, ...]: ...

    else:  # not for type checkers, to which it would allow any attribute

        def __getattr__(self, name: str) -> Any:
            kind = type(self).__name__
            if hasattr(type(self), name):  # a property that failed
                raise AttributeError(
                    f"`{kind}.{name}`: a part of the node is missing, as in a detached adapter or "
                    "half of `jlora.partition`. Take it of `jlora.bind(base, adapter)` or "
                    "`jlora.combine(trainable, frozen)`.",
                    name=name,
                    obj=self,
                )
            if name in _OF_ARRAYS:
                raise NotAnArrayError(_unwrapped(self, f"an array with `.{name}`"))
            raise AttributeError(f"a `{kind}` has no attribute {name!r}", name=name, obj=self)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the weight, without those of A and B."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays of the node: the base as it is stored, and the update."""
        arrays = [x for x in jax.tree.leaves(self) if hasattr(x, "dtype")]
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)

    def __repr__(self) -> str:
        return short_repr(self)
