"""Attach an adapter: by rules, replace weights by `LoraArray` or `FullArray` nodes."""

import collections
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jlora._arrays import Geometry, is_adapted, is_leaf
from jlora._base import is_stored, stored_as
from jlora._begin import adapted, in_full
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_mapping, check_tree
from jlora._check_values import check_key
from jlora._nnx import Opened
from jlora._paths import describe, is_bias, near_misses
from jlora._placed import check_replicate, warn_of_undivided
from jlora._reading import initializer, warn_of_gathers
from jlora._spec import LoraSpec, layout_of, resolve
from jlora.forms._initial import supports_rank


def attach(
    params: PyTree,
    rules: Mapping[str, Any],
    *,
    key: PRNGKeyArray,
    layouts: Mapping[str, str] | None = None,
    replicate: Sequence[str] = (),
) -> PyTree:
    """Replace each weight that a rule selects by a `LoraArray`: `W + s · A B`, initially W.

    With `LoraSpec(dora=True)` the weight is `m · (W + s · A B) / ‖W + s · A B‖`, and m is
    initialized to the norm. `LoraSpec(form=...)` selects the other variants.

    The key of a leaf is `key` folded with its path, so changing one rule never changes the A and B
    of another leaf. Where A B starts as part of W (`pissa`, `olora`, `milora`), the node's `base`
    is a new array, the residual `W - s · A B` in W's dtype; `detach` returns the residual.

    On a mesh, A, B and the other parts are created where the weight is, sharded along the same axes
    as it: stack axes in both, input axes in A, output axes in B; the rank is not sharded, nor are
    the outputs of a B with slices, or an axis that its mesh axes do not divide, which issues a
    warning. Their values do not depend on the sharding. The weight is not copied or moved, and
    gathered only by initializers that decompose it (`milora`, and `pissa` without `niter`): one
    layer of a stack at a time, with a warning that says how many bytes that is.

    A base of `ShapeDtypeStruct`s gives an adapter of `ShapeDtypeStruct`s, for
    `jit(step).lower(...)`, and allocates nothing. See `jlora.shardings` for the training step.

    Flax's boxes (`nn.Partitioned`): each part of a node gets its own, with the names of the axes
    that it has, so `nn.get_partition_spec` and the like are right. In NNX, see `jlora.specs`.

    Args:
        params: any pytree of arrays, or an NNX module, in which a layer that is used twice gets one
            adapter; it is not modified.
        rules: ordered mapping from a regular expression, which must match the full "/"-joined path
            of a leaf, to a `LoraSpec`, `"full"` (train the parameter in full) or `None` (leave it
            unchanged). The first match wins.
        key: a PRNG key for A (and B).
        layouts: mapping from path to layout, as returned by `jlora.layouts(fn, params, ...)`. A
            layout in the spec takes precedence. Without either, 2-D weights are "io" and 4-D
            weights "iiio", as in Flax's Dense and Conv. Leaves named "weight", which Equinox
            stores (out, in), require a layout.
        replicate: axes of the mesh along which A, B and the other parts are replicated, such as
            `("fsdp",)`: usually those that the batch is sharded along. Without it, they are
            sharded as the weight, which takes the least memory and the most (small) collectives.

    Returns:
        A tree of the same structure, with nodes in place of the selected leaves. A rank above
        min(in, out), which PEFT also accepts, is correct but wasteful and issues a warning.

    Raises:
        ValueError: a rule applies to no leaf; the initializer does not support the rank; a layout
            does not fit or is not known; a selected leaf is a vector or already adapted; two
            leaves have the same path; the initializer changes the base but the form's initial
            update is zero; `replicate` names an axis that the mesh does not have.
        TypeError: a selected leaf is not a floating-point array; `rules` is not a mapping;
            `replicate` is not a tuple of names.
        KeyError: `layouts` has a path that is not in `params`.

    Example:
        >>> params = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
        >>> params = attach(params, {r".*/kernel": LoraSpec(rank=2)}, key=jax.random.key(0))
        >>> params["dense"]["kernel"].lora_a.shape, params["dense"]["kernel"].lora_b.shape
        ((4, 2), (2, 6))

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4. PEFT's `get_peft_model`.
    """
    check_tree(params, "jlora.attach(params, rules)")
    if layouts is not None:
        check_mapping(layouts, "jlora.attach(layouts=...)", "jlora.layouts(fn, params, x)")
    check_replicate(replicate, "jlora.attach(replicate=...)")
    layouts, opened = layouts or {}, Opened(params)
    leaves = leaves_with_paths(opened.tree, is_leaf)
    paths = [path for path, _ in leaves]
    twice = [path for path, count in collections.Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(
            f'`jlora.attach`: two leaves have the path "{twice[0]}", so neither rules nor files '
            'can tell them apart. Rename the key that contains "/".'
        )
    known = set(paths)
    for path in layouts:
        if path not in known:
            raise KeyError(
                f'`jlora.attach(layouts=...)`: no parameter "{path}". {near_misses(path, paths)}'
            )
    chosen = resolve(rules, paths, "jlora.attach(rules=...)")
    plan = {
        path: _plan(path, leaf, chosen[path], layouts.get(path))
        for path, leaf in leaves
        if chosen.get(path) is not None
    }

    if any(planned is not None for planned in plan.values()):
        check_key(key, "jlora.attach(key=...)")
    _check_ranks(key, dict(leaves), plan)
    chosen_leaves = {path: leaf for path, leaf in leaves if path in plan}
    warn_of_undivided(chosen_leaves, "jlora.attach")
    warn_of_gathers(chosen_leaves, plan)

    def replace(path: str, leaf: PyTree) -> PyTree:
        if path not in plan:
            return leaf
        planned = plan[path]
        if planned is None:
            return in_full(leaf)
        return adapted(path, key, leaf, *planned, replicate)

    return opened.closed(map_with_paths(replace, opened.tree, is_leaf))


def _plan(
    path: str, leaf: PyTree, rule: LoraSpec | str, known: str | None
) -> tuple[LoraSpec, str] | None:
    """Validate one leaf against its rule; return its spec and layout, or None for "full"."""
    call = "jlora.attach"
    if is_adapted(leaf):
        raise ValueError(
            f"`{call}`: {describe(path, leaf)} is already adapted. Start from the plain weights, "
            "`base, adapter = jlora.detach(params)`, or map its path to None."
        )
    if hasattr(leaf, "__jax_array__") and not (isinstance(leaf, jax.Array) or is_stored(leaf)):
        raise TypeError(
            f"`{call}`: {describe(path, leaf)} is a variable of type `{type(leaf).__name__}`, not "
            "an array. Pass the values of a Keras model, `[v.value for v in "
            "model.trainable_variables]`, as `model.stateless_call` takes them."
        )
    if not isinstance(rule, LoraSpec):  # "full"
        if is_stored(leaf):
            raise TypeError(
                f"`{call}`: {describe(path, leaf)} is stored as `{stored_as(leaf)}`, which has "
                "no gradient. Pass the array itself, `leaf.dequantize()`, or narrow the rule."
            )
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            raise TypeError(
                f"`{call}`: {describe(path, leaf)} is not an array of real or complex numbers, so "
                "it cannot be trained. Narrow the rule, or map this path to None."
            )
        return None
    if not hasattr(leaf, "shape") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {describe(path, leaf)} is not a floating-point array, so it has no "
            "low-rank update. Narrow the rule, or map this path to None."
        )
    ndim = len(leaf.shape)
    if ndim < 2:
        raise ValueError(
            f"`{call}`: {describe(path, leaf)} has no input and output side, so it has no low-rank "
            'update. Train it in full with the rule "full", or narrow the rule: r".*/kernel".'
        )
    if is_bias(path) and not (rule.layout or known):
        raise ValueError(
            f"`{call}`: {describe(path, leaf)} is a bias by its name, and what is added has no "
            'low-rank update. Train it in full with the rule "full", or narrow the rule: '
            'r".*/kernel". If it is multiplied, give its layout: `LoraSpec(layout="io")`.'
        )
    given = rule.layout or known
    layout = layout_of(path, leaf, given, call, '`LoraSpec(layout="ioo")`')
    geometry = Geometry.of(leaf.shape, layout)
    width = geometry.out_dims[0]
    if rule.slices is not None and rule.slices[-1][1] > width:
        raise ValueError(
            f"`{call}`: the slices {rule.slices} exceed the {width} outputs of "
            f"{describe(path, leaf)} with layout {layout!r}. Slices are (start, stop) ranges of "
            "the first output dimension."
        )
    return rule, layout


