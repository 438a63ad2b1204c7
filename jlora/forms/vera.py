"""VeRA: `W + s · A Λ_d B Λ_b` with two trainable diagonals and frozen random A and B.

Kopiczko et al. 2023, arXiv:2310.11454, eq. 2. PEFT's `VERA`, whose `vera_lambda_d` and
`vera_lambda_b` are the diagonals. The paper uses s = 1, `alpha=rank`, and the same A and B
for all layers: `jlora.tie`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora._arrays import Geometry, LoraArray
from jlora.forms._draw import bounded
from jlora.forms._factors import changed_b
from jlora.forms._form import Factors, Form, Part
from jlora.forms._initial import initializer


@initializer
def vera(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±√(6/in))` and B from `U(±√(6/rank))`: the frozen factors of VeRA.

    Neither is zero: with `LoraSpec(form="vera")` Λ_b is initially zero.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out).

    Example:
        >>> a, b = vera(jax.random.key(0), jnp.ones((24, 3)), rank=6)
        >>> bool(abs(a).max() <= 1 / 2), bool(abs(b).max() <= 1), bool(b.any())
        (True, True, True)

    Reference: Kopiczko et al. 2023, arXiv:2310.11454, section 3.2; He et al. 2015,
    arXiv:1502.01852, eq. 10. PEFT's `VERA`, whose `_kaiming_init` is PyTorch's
    `kaiming_uniform_` on `(rank, in)` and `(out, rank)`.
    """
    (d_in, d_out), (of_a, of_b) = weight.shape, jax.random.split(key)
    a = bounded(of_a, (d_in, rank), math.sqrt(6 / d_in), dtype)
    return a, bounded(of_b, (rank, d_out), math.sqrt(6 / rank), dtype)


def _tenth(node: LoraArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.full(shape, 0.1, dtype)


def factors(node: LoraArray, geometry: Geometry) -> tuple[Array, Array]:
    """Return A and `Λ_d B Λ_b`."""

    def scaled(b: Array) -> Array:
        of_ranks, of_outputs = (
            node.extra[name].astype(b.dtype) for name in ("lambda_d", "lambda_b")
        )
        b = of_ranks[..., None] * b
        return b * of_outputs.reshape(*geometry.stack, 1, geometry.fan_out)

    return node.lora_a, changed_b(node, geometry, scaled)


FORM = Form(
    "vera",
    vera,
    frozen=("lora_a", "lora_b"),
    extra={"lambda_d": Part("s r", begin=_tenth, shared=True), "lambda_b": Part("so")},
    factors=factors,
)
