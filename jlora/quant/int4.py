"""Int4: symmetric, with one scale per group of inputs."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.quant import _nibbles

_PAIRS = _nibbles.pairs_of(np.arange(16, dtype=np.float32) - 8)


@dataclasses.dataclass(frozen=True)
class Int4:
    """Store a weight as integers from -7 to 7, with a float32 scale per group of inputs.

    `W ≈ scale ∘ codes` with `scale = max|W| / 7` over each group; 4 + 32/group bits a weight.

    Attributes:
        group: the number of consecutive inputs that share a scale, an even number.

    Example:
        >>> import jax, jlora
        >>> w = jax.random.normal(jax.random.key(0), (64, 4))
        >>> stored = jlora.quantize({"w": w}, {"w": Int4(group=32)})["w"]
        >>> stored.parts["codes"].shape, stored.parts["scale"].shape, stored.nbytes
        ((4, 32), (4, 2), 160)
    """

    group: int = 128

    name = "int4"
    settings = property(dataclasses.asdict)

    def __post_init__(self) -> None:
        _nibbles.check_block(self.group, f"{self!r}")

    @property
    def block(self) -> int:
        """The group."""
        return self.group

    def pack(self, rows: Float[Array, "*stack out inputs"]) -> dict[str, Array]:
        """Round to integers from -7 to 7; a byte has two, each plus 8."""
        groups = rows.reshape(*rows.shape[:-1], -1, self.group)
        most = jnp.abs(groups).max(-1)
        factor = jnp.where(most > 0, 7.0 / jnp.where(most > 0, most, 1.0), 0.0)
        codes = jnp.round(groups * factor[..., None]).reshape(rows.shape)
        packed = _nibbles.pack((codes + 8).astype(jnp.uint8))
        return {"codes": packed, "scale": most * jnp.float32(1 / 7)}

    def unpack(self, parts: Mapping[str, Array]) -> Float[Array, "*stack out inputs"]:
        """Multiply codes and scales."""
        codes = parts["codes"]
        groups = _nibbles.look_up(codes.reshape(*codes.shape[:-1], -1, self.group // 2), _PAIRS)
        rows = groups * parts["scale"][..., None]
        return rows.reshape(*codes.shape[:-1], -1)
