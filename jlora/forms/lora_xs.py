"""LoRA-XS: `W + s · A R B` with a trainable r × r matrix R between frozen singular vectors of W.

Bałazy et al. 2024, arXiv:2405.17604, eq. 1.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora._arrays import Geometry, LoraArray
from jlora.forms._factors import changed_b
from jlora.forms._form import Factors, Form, Part
from jlora.forms._initial import initializer
from jlora.forms._singular import singular


@initializer
def lora_xs(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Factors:
    """Set A and B to the truncated SVD of W: `A B` is its best approximation of rank r.

    `W = U S Vᵀ`, `A = Uᵣ`, `B = Sᵣ Vᵣᵀ`. Both are frozen with `LoraSpec(form="lora_xs")`,
    where R is initially zero, so the weight does not change.

    Args:
        key: a PRNG key; not read.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r; not read.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank) and `lora_b` (rank, out).

    Example:
        >>> a, b = lora_xs(jax.random.key(0), jnp.diag(jnp.array([3.0, 2.0, 1.0])), rank=1)
        >>> jnp.diag(a @ b).tolist()
        [3.0, 0.0, 0.0]

    Reference: Bałazy et al. 2024, arXiv:2405.17604, section 3.2, where W is (out, in), so its A
    is `Uᵣ Sᵣ` and on the output side. The paper initializes R to `N(0, 1e-5²)`.
    """
    u, s, vt = singular(weight, slice(rank))
    return u.astype(dtype), (s[:, None] * vt).astype(dtype)


def factors(node: LoraArray, geometry: Geometry) -> tuple[Array, Array]:
    """Return A and `R B`."""

    def scaled(b: Array) -> Array:
        core = node.extra["core"].astype(b.dtype)
        return jnp.matmul(core, b, precision=jax.lax.Precision.HIGHEST)

    return node.lora_a, changed_b(node, geometry, scaled)


FORM = Form(
    "lora_xs",
    lora_xs,
    frozen=("lora_a", "lora_b"),
    extra={"core": Part("s r r", shared=True)},
    factors=factors,
)
