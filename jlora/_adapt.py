"""Taking an adapter off and putting it on again, merging it and taking it out: of whole trees."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora import forms
from jlora._arrays import FullArray, LoraArray, is_adapted, is_leaf
from jlora._base import built, is_stored
from jlora._paths import describe, leaves_with_paths, map_with_paths


def _map(fn: Any, tree: PyTree, *rest: PyTree) -> PyTree:
    return jax.tree.map(fn, tree, *rest, is_leaf=lambda x: x is None or is_leaf(x))


def detach(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split adapted parameters into the base weights, bit for bit, and the adapter.

    Of a node that is `residual` the base is its own, the residual: the original weights are in
    what `attach` was given.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.

    Returns:
        `base`, plain parameters that any model takes, and `adapter`, what one task owns: the same
        nodes with `base` taken out, and `None` where nothing is adapted.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> base, adapter = detach(params)
        >>> base["w"].shape, adapter["w"].base is None
        ((4, 6), True)
    """
    base = _map(lambda x: x.base if is_adapted(x) else x, params)
    adapter = _map(_without_base, params)
    return base, adapter


def _without_base(node: Any) -> Any:
    return dataclasses.replace(node, base=None) if is_adapted(node) else None


def bind(base: PyTree, adapter: PyTree) -> PyTree:
    """Put an adapter on base weights: the inverse of `detach`.

    Args:
        base: plain parameters.
        adapter: a tree of the same structure, of nodes without base and `None`.

    Returns:
        The adapted parameters; the arrays are the very same ones.

    Raises:
        ValueError: the trees have other paths.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bind(*detach(params))["w"].lora_a is params["w"].lora_a
        True
    """
    _same_paths(base, adapter, "jlora.bind(base, adapter)")

    def put(weight: Any, node: Any) -> Any:
        return dataclasses.replace(node, base=weight) if is_adapted(node) else weight

    return _map(put, base, adapter)


def _same_paths(one: PyTree, other: PyTree, call: str) -> None:
    def paths(tree: PyTree) -> set[str]:
        return {p for p, _ in leaves_with_paths(tree, lambda x: x is None or is_leaf(x))}

    odd = sorted(paths(one) ^ paths(other))
    if odd:
        where = "first" if odd[0] in paths(one) else "second"
        raise ValueError(
            f"`{call}`: the trees differ in {len(odd)} places; "
            f'"{odd[0]}" is in the {where} only. Both must come from one model: '
            "compare `jax.tree.structure` of the two."
        )


def _check(params: PyTree, call: str) -> None:
    for path, node in leaves_with_paths(params, is_leaf):
        if isinstance(node, LoraArray):
            forms.check(path, node, call)


def merge(params: PyTree) -> PyTree:
    """Build the plain weights, `W + s · A B`, rounded once, to W's dtype.

    They are summed in float32 or wider; a float8 saturates at its range. Where rounding to 16 bits
    or less loses more than half of an update, a warning says so (not under `jax.jit`). DoRA's are
    `m · (W + s · A B) / ‖W + s · A B‖`, whose norm is a constant to the gradient. Stored weights
    are built, adapted or not.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.

    Returns:
        Plain parameters: any model takes them, and inference costs what the base model's costs.

    Raises:
        ValueError: a node whose parts do not fit, or are taken out.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bool((merge(params)["w"] == params["w"].base).all())
        True

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4.1. PEFT's `merge_and_unload`, which
    under `safe_merge` rounds the delta and the sum separately.
    """
    _check(params, "jlora.merge")
    lost: dict[str, Array] = {}

    def whole(path: str, node: Any) -> Any:
        if isinstance(node, FullArray):
            return node.value
        if not isinstance(node, LoraArray):
            return built(node)
        summed = forms.weight(node)
        merged = _rounded(summed, node.dtype)
        if jnp.finfo(node.dtype).bits < 32 and not isinstance(merged, jax.core.Tracer):
            lost[path] = _lost_share(built(node.base), summed, merged)
        return merged

    tree = map_with_paths(whole, params, is_leaf)
    _warn_of_loss(params, lost)
    return tree


