"""The best approximation of an adapter by a lower rank, from its factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jlora import _compat
from jlora._arrays import LoraArray
from jlora.arithmetic._terms import each_path, matrices, read
from jlora.forms.dora import MAGNITUDE

_EXACT = jax.lax.Precision.HIGHEST


def compress(
    adapter: PyTree,
    *,
    rank: int | None = None,
    energy: float | int | None = None,
    error: float | int | None = None,
) -> tuple[PyTree, dict[str, Array]]:
    """Approximate each update by the nearest one of a lower rank, in the Frobenius norm.

    `A = Qa Ra`, `(s B)ᵀ = Qb Rb`, `Ra Rbᵀ = U S Vᵀ`, so `s A B = (Qa U) S (Qb V)ᵀ`: a singular
    value decomposition of r x r, and no array of the weight's size. The new A and B share S evenly,
    with a scaling of 1, in float32 or wider.

    Pass one of `rank`, `energy` and `error`. The last two choose a rank for each weight, the
    largest that an element of its stack needs. With slices each slice is approximated. DoRA's
    magnitude stays, and parameters trained in full do not change.

    Args:
        adapter: from `jlora.detach`; of adapted parameters the base is left out.
        rank: the new rank of every weight; ranks that are lower already stay.
        energy: the least part of `‖s A B‖²` to keep, in (0, 1].
        error: the largest `‖s A B - approximation‖ / ‖s A B‖`, in [0, 1).

    Returns:
        The adapter, and by path the part of the norm that is kept,
        `‖approximation‖ / ‖s A B‖`, of shape `(*stack)`.

    Raises:
        ValueError: not exactly one of the three is given, or it is out of range; nothing is
            adapted; a node is tied, incomplete or over a residual; with `energy` or `error` the
            adapter is traced, because the ranks depend on its values.

    Example:
        >>> from jlora import LoraSpec, attach, detach, initializers
        >>> spec = LoraSpec(8, init=initializers.orthogonal)
        >>> params = attach({"w": jnp.ones((16, 12))}, {"w": spec}, key=jax.random.key(0))
        >>> small, kept = compress(detach(params)[1], rank=2)
        >>> small["w"].rank, kept["w"].shape
        (2, ())

    Reference: Eckart and Young 1936. kohya's `resize_lora.py`, whose `sv_fro` is `energy` of the
    norm instead of its square.
    """
    call = "jlora.arithmetic.compress(adapter)"
    allowed = check_limits({"rank": rank, "energy": energy, "error": error}, call)
    like, (nodes,) = read([adapter], call)
    if allowed is not None and any(_compat.is_traced(x) for x in jax.tree.leaves(nodes)):
        raise ValueError(
            f"`{call}`: the adapter is traced, and the ranks that `energy` and `error` choose "
            "depend on its values. Call it outside of `jax.jit`, or pass `rank=`."
        )
    kept: dict[str, Array] = {}

    def small(path: str, _: list[int]) -> Any:
        node = dataclasses.replace(nodes[path], base=None)
        if not isinstance(node, LoraArray):
            return node
        triples = [decomposed(a, b) for a, b in matrices(node)]
        values: list[Array] = [s for _, s, _ in triples]
        most = max(s.shape[-1] for s in values)
        r = most if rank is None else min(rank, most)
        if allowed is not None:
            r = max(needed(s, allowed) for s in values)
        kept[path] = _kept(values, r)
        return _rebuilt(node, triples, r)

    return each_path(like, [nodes], small), kept


def check_limits(given: dict[str, Any], call: str, at_least: int = 1) -> float | None:
    """Return the part of `Σ s²` that may be lost; None if a rank, or nothing, limits it."""
    names = ", ".join(f"`{name}`" for name in given)
    given = {name: x for name, x in given.items() if x is not None}
    if not at_least <= len(given) <= 1:
        count = "exactly" if at_least else "at most"
        raise ValueError(f"`{call}`: pass {count} one of {names}; got {sorted(given)}.")
    for name, x in given.items():
        number = isinstance(x, int | float) and not isinstance(x, bool)
        good = {
            "rank": number and isinstance(x, int) and x >= 1,
            "energy": number and 0 < x <= 1,
            "error": number and 0 <= x < 1,
        }
        wanted = {"rank": "an integer of at least 1", "energy": "in (0, 1]", "error": "in [0, 1)"}
        if not good[name]:
            raise ValueError(f"`{call}`: {name}={x!r}; it must be {wanted[name]}.")
    if "error" in given:
        return float(given["error"]) ** 2
    return 1.0 - float(given["energy"]) if "energy" in given else None


@jax.jit
def decomposed(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Return the singular value decomposition of A B, U, S and Vᵀ, from its factors."""
    (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    core = jnp.matmul(ra, jnp.swapaxes(rb, -1, -2), precision=_EXACT)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    right = jnp.matmul(vt, jnp.swapaxes(qb, -1, -2), precision=_EXACT)
    return jnp.matmul(qa, u, precision=_EXACT), s, right


def needed(s: Array, allowed: float) -> int:
    """Return the least rank that loses at most this part of `Σ s²`, for every stack element."""
    squares = np.square(np.asarray(s, np.float64)).reshape(-1, s.shape[-1])
    rest = np.cumsum(squares[:, ::-1], -1)[:, ::-1]  # what the ranks below k lose
    noise = squares[:, :1] * float(jnp.finfo(s.dtype).eps) ** 2 * s.shape[-1]
    return max(1, int((rest > allowed * rest[:, :1] + noise).sum(-1).max()))


def _kept(values: list[Array], rank: int) -> Array:
    total = sum(jnp.sum(s * s, -1) for s in values)
    some = sum(jnp.sum(jnp.square(s[..., :rank]), -1) for s in values)
    return jnp.where(total > 0, jnp.sqrt(some / jnp.where(total > 0, total, 1)), 1)


def _rebuilt(node: LoraArray, triples: list[Any], rank: int) -> LoraArray:
    """Return a node of this rank; slices with fewer singular values are padded with zeros."""
    parts_a, parts_b = [], []
    for u, s, vt in triples:
        root = jnp.sqrt(s[..., :rank])
        a, b = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
        lacking, no = rank - a.shape[-1], [(0, 0)] * (a.ndim - 2)
        parts_a.append(jnp.pad(a, [*no, (0, 0), (0, lacking)]))
        parts_b.append(jnp.pad(b, [*no, (0, lacking), (0, 0)]))
    ins, outs = node.layout.count("i"), node.layout.count("o")
    stack = node.lora_a.shape[: node.lora_a.ndim - ins - 1]
    in_dims, out_dims = node.lora_a.shape[len(stack) : -1], node.lora_b.shape[-outs:]
    return dataclasses.replace(
        node,
        lora_a=jnp.concatenate(parts_a, -1).reshape(*stack, *in_dims, -1),
        lora_b=jnp.concatenate(parts_b, -1).reshape(*stack, rank, *out_dims),
        scaling=jnp.ones(stack, jnp.float32),
        extra={name: x for name, x in node.extra.items() if name == MAGNITUDE},
        form="lora",
    )
