"""Multiply an adapter's update by a number."""

from jax.typing import ArrayLike
from jaxtyping import PyTree

from jlora.arithmetic._terms import Term, each_path, read, weighted, weights_of


def scale(adapter: PyTree, by: ArrayLike) -> PyTree:
    """Multiply an update by a number: `W + w · s A B`.

    Rank, form and slices stay; only `scaling` changes. A negative number subtracts what was
    learned. Parameters trained in full become `W + w · (V - W)`.

    Args:
        adapter: from `jlora.detach`; adapted parameters where any are trained in full.
        by: w, a scalar; it may be traced.

    Returns:
        An adapter.

    Raises:
        ValueError: nothing is adapted; a node is tied, incomplete or over a residual; w is not
            finite; w is not 1 and a weight has DoRA's magnitude, or a parameter trained in full
            lacks its original.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2, 4)}, key=jax.random.key(0))
        >>> scale(detach(params)[1], 0.5)["w"].scaling.item()
        1.0

    Reference: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089, section 2. PEFT's
    `set_scale`, which multiplies the scaling of one layer.
    """
    call = "jlora.arithmetic.scale(adapter, by)"
    like, nodes = read([adapter], call)
    (w,) = weights_of([by], 1, call)
    return each_path(like, nodes, lambda path, _: weighted(path, [Term(w, nodes[0][path])], call))
