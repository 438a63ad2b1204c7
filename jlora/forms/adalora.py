"""AdaLoRA: `W + s · A Λ B`, where Λ holds r singular values, some of which are pruned to zero.

Zhang et al. 2023, arXiv:2303.10512, eq. 3. PEFT's `ADALORA`, whose `lora_E` are the singular
values. `jlora.optim.adalora` prunes them.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora._arrays import Geometry, LoraArray
from jlora.forms._factors import changed_b
from jlora.forms._form import Factors, Form, Part
from jlora.forms._initial import initializer

VALUES = "singular_values"


@initializer
def adalora(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Draw A and B from `N(0, 0.02²)`: the singular vectors of AdaLoRA.

    Neither is zero: with `LoraSpec(form="adalora")` the singular values are initially zero.

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


def factors(node: LoraArray, geometry: Geometry) -> tuple[Array, Array]:
    """Return A and `Λ B`."""

    def scaled(b: Array) -> Array:
        return node.extra[VALUES].astype(b.dtype)[..., None] * b

    return node.lora_a, changed_b(node, geometry, scaled)


FORM = Form("adalora", adalora, extra={VALUES: Part("s r", shared=True)}, factors=factors)
