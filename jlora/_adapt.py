"""Split and bind adapters, merge and unmerge them: functions of parameter trees."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jlora import _compat, forms
from jlora._arrays import Adapted, FullArray, LoraArray, is_adapted, is_leaf
from jlora._base import built, is_stored, stored_as
from jlora._boxes import inside, is_box, leaves_with_paths, map_with_paths, with_base
from jlora._check import check_tree
from jlora._nnx import Opened
from jlora._paths import describe
from jlora.quant import QuantArray
from jlora.quant._quantize import quantized


def _map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(fn, tree, *rest, is_leaf=lambda x: x is None or is_box(x) or is_leaf(x))


def detach(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split adapted parameters into the base weights, bit for bit, and the adapter.

    For a `residual` node this returns the residual; the original weights are the ones passed to
    `attach`.

    The adapter has frozen leaves, such as `scaling`. Their gradients are zero, but weight decay
    would move them: train it with `jlora.freeze(tx)`.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.

    Returns:
        `base`, plain parameters for any model, and `adapter`, the arrays of one task: the same
        nodes without `base`, and `None` for leaves that are not adapted.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> base, adapter = detach(params)
        >>> base["w"].shape, adapter["w"].base is None
        ((4, 6), True)
    """
    check_tree(params, "jlora.detach(params)")
    params = inside(params)
    base = _map(lambda x: x.base if is_adapted(x) else x, params)
    return base, _map(_without_base, params)


def _without_base(node: object) -> Adapted | None:
    return dataclasses.replace(node, base=None) if isinstance(node, Adapted) else None


def bind(base: PyTree, adapter: PyTree) -> PyTree:
    """Combine base weights and an adapter: the inverse of `detach`.

    Args:
        base: plain parameters.
        adapter: a tree of the same structure, with nodes without `base` and `None` for leaves.

    Returns:
        The adapted parameters. No array is copied.

    Raises:
        ValueError: the two trees have different paths, or a weight in `base` is adapted already.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bind(*detach(params))["w"].lora_a is params["w"].lora_a
        True
    """
    call = "jlora.bind(base, adapter)"
    check_tree(base, call, "base")
    same_paths(base, adapter, call)
    before = dict(leaves_with_paths(base, is_leaf))
    for path, x in leaves_with_paths(adapter, is_leaf):
        if not is_adapted(x):
            raise ValueError(
                f"`{call}`: {describe(path, x)} in `adapter` is not adapted. Pass the adapter of "
                "`base, adapter = jlora.detach(params)` second, after the base weights."
            )
        if is_adapted(before[path]):
            raise ValueError(
                f"`{call}`: {describe(path, before[path])} is adapted already in `base`, and a "
                "weight has one adapter. Take the plain weights first, `base, _ = "
                "jlora.detach(params)`, or those with the first adapter added, `base = "
                "jlora.merge(params)`."
            )
    return _bind(base, adapter)


def _bind(base: PyTree, adapter: PyTree) -> PyTree:
    def put(weight: PyTree, node: PyTree) -> PyTree:
        return with_base(node, weight) if is_adapted(node) else weight

    return _map(put, base, inside(adapter))


def same_paths(one: PyTree, other: PyTree, call: str) -> None:
    """Refuse two trees whose leaves have different paths."""

    def paths(tree: PyTree) -> set[str]:
        return {p for p, _ in leaves_with_paths(tree, lambda x: x is None or is_leaf(x))}

    different = sorted(paths(one) ^ paths(other))
    if different:
        where = "first" if different[0] in paths(one) else "second"
        raise ValueError(
            f"`{call}`: the trees differ in {len(different)} places; "
            f'"{different[0]}" is in the {where} only. Both must come from one model: '
            "compare `jax.tree.structure` of the two."
        )


def _check_nodes(params: PyTree, call: str) -> None:
    for path, node in leaves_with_paths(params, is_leaf):
        if isinstance(node, LoraArray):
            forms.check(path, node, call)


def merge(params: PyTree, *, requantize: bool = False) -> PyTree:
    """Build the plain weights, `W + s · A B`, rounded once, to W's dtype.

    The sum is taken in float32 or wider; float8 weights saturate at the limits of their range. A
    warning is issued where rounding to 16 bits or less loses more than half of an update (not
    under `jax.jit`). DoRA's weights are `m · (W + s · A B) / ‖W + s · A B‖`, and no gradient flows
    through the norm. Stored weights are dequantized, adapted or not, unless `requantize` is true.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.
        requantize: whether a weight over a stored base is stored in the base's format again, which
            rounds away a part of its update (the warning above is issued here too), and other
            stored weights stay as they are. A weight whose update is zero keeps every byte.

    Returns:
        Plain parameters for any model. Inference costs the same as for the base model.

    Raises:
        ValueError: the parts of a node are missing or have wrong shapes; with `requantize`, a base
            in a format that is only read, such as `jlora.quant.Q4_K`.
        TypeError: with `requantize`, a base that is a stored weight, but no `QuantArray`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bool((merge(params)["w"] == params["w"].base).all())
        True

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4.1. PEFT's `merge_and_unload`, which
    rounds the delta and the sum separately under `safe_merge`.
    """
    check_tree(params, "jlora.merge(params)")
    opened = Opened(params)
    params = opened.tree
    _check_nodes(params, "jlora.merge")
    lost: dict[str, Array] = {}

    def merged_leaf(path: str, node: PyTree) -> PyTree:
        if isinstance(node, FullArray):
            return node.value
        if not isinstance(node, LoraArray):
            return node if requantize else built(node)
        summed = forms.weight(node)
        merged = _rounded(summed, node.dtype)
        if requantize and is_stored(node.base):
            stored = _stored_again(path, node.base, merged)
            if not _compat.is_traced(merged):
                lost[path] = _lost_share(built(node.base), summed, built(stored))
            return stored
        if jnp.finfo(node.dtype).bits < 32 and not _compat.is_traced(merged):
            lost[path] = _lost_share(built(node.base), summed, merged)
        return merged

    tree = map_with_paths(merged_leaf, params, is_leaf)
    _warn_of_loss(params, lost)
    return opened.closed(tree)


