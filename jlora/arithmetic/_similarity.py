"""How alike adapters are: cosines of updates and overlaps of their subspaces."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import FullArray
from jlora.arithmetic._compress import decomposed
from jlora.arithmetic._slerp import inner_products
from jlora.arithmetic._terms import Term, matrices, read, refuse_gain, shape_among

_EXACT = jax.lax.Precision.HIGHEST


def similarity(adapters: Sequence[PyTree]) -> dict[str, Array]:
    """Compare adapters in pairs: the cosines of their updates and the overlaps of their subspaces.

    `cosine[i, j] = ⟨Δᵢ, Δⱼ⟩ / (‖Δᵢ‖ ‖Δⱼ‖)` over all parameters together, and the overlap of two
    subspaces of r and q ≥ r dimensions is `‖Uᵢᵀ Uⱼ‖² / r`, the mean over the weights that both
    adapt. Neither builds an update.

    Args:
        adapters: from `jlora.detach`; adapted parameters where any are trained in full.

    Returns:
        `cosine`, `inputs` and `outputs`, each `(n, n)`. `inputs` is the overlap of the spaces that
        A spans and `outputs` of those that B spans. Where two adapters have no weight in common,
        the overlap is 0.

    Raises:
        ValueError: a weight has DoRA's magnitude; what `add` refuses.

    Example:
        >>> from jlora import LoraSpec, attach, initializers
        >>> spec = LoraSpec(2, init=initializers.orthogonal)
        >>> params = attach({"w": jnp.ones((8, 6))}, {"w": spec}, key=jax.random.key(0))
        >>> similarity([params, params])["cosine"].round(4).tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    Reference: Hu et al. 2021, arXiv:2106.09685, eq. 4, for the overlap.
    """
    call = "jlora.arithmetic.similarity(adapters)"
    _, nodes = read(adapters, call)
    n = len(nodes)
    inner, sides = jnp.zeros((n, n)), jnp.zeros((2, n, n))
    common = jnp.zeros((n, n))
    for path in {path: None for of in nodes for path in of}:
        having = [k for k in range(n) if path in nodes[k]]
        of: list[Any] = [nodes[k][path] for k in having]
        refuse_gain(path, [Term(1.0, x) for x in of], call)
        at = jnp.ix_(jnp.asarray(having), jnp.asarray(having))
        inner = inner.at[at].add(inner_products(path, of, call))
        loras = [k for k in having if not isinstance(nodes[k][path], FullArray)]
        if loras:
            at = jnp.ix_(jnp.asarray(loras), jnp.asarray(loras))
            sides = sides.at[:, *at].add(_overlaps(path, [nodes[k][path] for k in loras], call))
            common = common.at[at].add(1)
    norm = jnp.sqrt(jnp.diagonal(inner))
    norms = norm[:, None] * norm[None]
    cosine = jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1), 0)
    inputs, outputs = sides / jnp.maximum(common, 1)[None]
    return {"cosine": cosine, "inputs": inputs, "outputs": outputs}


def _overlaps(path: str, nodes: Sequence[Any], call: str) -> Array:
    """Return the overlaps of one weight on both sides, `(2, n, n)`."""
    if len(nodes) > 1 or nodes[0].slices is not None:
        shape = shape_among(path, nodes, call)
        nodes = [forms.as_lora(x, shape) for x in nodes]
    triples = [decomposed(*matrices(x)[0]) for x in nodes]
    ranks, ins, outs = [], [], []
    for u, s, vt in triples:
        real = s > s[..., :1] * float(jnp.finfo(s.dtype).eps) * s.shape[-1]
        ranks.append(jnp.maximum(real.sum(-1), 1))
        ins.append(jnp.where(real[..., None, :], u, 0))
        outs.append(jnp.where(real[..., None], vt, 0))

    def overlap(i: int, j: int) -> Array:
        ui = jnp.matmul(jnp.swapaxes(ins[i], -1, -2), ins[j], precision=_EXACT)
        vi = jnp.matmul(outs[i], jnp.swapaxes(outs[j], -1, -2), precision=_EXACT)
        least = jnp.minimum(ranks[i], ranks[j]).astype(ui.dtype)
        return jnp.stack([jnp.mean(jnp.sum(x * x, (-2, -1)) / least) for x in (ui, vi)])

    n = len(nodes)
    rows = [jnp.stack([overlap(i, j) for j in range(n)], -1) for i in range(n)]
    return jnp.stack(rows, 1)
