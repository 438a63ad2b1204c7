"""Initial values that are drawn: they read the weight's shape alone."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

Factors = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]
# A, B and what is left of the weight, for `base`.
Split = tuple[Float[Array, "in rank"], Float[Array, "rank out"], Float[Array, "in out"]]
Initializer = Callable[..., Factors | Split]


def _uniform(
    key: PRNGKeyArray, shape: tuple[int, int], bound: float, dtype: DTypeLike
) -> Float[Array, "m n"]:
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def kaiming(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±1/√in)` and set B to zero: PEFT's `init_lora_weights=True`, the default.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out); A·B = 0, so the model starts unchanged.

    Example:
        >>> a, b = kaiming(jax.random.key(0), jnp.ones((16, 3)), rank=2)
        >>> a.shape, b.shape, bool(abs(a).max() <= 1 / 4)
        ((16, 2), (2, 3), True)

    Reference: He et al. 2015, arXiv:1502.01852, with a = √5: √(6 / ((1 + 5)·in)) = 1/√in.
    PyTorch's `kaiming_uniform_(lora_A, a=√5)` on `(rank, in)`.
    """
    d_in, d_out = weight.shape
    return _uniform(key, (d_in, rank), 1 / math.sqrt(d_in), dtype), jnp.zeros((rank, d_out), dtype)


def kaiming_rank(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±1/√rank)` and set B to zero: the textbook `LoRALayer` in PyTorch.

    There `lora_A` is stored `(in, rank)` and `kaiming_uniform_(lora_A, a=√5)` takes the last
    dimension for the fan-in, so the bound has rank where PEFT's has the input's width.

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
    return _uniform(key, (d_in, rank), 1 / math.sqrt(rank), dtype), jnp.zeros((rank, d_out), dtype)


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


def a_zero(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Set A to zero and draw B from `U(±1/√rank)`: the update starts at zero from the other side.

    B's bound is the one PyTorch gives `nn.Linear(rank, out)`, PEFT's `lora_B` module.

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
    return jnp.zeros((d_in, rank), dtype), _uniform(key, (rank, d_out), 1 / math.sqrt(rank), dtype)


def uniform(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±1/√in)` and B from `U(±1/√rank)`: PEFT's `init_lora_weights=False`.

    Neither is zero, so the model starts changed: for tests, or before an adapter is filled in.

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

    Reference: what PyTorch gives `nn.Linear(in, rank)` and `nn.Linear(rank, out)`.
    """
    (d_in, d_out), (of_a, of_b) = weight.shape, jax.random.split(key)
    a = _uniform(of_a, (d_in, rank), 1 / math.sqrt(d_in), dtype)
    return a, _uniform(of_b, (rank, d_out), 1 / math.sqrt(rank), dtype)


def orthogonal(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A and B from two orthogonal halves of the rank's space, so that `A B = 0`.

    `A = X Q₁/10`, `B = Q₂ᵀ Y/10`, where X and Y are normal and Q₁, Q₂ the even and odd rows of a
    random orthogonal (rank, rank) matrix. Neither is zero, so both have a gradient at once.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r, an even number.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out); A·B is zero but for rounding.

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
            f"`jlora.initializers.orthogonal(rank={rank})`: A has one half of the rank's space and "
            f"B the other, so the rank must be even. Give `LoraSpec(rank={rank + 1})`."
        )
    (d_in, d_out), (of_q, of_x, of_y) = weight.shape, jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(of_q, (rank, rank)))[0]
    a = jnp.matmul(jax.random.normal(of_x, (d_in, rank // 2)), q[0::2], precision="highest")
    b = jnp.matmul(q[1::2].T, jax.random.normal(of_y, (rank // 2, d_out)), precision="highest")
    return (a / 10).astype(dtype), (b / 10).astype(dtype)


def vera(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A from `U(±√(6/in))` and B from `U(±√(6/rank))`: the frozen factors of VeRA.

    Neither is zero: with `LoraSpec(form="vera")` it is Λ_b that begins as zero.

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
    a = _uniform(of_a, (d_in, rank), math.sqrt(6 / d_in), dtype)
    return a, _uniform(of_b, (rank, d_out), math.sqrt(6 / rank), dtype)


def adalora(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A and B from `N(0, 0.02²)`: the singular vectors of AdaLoRA.

    Neither is zero: with `LoraSpec(form="adalora")` it is the singular values that begin as zero.

    Args:
        key: a PRNG key.
        weight: the base weight as `(in, out)`; only its shape is read.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out).

    Example:
        >>> a, b = adalora(jax.random.key(0), jnp.ones((200, 100)), rank=50)
        >>> round(float(a.std()), 3), round(float(b.std()), 3)
        (0.02, 0.02)

    Reference: Zhang et al. 2023, arXiv:2303.10512, section 3.1. PEFT's `ADALORA`.
    """
    (d_in, d_out), (of_a, of_b) = weight.shape, jax.random.split(key)
    a, b = (
        0.02 * jax.random.normal(k, s) for k, s in ((of_a, (d_in, rank)), (of_b, (rank, d_out)))
    )
    return a.astype(dtype), b.astype(dtype)