def _rounded(x: Array, dtype: Any) -> Array:
    """Round to a dtype; what is beyond the range of a float8 becomes the largest that it has."""
    if jnp.finfo(dtype).bits <= 8:
        x = jnp.clip(x, -float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).max))
    return x.astype(dtype)


def _lost_share(base: Array, summed: Array, merged: Array) -> Array:
    """Return ‖merged - summed‖ / ‖summed - base‖; 0 for an update of nothing but rounding."""
    update, error = summed - base.astype(summed.dtype), merged.astype(summed.dtype) - summed
    whole, size, lost = (jnp.sqrt(jnp.sum(x * x)) for x in (summed, update, error))
    return jnp.where(size > 1e-5 * whole, lost / size, 0.0)


def _warn_of_loss(params: PyTree, lost: dict[str, Array]) -> None:
    """Say where a narrow dtype keeps less than half of the update."""
    shares = {path: float(x) for path, x in jax.device_get(lost).items()}
    most = {path: share for path, share in shares.items() if share > 0.5}
    if most:
        path = max(most, key=most.__getitem__)
        node = dict(leaves_with_paths(params, is_adapted))[path]
        warnings.warn(
            f"`jlora.merge`: rounding to the base's dtype loses {most[path]:.0%} of the update of "
            f"{describe(path, node.base)}, and more than half of that of {len(most)} weights in "
            "all: the merged model is nearer to the base model than to the adapted one. Run the "
            "adapter unmerged, `jlora.lora`, or merge into a base cast to a wider dtype.",
            stacklevel=3,
        )


def unmerge(merged: PyTree, params: PyTree) -> PyTree:
    """Take an adapter out of merged weights again: the base is `W' - s · A B`, in float32.

    DoRA's is `W' · ‖W + s · A B‖ / m - s · A B`, with the norm over the base in `params`, which is
    also what an output of magnitude 0, whose weight is lost, gets back. Rounding makes it close to
    the original base, not equal; `detach(params)` has it bit for bit.

    Args:
        merged: plain parameters that `merge` made, perhaps changed since.
        params: the adapted parameters to take out. Of "full" parameters the original is put back.

    Returns:
        Adapted parameters whose `merge` is `merged`.

    Raises:
        ValueError: the trees have other paths; a "full" parameter whose original is taken out;
            DoRA's weight whose base is; a stored base, which a merged weight cannot give back.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bool((unmerge(merge(params), params)["w"].base == params["w"].base).all())
        True

    Reference: PEFT's `unmerge_adapter`.
    """
    call = "jlora.unmerge(merged, params)"
    _same_paths(merged, params, call)
    for path, node in leaves_with_paths(params, is_leaf):
        if isinstance(node, LoraArray) and is_stored(node.base):
            raise ValueError(
                f"`{call}`: the base of {describe(path, node)} is stored as "
                f"`{type(node.base).__name__}`, and a merged weight less its update is not what "
                "was stored. Take the adapter off instead: `base, adapter = jlora.detach(params)`."
            )
        full = isinstance(node, FullArray)
        gain = isinstance(node, LoraArray) and forms.has_gain(node)
        if (full or gain) and node.base is None:
            why = "was trained whole" if full else "has a magnitude, whose norm needs it"
            raise ValueError(
                f'`{call}`: the original of "{path}", which {why}, is taken out of `params`, and '
                "nothing else has it. Give the adapted parameters, `jlora.bind(base, adapter)`."
            )
    adapter = _map(_without_base, params)
    _check(bind(merged, adapter), "jlora.unmerge")

    def base(whole: Any, node: Any) -> Any:
        if isinstance(node, FullArray):
            return node.base
        if not isinstance(node, LoraArray):
            return whole
        return _rounded(forms.base_of(whole, node), whole.dtype)

    return bind(_map(base, merged, params), adapter)
