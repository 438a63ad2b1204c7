"""LoRA: `W + s · A B` with trainable A and B.

Hu et al. 2021, arXiv:2106.09685, eq. 3. PEFT's `LORA`.
"""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.forms._draw import bounded
from jlora.forms._form import Factors, Form
from jlora.forms._initial import initializer


@initializer
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
        >>> import jax
        >>> a, b = kaiming(jax.random.key(0), jnp.ones((16, 3)), rank=2)
        >>> a.shape, b.shape, bool(abs(a).max() <= 1 / 4)
        ((16, 2), (2, 3), True)

    Reference: He et al. 2015, arXiv:1502.01852, with a = √5: √(6 / ((1 + 5)·in)) = 1/√in.
    PyTorch's `kaiming_uniform_(lora_A, a=√5)` on `(rank, in)`.
    """
    d_in, d_out = weight.shape
    return bounded(key, (d_in, rank), 1 / math.sqrt(d_in), dtype), jnp.zeros((rank, d_out), dtype)


FORM = Form("lora", kaiming)
