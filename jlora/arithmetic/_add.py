"""The exact weighted sum of adapters."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import PyTree

from jlora.arithmetic._terms import Term, each_path, read, weighted, weights_of


def add(adapters: Sequence[PyTree], weights: Any) -> PyTree:
    """Add the updates of adapters of one base model, exactly.

    `Σ wᵢ sᵢ Aᵢ Bᵢ = [A₁, A₂, …] [w₁ s₁ B₁; w₂ s₂ B₂; …]`

    The ranks add up; `compress` lowers them. Adapters may differ in rank, alpha, form, slices and
    in the weights that they adapt. A weight that one adapter alone adapts keeps its rank and form.
    Elsewhere the result is LoRA with a scaling of 1, in float32 or wider. Parameters trained in
    full become `W + Σ wᵢ (Vᵢ - W)`. Negative weights subtract.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.
        weights: one number per adapter, or an array of them; they may be traced.

    Returns:
        An adapter.

    Raises:
        ValueError: there are no adapters; not one finite weight per adapter; adapters have
            different paths, shapes or layouts; a node is tied, incomplete or over a residual; a
            parameter trained in full lacks its original; slices differ and no base tells the number
            of outputs; a weight with DoRA's magnitude is added to another or has a weight other
            than 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import LoraSpec, attach, bind, detach, merge
        >>> key, base = jax.random.key(0), {"w": jnp.ones((4, 6))}
        >>> one, two = (detach(attach(base, {"w": LoraSpec(r)}, key=key))[1] for r in (2, 3))
        >>> total = add([one, two], [0.7, 0.3])
        >>> total["w"].rank, merge(bind(base, total))["w"].shape
        (5, (4, 6))

    Reference: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089. PEFT's
    `add_weighted_adapter(..., combination_type="cat")`; its "linear" has cross terms.
    """
    call = "jlora.arithmetic.add(adapters, weights)"
    like, nodes = read(adapters, call)
    each = weights_of(weights, len(adapters), call)

    def total(path: str, having: list[int]) -> Any:
        return weighted(path, [Term(each[n], nodes[n][path]) for n in having], call)

    return each_path(like, nodes, total)
