"""MiCA: `W + s · A B` with a frozen B, the output directions of W's smallest singular values.

arXiv:2604.01694. PEFT's `init_lora_weights="mica"`.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.forms._form import Factors, Form
from jlora.forms._initial import initializer
from jlora.forms._singular import singular


@initializer
def mica(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Set A to zero, and B to the output directions of W's smallest singular values.

    `B = Vₘᵀ`, where m are the last r of min(in, out). PEFT trains only A, as does
    `LoraSpec(form="mica")`.

    Args:
        key: a PRNG key; not read.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out); A·B = 0, so the model starts unchanged.

    Example:
        >>> import jax
        >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> a, b = mica(jax.random.key(0), w, rank=1)
        >>> bool(a.any()), abs(b).tolist()
        (False, [[0.0, 0.0, 1.0]])

    Reference: arXiv:2604.01694. PEFT's `init_lora_weights="mica"`.
    """
    vt = singular(weight, slice(-rank, None))[2]
    return jnp.zeros((weight.shape[0], rank), dtype), vt.astype(dtype)


FORM = Form("mica", mica, frozen=("lora_b",))