def _stored_again(path: str, base: PyTree, merged: Array) -> PyTree:
    """Store a merged weight in the format of its base; the base itself if nothing was added."""
    call = "jlora.merge(params, requantize=True)"
    if not _compat.is_traced(merged) and bool((merged == built(base)).all()):
        return base
    if not isinstance(base, QuantArray):
        raise TypeError(
            f"`{call}`: the base of {describe(path, base)} is stored as `{stored_as(base)}`, which "
            "is no format of `jlora.quant`. Merge to dense weights, `jlora.merge(params)`."
        )
    if getattr(base.format, "write", base.format) is None:
        raise ValueError(
            f"`{call}`: the base of {describe(path, base)} is stored as {base.format}, which is "
            "read from GGUF files and not written. Merge to dense weights, `jlora.merge(params)`, "
            'and store those in another format: `jlora.quantize(merged, {".*/kernel": "q8_0"})`.'
        )
    return quantized(path, merged, base.format, base.layout, call)


def _rounded(x: Array, dtype: DTypeLike) -> Array:
    """Round to a dtype; values outside the range of a float8 saturate."""
    if jnp.finfo(dtype).bits <= 8:
        x = jnp.clip(x, -float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).max))
    return x.astype(dtype)


def _lost_share(base: Array, summed: Array, merged: Array) -> Array:
    """Return ‖merged - summed‖ / ‖summed - base‖; 0 if the update is only rounding error."""
    update, error = summed - base.astype(summed.dtype), merged.astype(summed.dtype) - summed
    total, size, lost = (jnp.sqrt(jnp.sum(x * x)) for x in (summed, update, error))
    return jnp.where(size > 1e-5 * total, lost / size, 0.0)


def _warn_of_loss(params: PyTree, lost: dict[str, Array]) -> None:
    """Warn where a narrow dtype keeps less than half of an update."""
    shares = {path: float(x) for path, x in jax.device_get(lost).items()}
    most = {path: share for path, share in shares.items() if share > 0.5}
    if most:
        path = max(most, key=most.__getitem__)
        node = dict(leaves_with_paths(params, is_adapted))[path]
        kind = f"format, {stored_as(node.base)}," if is_stored(node.base) else "dtype"
        warnings.warn(
            f"`jlora.merge`: rounding to the base's {kind} loses {most[path]:.0%} of the update of "
            f"{describe(path, node.base)}; {len(most)} weights lose more than half of theirs. The "
            "merged model is closer to the base model than to the adapted one. Use the adapter "
            "unmerged, `jlora.lora`, or merge into a base cast to a wider dtype.",
            stacklevel=3,
        )


def unmerge(merged: PyTree, params: PyTree) -> PyTree:
    """Subtract an adapter from merged weights: the base is `W' - s · A B`, in float32.

    For DoRA it is `W' · ‖W + s · A B‖ / m - s · A B`, with the norm computed from the base in
    `params`. An output with magnitude 0 has lost its weight and gets that base back. Because of
    rounding the result is close to the original base, not equal; `detach(params)` returns the
    original bit for bit.

    Args:
        merged: plain parameters from `merge`; they may have changed since.
        params: the adapted parameters to subtract. "full" parameters get their original back.

    Returns:
        Adapted parameters whose `merge` is `merged`.

    Raises:
        ValueError: the two trees have different paths; the base of a "full" parameter or of a DoRA
            node is missing; a base is a stored weight, which cannot be recovered from the sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bool((unmerge(merge(params), params)["w"].base == params["w"].base).all())
        True

    Reference: PEFT's `unmerge_adapter`.
    """
    call = "jlora.unmerge(merged, params)"
    check_tree(merged, call, "merged")
    same_paths(merged, params, call)
    for path, node in leaves_with_paths(merged, is_adapted):
        if is_adapted(node):
            raise ValueError(
                f"`{call}`: {describe(path, node)} in `merged` is adapted. Pass the plain weights "
                "of `jlora.merge` first, and the adapted ones second."
            )
    for path, node in leaves_with_paths(params, is_leaf):
        if isinstance(node, LoraArray) and is_stored(node.base):
            raise ValueError(
                f"`{call}`: the base of {describe(path, node)} is stored as "
                f"`{stored_as(node.base)}`, and subtracting the update from a merged weight "
                "does not recover what was stored. Detach the adapter instead: "
                "`base, adapter = jlora.detach(params)`."
            )
        full = isinstance(node, FullArray)
        gain = isinstance(node, LoraArray) and forms.has_gain(node)
        if (full or gain) and node.base is None:
            why = "is trained in full" if full else "has a magnitude, whose norm needs it"
            raise ValueError(
                f'`{call}`: `params` lacks the original of "{path}", which {why}. '
                "Pass the adapted parameters, `jlora.bind(base, adapter)`."
            )
    adapter = detach(params)[1]
    _check_nodes(_bind(merged, adapter), "jlora.unmerge")

    def base(weight: PyTree, node: PyTree) -> PyTree:
        if isinstance(node, FullArray):
            return node.base
        if not isinstance(node, LoraArray):
            return weight
        return _rounded(forms.base_of(weight, node), weight.dtype)

    nodes = dict(leaves_with_paths(params, is_leaf))
    return _bind(map_with_paths(lambda path, x: base(x, nodes[path]), merged, is_leaf), adapter)
