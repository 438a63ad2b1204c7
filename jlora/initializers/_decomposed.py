"""Initial values that are parts of the weight itself: singular values and vectors, or Q and R.

Decompositions run in float32 (or wider). What A and B take out of the weight is left out of the
third array that comes back, the residual: summed in float32 and rounded once to the weight's dtype.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora._arrays import accumulator
from jlora.forms import Split

_EXACT = jax.lax.Precision.HIGHEST


def _wide(weight: Float[Array, "in out"]) -> Float[Array, "in out"]:
    return weight.astype(accumulator(weight.dtype))


def residual_of(weight: Array, a: Array, b: Array, scaling: ArrayLike) -> Array:
    """Return `W - s·A·B` of A and B as they are stored, in W's dtype."""
    wide = _wide(weight)
    ab = jnp.matmul(a.astype(wide.dtype), b.astype(wide.dtype), precision=_EXACT)
    return (wide - jnp.asarray(scaling, wide.dtype) * ab).astype(weight.dtype)


def share(
    weight: Array, u: Array, s: Array, vt: Array, scaling: ArrayLike, dtype: DTypeLike
) -> Split:
    """Give A and B the root of the singular values each, so that `s·A·B = U S Vᵀ`."""
    if isinstance(scaling, int | float) and scaling <= 0:
        raise ValueError(
            f"`jlora.initializers`: s·A·B is to be a part of the weight, which scaling={scaling} "
            "does not allow. Give an alpha above 0."
        )
    root = jnp.sqrt(s / jnp.asarray(scaling, s.dtype))
    a, b = (u * root[None]).astype(dtype), (root[:, None] * vt).astype(dtype)
    return a, b, residual_of(weight, a, b, scaling)


def pissa(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
    *,
    niter: int | None = None,
) -> Split:
    """Give A and B the largest singular values of W, `s A B = Uᵣ Sᵣ Vᵣᵀ`; the rest is frozen.

    `A = Uᵣ √(Sᵣ/s)`, `B = √(Sᵣ/s) Vᵣᵀ`. Over a bfloat16 weight A and B stay in float32, but the
    residual is rounded to bfloat16: the model starts within that one rounding of what it was.

    Args:
        key: a PRNG key; read only with `niter`.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r, above 0.
        dtype: of A and B.
        niter: None for the exact decomposition; or the number of subspace iterations of a
            randomized one, which is faster where r is far below in and out.
            `functools.partial(pissa, niter=16)` is an initializer.

    Returns:
        `lora_a` (in, rank), `lora_b` (rank, out), and the residual `W - s·A·B` (in, out).

    Raises:
        ValueError: scaling not above 0.

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (16, 8))
        >>> a, b, rest = pissa(jax.random.key(1), w, rank=2, scaling=4.0)
        >>> bool(jnp.allclose(rest + 4 * a @ b, w, atol=1e-5)), jnp.linalg.matrix_rank(rest).item()
        (True, 6)

    Reference: Meng et al. 2024, arXiv:2404.02948, section 3; Halko et al. 2009, arXiv:0909.4061,
    algorithm 4.4. PEFT's `init_lora_weights="pissa"` and `"pissa_niter_16"`.
    """
    wide = _wide(weight)
    if niter is None:
        u, s, vt = jnp.linalg.svd(wide, full_matrices=False)
    else:
        u, s, vt = _svd_of_a_range(key, wide, rank, niter)
    return share(weight, u[:, :rank], s[:rank], vt[:rank], scaling, dtype)


def _svd_of_a_range(
    key: PRNGKeyArray, weight: Array, rank: int, niter: int
) -> tuple[Array, Array, Array]:
    """Decompose W within `rank` directions that W itself, applied again and again, turns to."""

    def span(y: Array) -> Array:
        return jnp.linalg.qr(y)[0]

    def turn(_: ArrayLike, q: Array) -> Array:
        back = span(jnp.matmul(weight.T, q, precision=_EXACT))  # (out, rank)
        return span(jnp.matmul(weight, back, precision=_EXACT))  # (in, rank)

    draw = jax.random.normal(key, (weight.shape[1], rank), weight.dtype)
    q = jax.lax.fori_loop(0, niter, turn, span(jnp.matmul(weight, draw, precision=_EXACT)))
    u, s, vt = jnp.linalg.svd(jnp.matmul(q.T, weight, precision=_EXACT), full_matrices=False)
    return jnp.matmul(q, u, precision=_EXACT), s, vt


def milora(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Split:
    """Give A and B the smallest singular values of W; the principal part of it is frozen.

    `A = Uₘ √(Sₘ/s)`, `B = √(Sₘ/s) Vₘᵀ`, m the last r of min(in, out): training begins in what
    matters least to W, and keeps what it knows.

    Args:
        key: a PRNG key; not read.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r, above 0.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank), `lora_b` (rank, out), and the residual `W - s·A·B` (in, out).

    Raises:
        ValueError: scaling not above 0.

    Example:
        >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> a, b, rest = milora(jax.random.key(0), w, rank=1)
        >>> jnp.diag(rest).tolist()
        [3.0, 2.0, 0.0]

    Reference: Wang et al. 2024, arXiv:2406.09044, section 3.
    """
    u, s, vt = jnp.linalg.svd(_wide(weight), full_matrices=False)
    return share(weight, u[:, -rank:], s[-rank:], vt[-rank:], scaling, dtype)


def olora(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Split:
    """Give B the first orthonormal directions of W's outputs, and A how W's inputs lie on them.

    `Wᵀ = Q R`, `B = Qᵣᵀ`, `A = Rᵣᵀ`; the residual is `W - s A B`.

    Args:
        key: a PRNG key; not read.
        weight: the base weight as `(in, out)`.
        rank: r.
        scaling: s = α/r; A and B do not hang on it, the residual does.
        dtype: of A and B.

    Returns:
        `lora_a` (in, rank), `lora_b` (rank, out), and the residual `W - s·A·B` (in, out).

    Example:
        >>> w = jax.random.normal(jax.random.key(0), (16, 8))
        >>> a, b, rest = olora(jax.random.key(1), w, rank=2)
        >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-5))
        True

    Reference: Büyükakyüz 2024, arXiv:2406.01775. PEFT's `init_lora_weights="olora"`,
    which divides nothing by s either.
    """
    q, r = jnp.linalg.qr(_wide(weight).T)  # (out, k), (k, in)
    a, b = r[:rank].T.astype(dtype), q[:, :rank].T.astype(dtype)
    return a, b, residual_of(weight, a, b, scaling)
