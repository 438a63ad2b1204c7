"""Random initializers: they read only the weight's shape."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.forms import Factors
from jlora.forms._draw import bounded
from jlora.forms._initial import initializer


@initializer
def kaiming_rank(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±1/√rank)` and set B to zero: the common `LoRALayer` in PyTorch.

    It stores `lora_A` as `(in, rank)`, and `kaiming_uniform_(lora_A, a=√5)` uses the last dimension
    as the fan-in, so the bound depends on the rank where PEFT's depends on the input's width.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out).

    Example:
        >>> a, b = kaiming_rank(jax.random.key(0), jnp.ones((16, 3)), rank=4)
        >>> bool(abs(a).max() <= 1 / 2), bool(abs(a).max() > 1 / 4)
        (True, True)
    """
    d_in, d_out = weight.shape
    return bounded(key, (d_in, rank), 1 / math.sqrt(rank), dtype), jnp.zeros((rank, d_out), dtype)


@initializer
def gaussian(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `N(0, 1/rank²)` and set B to zero: PEFT's `init_lora_weights="gaussian"`.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r; the standard deviation is 1/r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out).

    Example:
        >>> a, b = gaussian(jax.random.key(0), jnp.ones((4096, 3)), rank=4)
        >>> round(float(a.std()), 2)
        0.25

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """
    d_in, d_out = weight.shape
    return jax.random.normal(key, (d_in, rank), dtype) / rank, jnp.zeros((rank, d_out), dtype)


@initializer
def a_zero(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Set A to zero and draw B from `U(±1/√rank)`: the roles of A and B are exchanged.

    B's bound is PyTorch's default for `nn.Linear(rank, out)`, PEFT's `lora_B` module.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out); A·B = 0.

    Example:
        >>> a, b = a_zero(jax.random.key(0), jnp.ones((16, 3)), rank=4)
        >>> bool((a == 0).all()), bool(abs(b).max() <= 1 / 2)
        (True, True)

    Reference: Hayou et al. 2024, arXiv:2406.08447, compares the two sides (its "Init[B]").
    """
    d_in, d_out = weight.shape
    return jnp.zeros((d_in, rank), dtype), bounded(key, (rank, d_out), 1 / math.sqrt(rank), dtype)


@initializer
def uniform(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±1/√in)` and B from `U(±1/√rank)`: PEFT's `init_lora_weights=False`.

    Neither is zero, so the model does not start unchanged. For tests, or for an adapter whose
    values are set later.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out).

    Example:
        >>> a, b = uniform(jax.random.key(0), jnp.ones((16, 3)), rank=4)
        >>> bool(abs(a).max() <= 1 / 4), bool(abs(b).max() <= 1 / 2), bool(b.any())
        (True, True, True)

    Reference: PyTorch's defaults for `nn.Linear(in, rank)` and `nn.Linear(rank, out)`.
    """
    (d_in, d_out), (of_a, of_b) = weight.shape, jax.random.split(key)
    a = bounded(of_a, (d_in, rank), 1 / math.sqrt(d_in), dtype)
    return a, bounded(of_b, (rank, d_out), 1 / math.sqrt(rank), dtype)


@initializer
def orthogonal(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A and B from two orthogonal halves of the rank's space, so that `A B = 0`.

    `A = X Q₁/10`, `B = Q₂ᵀ Y/10`, where X and Y are normal and Q₁, Q₂ are the even and odd rows of
    a random orthogonal (rank, rank) matrix. Neither is zero, so both have a gradient from the
    start.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r, an even number.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out); A·B is zero up to rounding.

    Raises:
        ValueError: the rank is odd.

    Example:
        >>> a, b = orthogonal(jax.random.key(0), jnp.ones((16, 3)), rank=4)
        >>> bool(a.any()), bool(b.any()), bool(abs(a @ b).max() < 1e-6)
        (True, True, True)

    Reference: PEFT's `init_lora_weights="orthogonal"`.
    """
    if rank % 2:
        raise ValueError(
            f"`jlora.initializers.orthogonal(rank={rank})`: A and B use one half of the rank's "
            f"space each, so the rank must be even. Use `LoraSpec(rank={rank + 1})`."
        )
    (d_in, d_out), (of_q, of_x, of_y) = weight.shape, jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(of_q, (rank, rank)))[0]
    a = jnp.matmul(jax.random.normal(of_x, (d_in, rank // 2)), q[0::2], precision="highest")
    b = jnp.matmul(q[1::2].T, jax.random.normal(of_y, (rank // 2, d_out)), precision="highest")
    return (a / 10).astype(dtype), (b / 10).astype(dtype)