def _check_ranks(key: PRNGKeyArray, leaves: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Warn of ranks above min(in, out); refuse them if the initializer does not support them."""
    above = []
    for path, planned in plan.items():
        if planned is None:
            continue
        spec, layout = planned
        geometry = Geometry.of(leaves[path].shape, layout)
        width = geometry.out_dims[0]
        narrowest = min(stop - start for start, stop in spec.slices or [(0, width)])
        sides = geometry.fan_in, geometry.fan_out // width * narrowest
        if spec.rank <= min(sides):
            continue
        said = (
            f"`jlora.attach`: rank {spec.rank} is above min(in, out) = min({sides[0]}, {sides[1]}) "
            f"of {describe(path, leaves[path])} with layout {layout!r}"
        )
        if not supports_rank(
            initializer(spec), key, jax.ShapeDtypeStruct(sides, leaves[path].dtype)
        ):
            raise ValueError(
                f"{said}, but the initializer computes A and B from the weight, which has no more "
                f"directions. Use `LoraSpec(rank={min(sides)})` or less, or another `init`."
            )
        above.append(f"{said}: the update has full rank. `LoraSpec(rank={min(sides)})` suffices")
    if above:
        more = f" (also for {len(above) - 1} more leaves)" if len(above) > 1 else ""
        warnings.warn(f"{above[0]}{more}.", stacklevel=3)
