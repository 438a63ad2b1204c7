"""Some of the singular values and vectors of a matrix, in little more memory than the matrix."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jlora._arrays import accumulator
from jlora._stacks import in_a_branch


def singular(
    matrix: Float[Array, "rows columns"], some: slice
) -> tuple[Float[Array, "rows k"], Float[Array, " k"], Float[Array, "k columns"]]:
    """Return the columns `some` of U, of S, and the rows `some` of Vᵀ, where `matrix = U S Vᵀ`.

    All is computed and returned in float32 or wider. A matrix with one side at least twice as long
    as the other is read by blocks of the long side, and never exists in that dtype as a whole.
    """
    rows, columns = matrix.shape
    if columns >= 2 * rows:
        v, s, u = _of_a_tall_one(matrix, some, axis=1)
        return u, s, v.T
    if rows >= 2 * columns:
        u, s, v = _of_a_tall_one(matrix, some, axis=0)
        return u, s, v.T
    wide = matrix.astype(accumulator(matrix.dtype))
    u, s, vt = jnp.linalg.svd(wide, full_matrices=False)
    return u[:, some], s[some], vt[some]


def _of_a_tall_one(matrix: Array, some: slice, axis: int) -> tuple[Array, Array, Array]:
    """Return columns of U, of S and of V of a matrix M whose rows are along `axis`.

    With `M = Q R` and `R = U₀ S Vᵀ`, `M = (Q U₀) S Vᵀ`. Q is as large as M, and is not needed for
    R: if R₀ is that of the first rows, that of these and the next block M₁ is the R of `[R₀; M₁]`
    (a sequential TSQR, Demmel et al. 2012, arXiv:0808.2664, section 3.2). Nor is it for U, since
    `M V = U S`: the columns of U are those of M V made orthonormal.

    Where S is small, M V is rounded by eps S₀, of which a part is along the columns of U before
    those that are wanted: all of it where S is 0, so there any other vector is taken in its place.
    This part of a column u is `M V S⁻² Vᵀ Mᵀ u` over these, accurate to eps S₀ / S. So it is taken
    out of the large ones, for which one step suffices, of the small ones, and of the large ones,
    which what was taken out of the small ones is along.

    A block is every so many-th row, since the order of the rows changes neither R nor V: on a mesh
    each device has a share of every block, and no more than one block is gathered at a time.
    """
    long, short = matrix.shape[axis], matrix.shape[1 - axis]
    wide, size = accumulator(matrix.dtype), max(short // 2, 1)
    blocks = long // size
    many = blocks * size

    def read(n: ArrayLike) -> Array:
        rows = lax.slice_in_dim(matrix, 0, many, axis=axis)
        rows = rows.reshape(*rows.shape[:axis], size, blocks, *rows.shape[axis + 1 :])
        return tall(lax.dynamic_index_in_dim(rows, n, axis + 1, keepdims=False))

    def tall(rows: Array) -> Array:
        return (rows.T if axis else rows).astype(wide)

    def triangle(r: Array, block: Array) -> Array:
        return jnp.linalg.qr(jnp.concatenate([r, block]), mode="r")

    def times(x: Array) -> Array:
        product = lax.map(lambda n: _matmul(in_a_branch(read, n), x), jnp.arange(blocks))
        product = product.swapaxes(0, 1).reshape(many, -1)
        return jnp.concatenate([product, _matmul(rest, x)])

    def transposed_times(y: Array) -> Array:
        rows = y[:many].reshape(size, blocks, -1)

        def add(n: Array, total: Array) -> Array:
            row = lax.dynamic_index_in_dim(rows, n, 1, keepdims=False)
            return total + _matmul(in_a_branch(read, n).T, row)

        return lax.fori_loop(0, blocks, add, _matmul(rest.T, y[many:]))

    rest = tall(lax.slice_in_dim(matrix, many, long, axis=axis))
    r = jnp.zeros((short, short), wide)
    r = lax.fori_loop(0, blocks, lambda n, r: triangle(r, in_a_branch(read, n)), r)
    _, s, vt = jnp.linalg.svd(triangle(r, rest) if many < long else r)
    mv, start = times(vt[some].T), some.indices(short)[0]
    if not start:
        return _orthonormal(mv), s[some], vt[some].T
    eps = jnp.finfo(wide).eps
    other = jax.random.normal(jax.random.key(0), mv.shape, wide)
    u = _orthonormal(jnp.where(s[None, some] > 30 * eps * s[0], mv / s[None, some], other))

    def cleared(u: Array, least: Array) -> tuple[Array, None]:
        before = (jnp.arange(short) < start) & (s > least * s[0])
        over_s = (1 / jnp.where(before, s, jnp.inf))[:, None]  # whose square may overflow
        along = over_s * _matmul(vt, transposed_times(u))
        return _orthonormal(u - times(_matmul(vt.T, over_s * along))), None

    u, _ = lax.scan(cleared, u, jnp.array([eps**0.5, 30 * eps, eps**0.5], wide))
    return u, s[some], vt[some].T


def _orthonormal(columns: Array) -> Array:
    """Return Q of the QR decomposition whose R has no negative diagonal."""
    q, r = jnp.linalg.qr(columns)
    return jnp.where(jnp.diagonal(r) < 0, -q, q)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
