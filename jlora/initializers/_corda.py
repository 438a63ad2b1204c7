"""CorDA: A and B take a part out of the weight that is large, or small, on a task's inputs."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora._arrays import accumulator
from jlora._paths import describe
from jlora.forms import Split
from jlora.initializers._data import adapted, known, moments_of, replaced, split
from jlora.initializers._decomposed import share

_EXACT = jax.lax.Precision.HIGHEST


def corda(params: PyTree, moments: PyTree, *, method: str = "ipm") -> PyTree:
    """Give A and B the part of W that a task's inputs bring out most, or least; freeze the rest.

    `C W = U S Vᵀ`, `A = C⁻¹ Uᵣ √(Sᵣ/s)`, `B = √(Sᵣ/s) Vᵣᵀ`, where `C = Σ x xᵀ / n` with 0.01 of its
    mean diagonal added to it, twice as much until `‖C C⁻¹ - I‖ < 0.05`, as in PEFT.

    A slice of the outputs is a weight of its own. Under DoRA the magnitude stays: the residual and
    `s A B` are W together.

    Args:
        params: what `jlora.attach` returned; its A and B are not read, it is not changed.
        moments: what `jlora.capture` returned for it, of one batch or added up.
        method: "ipm", the r largest (the inputs are of what is to be learned), or "kpm", the r
            smallest (they are of what is to be kept).

    Returns:
        `params` with other A and B, over the residual `W - s A B` in W's dtype.

    Raises:
        ValueError: another method; no `LoraArray`; one over a residual, or whose s is not above 0;
            moments of another structure or shape, not finite, or zero; fewer inputs than the rank.

    Example:
        >>> import jlora
        >>> base = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> params = jlora.attach(base, {"w": jlora.LoraSpec(1)}, key=jax.random.key(1))
        >>> x = jax.random.normal(jax.random.key(2), (64, 4))
        >>> params = corda(params, jlora.capture(lambda p, x: x @ p["w"], params, x))
        >>> bool(jnp.allclose(jlora.merge(params)["w"], base["w"], atol=1e-5))
        True

    Reference: Yang et al. 2024, arXiv:2406.05223, eq. 2 to 5. PEFT's `init_lora_weights="corda"`,
    `CordaConfig(corda_method)`; it divides each batch by its largest element first, which moves
    size between A and B and, with several batches, weighs these by it.
    """
    call = "jlora.initializers.corda(params, moments)"
    if method not in ("ipm", "kpm"):
        raise ValueError(f'`jlora.initializers.corda(method={method!r})`: give "ipm" or "kpm".')
    nodes = adapted(params, call)
    seen = moments_of(nodes, moments, call, least=0)
    new = {}
    for path, node in nodes.items():
        if known(node.scaling) and (jnp.asarray(node.scaling) <= 0).any():
            raise ValueError(
                f"`{call}`: s·A·B is to be a part of {describe(path, node)}, which its scaling "
                "does not allow. Give an alpha above 0."
            )
        spread = jnp.trace(seen[path].second, axis1=-2, axis2=-1)
        if known(spread) and not (spread > 0).all():
            raise ValueError(
                f"`{call}`: all inputs of {describe(path, node)} were zero, so no direction of it "
                "matters more than another. Give other data, or another rule for this weight."
            )
        covariance = seen[path].second / seen[path].count[..., None, None]
        init = functools.partial(_oriented, rank=node.rank, largest=method == "ipm")
        new[path] = split(node, covariance, init, by_output=False)
    return replaced(params, new)


def _oriented(
    weight: Float[Array, "in out"],
    covariance: Float[Array, "in in"],
    scaling: Array,
    rank: int,
    largest: bool,
) -> Split:
    c, inverse = _damped(covariance)
    wide = weight.astype(accumulator(weight.dtype))
    u, s, vt = jnp.linalg.svd(jnp.matmul(c, wide, precision=_EXACT), full_matrices=False)
    some = slice(rank) if largest else slice(s.size - rank, None)
    back = jnp.matmul(inverse, u[:, some], precision=_EXACT)
    return share(weight, back, s[some], vt[some], scaling, wide.dtype)


def _damped(covariance: Float[Array, "n n"]) -> tuple[Array, Array]:
    """Return C with as much on its diagonal as its inverse needs, and the inverse."""
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    mean = jnp.diagonal(covariance).mean()

    def tried(damp: Array) -> tuple[Array, Array, Array]:
        c = covariance + damp * mean * eye
        return damp, c, jnp.linalg.inv(c)

    def rough(state: tuple[Array, Array, Array]) -> Array:
        _, c, inverse = state
        return jnp.linalg.norm(jnp.matmul(c, inverse, precision=_EXACT) - eye) >= 0.05

    start = tried(jnp.asarray(0.01, covariance.dtype))
    _, c, inverse = jax.lax.while_loop(rough, lambda state: tried(2 * state[0]), start)
    return c, inverse
