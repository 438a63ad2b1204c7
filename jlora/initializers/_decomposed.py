"""Initializers from a decomposition of the weight: singular value or QR.

Decompositions run in float32 or wider. The third array returned is the residual, `W - s·A·B`,
computed in float32 and rounded once to the weight's dtype.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora._arrays import accumulator
from jlora.forms import Split
from jlora.forms._initial import initializer
from jlora.forms._singular import singular

_EXACT = jax.lax.Precision.HIGHEST


def _wide(weight: Float[Array, "in out"]) -> Float[Array, "in out"]:
    return weight.astype(accumulator(weight.dtype))


def residual_of(weight: Array, a: Array, b: Array, scaling: ArrayLike) -> Array:
    """Return `W - s·A·B` for A and B as stored, in W's dtype."""
    wide = _wide(weight)
    ab = jnp.matmul(a.astype(wide.dtype), b.astype(wide.dtype), precision=_EXACT)
    return (wide - jnp.asarray(scaling, wide.dtype) * ab).astype(weight.dtype)


def share(
    weight: Array, u: Array, s: Array, vt: Array, scaling: ArrayLike, dtype: DTypeLike
) -> Split:
    """Divide the singular values between A and B, so that `s·A·B = U S Vᵀ`."""
    if isinstance(scaling, int | float) and scaling <= 0:
        raise ValueError(
            f"`jlora.initializers`: s·A·B cannot be a part of the weight with scaling={scaling}. "
            "Give an alpha above 0."
        )
    root = jnp.sqrt(s / jnp.asarray(scaling, s.dtype))
    a, b = (u * root[None]).astype(dtype), (root[:, None] * vt).astype(dtype)
    return a, b, residual_of(weight, a, b, scaling)


@initializer
def pissa(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
    *,
    niter: int | None = None,
) -> Split:
    """Initialize A and B with the largest singular values of W: `s A B = Uᵣ Sᵣ Vᵣᵀ`.

    `A = Uᵣ √(Sᵣ/s)`, `B = √(Sᵣ/s) Vᵣᵀ`; the residual is frozen. For a bfloat16 weight A and B are
    float32, but the residual is rounded to bfloat16, so the model starts unchanged up to one
    rounding.

    Args:
        key: a PRNG key; read only with `niter`.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r, above 0.
        dtype: of A and B.
        niter: None for the exact decomposition, or the number of subspace iterations of a
            randomized one, which is faster if r is much smaller than in and out. Use
            `functools.partial(pissa, niter=16)` as the initializer.

    Returns:
        `lora_a` (in, rank), `lora_b` (rank, out), and the residual `W - s·A·B` (in, out).

    Raises:
        ValueError: scaling not above 0, or a rank above min(in, out).

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (16, 8))
        >>> a, b, rest = pissa(jax.random.key(1), w, rank=2, scaling=4.0)
        >>> bool(jnp.allclose(rest + 4 * a @ b, w, atol=1e-5)), jnp.linalg.matrix_rank(rest).item()
        (True, 6)

    Reference: Meng et al. 2024, arXiv:2404.02948, section 3; Halko et al. 2009, arXiv:0909.4061,
    algorithm 4.4. PEFT's `init_lora_weights="pissa"` and `"pissa_niter_16"`.
    """
    if niter is None:
        u, s, vt = singular(weight, slice(rank))
    else:
        u, s, vt = svd_of_a_range(key, _wide(weight), rank, niter)
    return share(weight, u, s, vt, scaling, dtype)


def svd_of_a_range(
    key: PRNGKeyArray, weight: Array, rank: int, niter: int
) -> tuple[Array, Array, Array]:
    """Compute a randomized SVD of W, with `niter` subspace iterations."""

    def orthonormal(y: Array) -> Array:
        return jnp.linalg.qr(y)[0]

    def iterate(_: ArrayLike, q: Array) -> Array:
        back = orthonormal(jnp.matmul(weight.T, q, precision=_EXACT))  # (out, rank)
        return orthonormal(jnp.matmul(weight, back, precision=_EXACT))  # (in, rank)

    draw = jax.random.normal(key, (weight.shape[1], rank), weight.dtype)
    start = orthonormal(jnp.matmul(weight, draw, precision=_EXACT))
    q = jax.lax.fori_loop(0, niter, iterate, start)
    u, s, vt = jnp.linalg.svd(jnp.matmul(q.T, weight, precision=_EXACT), full_matrices=False)
    return jnp.matmul(q, u, precision=_EXACT), s, vt


@initializer
def milora(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Split:
    """Initialize A and B with the smallest singular values of W; the principal part is frozen.

    `A = Uₘ √(Sₘ/s)`, `B = √(Sₘ/s) Vₘᵀ`, where m are the last r of min(in, out). Training starts
    in the directions that matter least to W.

    Args:
        key: a PRNG key; not read.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r, above 0.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank), `lora_b` (rank, out), and the residual `W - s·A·B` (in, out).

    Raises:
        ValueError: scaling not above 0, or a rank above min(in, out).

    Example:
        >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> a, b, rest = milora(jax.random.key(0), w, rank=1)
        >>> jnp.diag(rest).tolist()
        [3.0, 2.0, 0.0]

    Reference: Wang et al. 2024, arXiv:2406.09044, section 3.
    """
    return share(weight, *singular(weight, slice(-rank, None)), scaling, dtype)


@initializer
def olora(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Split:
    """Initialize A and B with the leading part of a QR decomposition of Wᵀ.

    `Wᵀ = Q R`, `B = Qᵣᵀ`, `A = Rᵣᵀ = W Qᵣ`; the residual is `W - s A B`. Qᵣ is computed from the
    first r rows of W alone.

    Args:
        key: a PRNG key; not read.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r. A and B do not depend on it; the residual does.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank), `lora_b` (rank, out), and the residual `W - s·A·B` (in, out).

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (16, 8))
        >>> a, b, rest = olora(jax.random.key(1), w, rank=2)
        >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-5))
        True

    Reference: Büyükakyüz 2024, arXiv:2406.01775. PEFT's `init_lora_weights="olora"`,
    which does not divide by s either.
    """
    wide = _wide(weight)
    # The first r columns of Q are determined by those of Wᵀ, and Rᵣ = QᵣᵀWᵀ: no decomposition, and
    # on a mesh no gather, of all of W.
    q, _ = jnp.linalg.qr(wide[:rank].T)  # (out, rank)
    a, b = jnp.matmul(wide, q, precision=_EXACT).astype(dtype), q.T.astype(dtype)
    return a, b, residual_of(weight, a, b, scaling)
