"""CorDA: A and B take the part of the weight that is largest, or smallest, on a task's inputs."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora._arrays import accumulator
from jlora._moments import Moments
from jlora._paths import brief, describe
from jlora.forms import Split
from jlora.forms._singular import singular
from jlora.initializers._data import concrete, lora_nodes, moments_of, replaced, split
from jlora.initializers._decomposed import share

_EXACT = jax.lax.Precision.HIGHEST


def corda(params: PyTree, moments: PyTree, *, method: str = "ipm") -> PyTree:
    """Initialize A and B with the part of W that responds most, or least, to a task's inputs.

    `C W = U S Vᵀ`, `A = C⁻¹ Uᵣ √(Sᵣ/s)`, `B = √(Sᵣ/s) Vᵣᵀ`, where `C = Σ x xᵀ / n` plus 0.01 of its
    mean diagonal, doubled until `‖C C⁻¹ - I‖ < 0.05`, as in PEFT.

    Each slice of the outputs is decomposed separately. With DoRA the magnitude does not change,
    because the residual plus `s A B` is still W.

    Args:
        params: what `jlora.attach` returned. Its A and B are not read, and it is not modified.
        moments: what `jlora.capture` returned for `params`, for one batch or summed over several.
        method: "ipm" for the r largest singular values (inputs of the task to learn), or "kpm" for
            the r smallest (inputs of the knowledge to preserve).

    Returns:
        `params` with new A and B, and the residual `W - s A B` in W's dtype as base.

    Raises:
        ValueError: the method is unknown; there is no `LoraArray`, or one over a residual or with s
            not above 0; the moments do not match in structure or shape, are not finite, or are
            zero; there are fewer inputs than the rank.

    Example:
        >>> import jlora
        >>> base = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> params = jlora.attach(base, {"w": jlora.LoraSpec(1)}, key=jax.random.key(1))
        >>> x = jax.random.normal(jax.random.key(2), (64, 4))
        >>> params = corda(params, jlora.capture(lambda p, x: x @ p["w"], params, x))
        >>> bool(jnp.allclose(jlora.merge(params)["w"], base["w"], atol=1e-5))
        True

    Reference: Yang et al. 2024, arXiv:2406.05223, eq. 2 to 5. PEFT's `init_lora_weights="corda"`,
    `CordaConfig(corda_method)`; it first divides each batch by its largest element, which moves
    scale between A and B and, with several batches, weights them unequally.
    """
    call = "jlora.initializers.corda(params, moments)"
    if method not in ("ipm", "kpm"):
        raise ValueError(
            f'`jlora.initializers.corda(method={brief(method)})`: give "ipm" or "kpm".'
        )
    nodes = lora_nodes(params, call)
    seen = moments_of(nodes, moments, call, least=0)
    new = {}
    for path, node in nodes.items():
        if concrete(node.scaling) and (jnp.asarray(node.scaling) <= 0).any():
            raise ValueError(
                f"`{call}`: s·A·B cannot be a part of {describe(path, node)}, because its scaling "
                "is not above 0. Give an alpha above 0."
            )
        trace = jnp.trace(seen[path].second, axis1=-2, axis2=-1)
        if concrete(trace) and not (trace > 0).all():
            raise ValueError(
                f"`{call}`: all inputs of {describe(path, node)} were zero, so its directions "
                "cannot be ordered. Use other data, or another rule for this weight."
            )
        init = functools.partial(_oriented, rank=node.rank, largest=method == "ipm")
        new[path] = split(node, seen[path], init, by_output=False)
    return replaced(params, new)


def _oriented(
    weight: Float[Array, "in out"],
    moments: Moments,
    scaling: Array,
    rank: int,
    largest: bool,
) -> Split:
    c, inverse = _damped(moments.second / moments.count)
    wide = weight.astype(accumulator(weight.dtype))
    some = slice(rank) if largest else slice(-rank, None)
    u, s, vt = singular(jnp.matmul(c, wide, precision=_EXACT), some)
    return share(weight, jnp.matmul(inverse, u, precision=_EXACT), s, vt, scaling, wide.dtype)


def _damped(covariance: Float[Array, "n n"]) -> tuple[Array, Array]:
    """Return C, damped on its diagonal until it can be inverted, and the inverse."""
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    mean = jnp.diagonal(covariance).mean()

    def damped(damp: Array) -> tuple[Array, Array, Array]:
        c = covariance + damp * mean * eye
        return damp, c, jnp.linalg.inv(c)

    def inaccurate(state: tuple[Array, Array, Array]) -> Array:
        _, c, inverse = state
        return jnp.linalg.norm(jnp.matmul(c, inverse, precision=_EXACT) - eye) >= 0.05

    start = damped(jnp.asarray(0.01, covariance.dtype))
    _, c, inverse = jax.lax.while_loop(inaccurate, lambda state: damped(2 * state[0]), start)
    return c, inverse
