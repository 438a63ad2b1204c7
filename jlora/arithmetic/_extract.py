"""An adapter from the difference of two checkpoints."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import _compat
from jlora._adapt import same_paths
from jlora._arrays import FullArray, Geometry, LoraArray, accumulator, is_adapted, is_leaf
from jlora._attach import attach
from jlora._base import built
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_tree
from jlora._check_values import check_integer
from jlora._paths import describe
from jlora._spec import LoraSpec, check_rules, resolve
from jlora.arithmetic._compress import check_limits, needed
from jlora.initializers._decomposed import svd_of_a_range

_EXACT = jax.lax.Precision.HIGHEST
_OVERSAMPLED = 8  # Halko et al. 2009, section 4.2: a few more directions than are wanted


def extract(
    tuned: PyTree,
    base: PyTree,
    rules: Mapping[str, Any],
    *,
    layouts: Mapping[str, str] | None = None,
    energy: float | int | None = None,
    error: float | int | None = None,
    niter: int | None = None,
) -> tuple[PyTree, dict[str, Array]]:
    """Make an adapter of the difference of two checkpoints: `s A B ≈ W' - W`.

    `W' - W = U S Vᵀ`, `A = Uᵣ √(Sᵣ/s)`, `B = √(Sᵣ/s) Vᵣᵀ`, in float32: the nearest update of rank
    r in the Frobenius norm. Rules are as for `jlora.attach`: a `LoraSpec` gives rank, alpha,
    layout and slices, and "full" takes the parameter of `tuned` as it is.

    Args:
        tuned: the parameters after training.
        base: the parameters before.
        rules: ordered mapping from a regular expression to a `LoraSpec`, "full" or None.
        layouts: mapping from path to layout, as for `jlora.attach`.
        energy: with it the rank of each weight is the least that keeps this part of `‖W' - W‖²`,
            in (0, 1], and the spec's rank is the largest allowed.
        error: likewise, the largest `‖s A B - (W' - W)‖ / ‖W' - W‖`, in [0, 1).
        niter: None for the exact decomposition, or the number of subspace iterations of a
            randomized one, which is faster where the rank is much smaller than in and out.

    Returns:
        The adapter, and by path the part of the difference that it lacks,
        `‖s A B - (W' - W)‖ / ‖W' - W‖`, for every parameter that is a real number: 0 where
        nothing changed, 1 where a parameter changed and no rule selects it.

    Raises:
        ValueError: the two trees have different paths or shapes; one has adapters; both `energy`
            and `error` are given, or are out of range, or the parameters are traced with one of
            them; a spec has a form, `dora=True` or an
            alpha that is not positive; what `jlora.attach` refuses.

    Example:
        >>> from jlora import LoraSpec, bind, merge
        >>> base = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}
        >>> tuned = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
        >>> adapter, errors = extract(tuned, base, {"w": LoraSpec(rank=1, alpha=1), "b": "full"})
        >>> bool(jnp.allclose(merge(bind(base, adapter))["w"], 1)), float(errors["b"])
        (True, 0.0)

    Reference: Halko et al. 2009, arXiv:0909.4061, algorithm 4.4, for `niter`. mergekit's
    `mergekit-extract-lora`.
    """
    call = "jlora.arithmetic.extract(tuned, base, rules)"
    check_tree(tuned, call, "tuned")
    check_tree(base, call, "base")
    check_rules(rules, call, "specs", 'r".*/kernel": jlora.LoraSpec(rank=8)')
    if niter is not None:
        check_integer(niter, call, "niter", 0)
    same_paths(tuned, base, call)
    before, after = (dict(leaves_with_paths(tree, is_leaf)) for tree in (base, tuned))
    _check(before, after, call)
    allowed = check_limits({"energy": energy, "error": error}, call, at_least=0)
    if allowed is not None and any(map(_compat.is_traced, jax.tree.leaves((tuned, base)))):
        raise ValueError(
            f"`{call}`: the parameters are traced, and the ranks that `energy` and `error` choose "
            "depend on their values. Call it outside of `jax.jit`, or leave both out."
        )
    plain = {key: _plain(key, rule, call) for key, rule in rules.items()}
    specs = resolve(rules, list(before), call)
    key = jax.random.key(0)
    with_nodes = jax.eval_shape(lambda base: attach(base, plain, key=key, layouts=layouts), base)
    nodes = dict(leaves_with_paths(with_nodes, is_leaf))
    errors: dict[str, Array] = {}

    def made(path: str, _: Any) -> Any:
        node, new, old = nodes[path], built(after[path]), built(before[path])
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return FullArray(None, new) if isinstance(node, FullArray) else None
        if isinstance(node, FullArray):
            errors[path] = jnp.zeros(())
            return FullArray(None, new)
        wide = accumulator(new.dtype)
        delta = new.astype(wide) - old.astype(wide)
        if not isinstance(node, LoraArray):
            errors[path] = (jnp.sum(delta * delta) > 0).astype(jnp.float32)
            return None
        node, errors[path] = _node(path, node, delta, specs[path], allowed, niter)
        return node

    adapter = map_with_paths(made, base, is_leaf)
    return adapter, errors


def _check(before: Mapping[str, Any], after: Mapping[str, Any], call: str) -> None:
    for name, leaves in (("base", before), ("tuned", after)):
        for path, x in leaves.items():
            if is_adapted(x):
                raise ValueError(
                    f"`{call}`: {describe(path, x)} in `{name}` is adapted. Pass plain weights: "
                    "`jlora.merge(params)`."
                )
    for path, x in before.items():
        if hasattr(x, "shape") and x.shape != after[path].shape:
            raise ValueError(
                f"`{call}`: {describe(path, x)} has the shape {tuple(after[path].shape)} in "
                "`tuned`. The checkpoints must be of one model; cut off added rows first."
            )


def _plain(key: str, rule: Any, call: str) -> Any:
    """Return a rule that attaches without cost; refuse what has no closed form."""
    if not isinstance(rule, LoraSpec):
        return rule
    if rule.dora or rule.form != "lora":
        what = "dora=True" if rule.dora else f"form={rule.form!r}"
        raise ValueError(
            f'`{call}`: the rule "{key}" has {what}, and only plain LoRA has a nearest update in '
            "closed form. Leave it out, and train the result further if the form matters."
        )
    if not rule.s > 0:
        raise ValueError(
            f'`{call}`: the rule "{key}" has alpha={rule.alpha}, so the update s A B has no scale '
            "s > 0 to divide by. Give a positive alpha."
        )
    return dataclasses.replace(rule, init=None, rank=1)


def _node(
    path: str, node: LoraArray, delta: Array, spec: LoraSpec, allowed: float | None, niter: Any
) -> tuple[LoraArray, Array]:
    geometry = Geometry.of(delta.shape, node.layout)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
    per = geometry.fan_out // geometry.out_dims[0]
    slices = node.slices or ((0, geometry.out_dims[0]),)
    matrix = geometry.to_matrix(delta)
    pieces = [matrix[..., start * per : stop * per] for start, stop in slices]
    triples = [_svd(x, key, min(spec.rank, *x.shape[-2:]), niter) for x in pieces]
    rank = min(spec.rank, *(s.shape[-1] for _, s, _ in triples))
    if allowed is not None:
        totals = [jnp.sum(x * x, (-2, -1)) for x in pieces]
        tails = [_with_rest(s, t) for (_, s, _), t in zip(triples, totals, strict=True)]
        rank = min(rank, max(needed(s, allowed) for s in tails))
    spec = dataclasses.replace(spec, rank=rank)
    roots = [jnp.sqrt(s[..., :rank] / spec.s) for _, s, _ in triples]
    a = [u[..., :rank] * r[..., None, :] for (u, _, _), r in zip(triples, roots, strict=True)]
    b = [r[..., :, None] * vt[..., :rank, :] for (_, _, vt), r in zip(triples, roots, strict=True)]
    dtype = jnp.dtype(spec.dtype)
    a, b = ([x.astype(dtype) for x in xs] for xs in (a, b))
    left = matrix
    for (start, stop), one, other in zip(slices, a, b, strict=True):
        wide = (one.astype(matrix.dtype), other.astype(matrix.dtype))
        ab = jnp.matmul(*wide, precision=_EXACT)
        left = left.at[..., start * per : stop * per].add(-jnp.asarray(spec.s, ab.dtype) * ab)
    total = jnp.linalg.norm(matrix)
    part = jnp.where(total > 0, jnp.linalg.norm(left) / jnp.where(total > 0, total, 1), 0)
    out_dims = geometry.sliced(node.slices).out_dims
    made = LoraArray(
        None,
        jnp.concatenate(a, -1).reshape(*geometry.stack, *geometry.in_dims, -1),
        jnp.concatenate(b, -1).reshape(*geometry.stack, rank, *out_dims),
        jnp.full(geometry.stack, spec.s, jnp.float32),
        node.layout,
        node.slices,
    )
    return made, part.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _svd(matrix: Array, key: Array, rank: int, niter: int | None) -> tuple[Array, Array, Array]:
    """Return the leading singular triples, of each stack element."""
    if niter is None:
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    else:
        most = min(rank + _OVERSAMPLED, *matrix.shape[-2:])
        one = lambda x: svd_of_a_range(key, x, most, niter)
        for _ in matrix.shape[:-2]:
            one = jax.vmap(one)
        u, s, vt = one(matrix)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def _with_rest(s: Array, total: Array) -> Array:
    """Append to singular values the norm of all others, so that energies add up."""
    rest = jnp.sqrt(jnp.maximum(total - jnp.sum(s * s, -1), 0))
    return jnp.concatenate([s, rest[..., None]], -1)
