"""Initial values of A and B: plain functions `(key, weight, rank, scaling, dtype) -> (A, B)`.

`weight` is one weight arranged as `(in, out)`; A comes back as `(in, rank)` and B as `(rank, out)`.
`jlora.attach` arranges, and maps over stacks. A function that never reads the weight's values costs
nothing for them: `attach` compiles it, and what is not used is not computed.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

Factors = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]
Initializer = Callable[..., Factors]


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
