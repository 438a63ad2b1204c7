"""What a storage format is: how rows of a weight become stored arrays, and rows again."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array


@runtime_checkable
class Format(Protocol):
    """Describe how the rows of a weight are stored. A frozen dataclass, compared by value.

    A weight is stored as rows `(*stack, out, in)`, whatever its layout: a row has the inputs of
    one output, and blocks of `block` inputs share a scale, as in GGUF and bitsandbytes files.

    Every part that `pack` returns begins with the stack axes, and at least one of them continues
    with exactly two more, the first of which is `out`.

    A format may own its products: `dot(parts, rows, dtype)` of `rows`, `(..., in)`, with the
    weight, `(..., out)`, and `dot_transposed(parts, outs, dtype)`, the reverse. With
    `on_host = True`, `pack` runs outside of `jax.jit`.
    """

    @property
    def name(self) -> str:
        """The name of the format in rules: "nf4"."""
        ...

    @property
    def block(self) -> int:
        """The number of consecutive inputs that share a scale; it must divide the inputs."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make this format from the one of its name."""
        ...

    def pack(self, rows: Array) -> dict[str, Array]:
        """Quantize float32 rows, `(*stack, out, in)`."""
        ...

    def unpack(self, parts: Mapping[str, Array]) -> Array:
        """Return the rows, `(*stack, out, in)`, in float32."""
        ...
