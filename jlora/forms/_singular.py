"""Some of the singular values and vectors of a matrix, in the memory of about two of it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def singular(
    matrix: Float[Array, "rows columns"], some: slice
) -> tuple[Float[Array, "rows k"], Float[Array, " k"], Float[Array, "k columns"]]:
    """Return the columns `some` of U, of S, and the rows `some` of Vᵀ, where `matrix = U S Vᵀ`.

    A matrix with one side at least twice as long as the other is first reduced to a square one, R
    of its QR decomposition, as LAPACK does; here for memory: only Q is as large as the matrix.
    """
    rows, columns = matrix.shape
    if columns >= 2 * rows:
        v, s, ut = singular(matrix.T, some)
        return ut.T, s, v.T
    if rows >= 2 * columns:
        q, r = jnp.linalg.qr(matrix)
        u, s, vt = singular(r, some)
        return jnp.matmul(q, u, precision=lax.Precision.HIGHEST), s, vt
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, some], s[some], vt[some]
