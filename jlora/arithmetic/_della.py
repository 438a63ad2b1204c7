"""DELLA: drop small values with a higher probability, rescale, elect signs, average."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jlora.arithmetic._fuse import check_flag, check_part, elected, fused, positions, weighted_sum
from jlora.arithmetic._terms import weights_of


def della(
    adapters: Sequence[PyTree],
    weights: Any,
    *,
    density: float | int,
    epsilon: float | int,
    key: PRNGKeyArray,
    elect: bool = True,
    rank: int | None = None,
) -> PyTree:
    """Merge updates whose values are dropped by their rank of magnitude.

    Of the n values of one output, in the order of falling magnitude, value k is dropped with the
    probability `p = 1 - density - ε/2 + k ε/n`, and divided by `1 - p` if it is kept. Then signs
    are elected and the rest is averaged, as in `ties`.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter.
        density: the mean probability to keep a value.
        epsilon: ε, how far the probabilities spread; `ε/2 < density` and `density + ε/2 <= 1`.
        key: a PRNG key; every weight draws with its own.
        elect: whether to elect signs; otherwise the updates are added (mergekit's "della_linear").
        rank: as for `ties`.

    Returns:
        An adapter.

    Raises:
        ValueError: ε out of range; as for `ties`.
        TypeError: `key` is no PRNG key, or `elect` no bool.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> key = jax.random.key(0)
        >>> adapter = detach(attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=key))[1]
        >>> della([adapter], [1.0], density=0.5, epsilon=0.2, key=key, rank=3)["w"].rank
        3

    Reference: Deep et al. 2024, arXiv:2406.11617, section 3.
    """
    call = "jlora.arithmetic.della(adapters, weights)"
    density = check_part("density", density, call)
    check_flag("elect", elect, call)
    good = isinstance(epsilon, int | float) and 0 <= epsilon / 2 < density <= 1 - epsilon / 2
    if not good:
        raise ValueError(
            f"`{call}`: epsilon={epsilon!r} with density={density}; the probabilities density ± "
            f"epsilon/2 must be in (0, 1]. Pass at most {2 * min(density, 1 - density):.3g}."
        )
    each = weights_of(weights, len(adapters), call)
    return fused(
        adapters, each, rank, _method(density, float(epsilon), elect), call, key, random=True
    )


@functools.cache
def _method(density: float, epsilon: float, elect: bool) -> Any:
    def fuse(deltas: Array, weights: Array, key: Any) -> Array:
        n = deltas.shape[1]
        order = jax.vmap(lambda x: positions(x, axis=0))(deltas)  # of the inputs of each output
        keep = density + epsilon / 2 - epsilon / n * order.astype(deltas.dtype)
        drawn = jax.random.uniform(key, deltas.shape) < keep
        dropped = jnp.where(drawn, deltas / keep, 0)
        return (elected if elect else weighted_sum)(dropped, weights)

    return fuse
