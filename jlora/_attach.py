"""Putting an adapter on: by rules, a `LoraArray` or a `FullArray` where a weight stood."""

import collections
import functools
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jlora import forms
from jlora._arrays import FullArray, Geometry, LoraArray, is_adapted, is_leaf
from jlora._base import built, is_stored
from jlora._paths import describe, is_doubtful, leaves_with_paths, map_with_paths, near_misses
from jlora._spec import LoraSpec, check_layout, resolve

_DEFAULT_LAYOUTS = {2: "io", 4: "iiio"}


def attach(
    params: PyTree,
    rules: Mapping[str, Any],
    *,
    key: PRNGKeyArray,
    layouts: Mapping[str, str] | None = None,
) -> PyTree:
    """Put a `LoraArray` where a rule asks for one: `W + s · A B` for `W`, `A B = 0` at first.

    Under `LoraSpec(dora=True)` it is `m · (W + s · A B) / ‖W + s · A B‖`, and m begins as the norm;
    `LoraSpec(form=...)` has the other variants.

    The key of a leaf is `key` folded with its path, so another rule never changes its A and B.
    Where A B starts as a part of W (`pissa`, `olora`, `milora`), the node's `base` is a new array,
    the residual `W - s · A B` in W's dtype, and that is what `detach` gives back.

    Args:
        params: any pytree of arrays; it is not changed.
        rules: ordered mapping from a regular expression, matched whole against the "/"-joined path
            of a leaf, to a `LoraSpec`, `"full"` (train it whole) or `None` (leave it). The first
            match wins.
        key: a PRNG key for A (and B).
        layouts: path to layout, as `jlora.layouts(fn, params, ...)` gives; a spec's own comes
            first. Without either, 2-D weights are "io" and 4-D ones "iiio", as Flax has Dense and
            convolutions, but for leaves called "weight" (Equinox: "oi"), which need one.

    Returns:
        A tree of the same shape, with nodes for leaves. Ranks above min(in, out), which PEFT takes
        too, are right but wasteful: a warning says so.

    Raises:
        ValueError: a rule that decides nothing, a rank that the initializer does not have, a layout
            that does not fit, a weight whose layout is not known, a vector, a leaf that is already
            adapted, two leaves of one path, an initializer that moves the base under a form whose
            update is zero at first.
        TypeError: a leaf that is no array of floating-point numbers; rules that are no mapping.
        KeyError: a path in `layouts` that no leaf has.

    Example:
        >>> params = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
        >>> params = attach(params, {r".*/kernel": LoraSpec(rank=2)}, key=jax.random.key(0))
        >>> params["dense"]["kernel"].lora_a.shape, params["dense"]["kernel"].lora_b.shape
        ((4, 2), (2, 6))

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4. PEFT's `get_peft_model`.
    """
    layouts = layouts or {}
    leaves = leaves_with_paths(params, is_leaf)
    paths = [path for path, _ in leaves]
    twice = [path for path, count in collections.Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(
            f'`jlora.attach`: two leaves have the path "{twice[0]}", so no rule and no file could '
            'tell them apart. Rename the key that has a "/" in it.'
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

    _check_ranks(key, dict(leaves), plan)

    def replace(path: str, leaf: Any) -> Any:
        if path not in plan:
            return leaf
        planned = plan[path]
        if planned is None:
            # A real copy: under donation one buffer must not be given away twice.
            return FullArray(leaf, jnp.array(leaf, copy=True))
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return _node(path, leaf_key, leaf, *planned)

    return map_with_paths(replace, params, is_leaf)


def _node(path: str, key: PRNGKeyArray, weight: Any, spec: LoraSpec, layout: str) -> LoraArray:
    """Put an update on one weight that begins as nothing."""
    lora_a, lora_b, *rest = _factors(key, weight, spec, layout)
    if rest and is_stored(weight):
        raise ValueError(
            f"`jlora.attach`: the initializer of {describe(path, weight)} takes A B out of the "
            f"weight, but the weight is stored as `{type(weight).__name__}` and stays as it is. "
            "Leave `init` out, or give the array itself, `leaf.dequantize()`."
        )
    why = forms.named(spec.form).refusal("residual")
    if rest and why is not None:
        raise ValueError(
            f'`jlora.attach`: the initializer of "{path}" takes A B out of the weight, but under '
            f'`form="{spec.form}"` {why}. Leave `init` out, or give one that leaves the weight '
            "alone."
        )
    geometry = Geometry.of(weight.shape, layout)
    base, scaling = rest[0] if rest else weight, jnp.full(geometry.stack, spec.s, jnp.float32)
    node = LoraArray(
        base,
        lora_a,
        lora_b,
        scaling,
        layout,
        spec.slices,
        residual=bool(rest),
        form=spec.form,
    )
    return forms.begun(node, spec.dora, spec.dtype)


def _plan(path: str, leaf: Any, rule: Any, known: str | None) -> tuple[LoraSpec, str] | None:
    """Check one leaf against its rule; return its spec and layout, or None for "full"."""
    call = "jlora.attach"
    if is_adapted(leaf):
        raise ValueError(
            f"`{call}`: {describe(path, leaf)} is already adapted. Start from the plain weights, "
            "`base, adapter = jlora.detach(params)`, or give its path the rule None."
        )
    if rule == "full":
        if is_stored(leaf):
            raise TypeError(
                f"`{call}`: {describe(path, leaf)} is stored as `{type(leaf).__name__}`, which has "
                "no gradient. Give the array itself, `leaf.dequantize()`, or narrow the rule."
            )
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            raise TypeError(
                f"`{call}`: {describe(path, leaf)} is not an array of real or complex numbers, so "
                "it cannot be trained. Narrow the rule, or give this path the rule None."
            )
        return None
    if not hasattr(leaf, "shape") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: {describe(path, leaf)} is not a floating-point array, so it has no "
            "low-rank update. Narrow the rule, or give this path the rule None."
        )
    ndim = len(leaf.shape)
    if ndim < 2:
        raise ValueError(
            f"`{call}`: {describe(path, leaf)} has no input and output side, so it has no low-rank "
            'update. Train it whole with the rule "full", or narrow the rule: r".*/kernel".'
        )
    default = None if is_doubtful(path) else _DEFAULT_LAYOUTS.get(ndim)
    layout = rule.layout or known or default
    if layout is None:
        why = (
            "Equinox and PyTorch store what has this name (out, in). " if is_doubtful(path) else ""
        )
        raise ValueError(
            f"`{call}`: which axes of {describe(path, leaf)} are input and which output? {why}Give "
            "`layouts=jlora.layouts(fn, params, x)`, which reads it from the model, or "
            '`LoraSpec(layout="ioo")`; leading stack dimensions have no letter.'
        )
    check_layout(layout, f"{call}: layout {layout!r} of {path!r}")
    if len(layout) > ndim:
        raise ValueError(
            f"`{call}`: the layout {layout!r} has {len(layout)} letters, but "
            f"{describe(path, leaf)} has {ndim} dimensions. One letter per dimension."
        )
    geometry = Geometry.of(leaf.shape, layout)
    width = geometry.out_dims[0]
    if rule.slices is not None and rule.slices[-1][1] > width:
        raise ValueError(
            f"`{call}`: the slices {rule.slices} reach beyond the {width} outputs of "
            f"{describe(path, leaf)} with layout {layout!r}. Slices are (start, stop) ranges of "
            "the first output dimension."
        )
    return rule, layout


def _check_ranks(key: PRNGKeyArray, leaves: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Warn of ranks above min(in, out), and refuse them where the initializer has no such rank."""
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
        init = spec.init or forms.named(spec.form).init
        init = functools.partial(init, rank=spec.rank, scaling=spec.s, dtype=spec.dtype)
        made = jax.eval_shape(init, key, jax.ShapeDtypeStruct(sides, leaves[path].dtype))
        if made[0].shape[-1:] != (spec.rank,) or made[1].shape[:1] != (spec.rank,):
            raise ValueError(
                f"{said}, and the initializer takes A and B from the weight, which has no more "
                f"directions. Use `LoraSpec(rank={min(sides)})` or less here, or another `init`."
            )
        above.append(f"{said}: such an update is full. `LoraSpec(rank={min(sides)})` is enough")
    if above:
        more = f", and so for {len(above) - 1} more leaves" if len(above) > 1 else ""
        warnings.warn(f"{above[0]}{more}.", stacklevel=3)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _factors(key: PRNGKeyArray, weight: Any, spec: LoraSpec, layout: str) -> tuple[Any, ...]:
    """Call the initializer on `(in, out)` matrices, one per stack element, and arrange.

    Returns A and B and, of an initializer that moves the base, what is left of the weight.
    """
    geometry = Geometry.of(weight.shape, layout)
    chosen = spec.init or forms.named(spec.form).init
    init = functools.partial(chosen, rank=spec.rank, scaling=spec.s, dtype=spec.dtype)
    matrices, keys = geometry.to_matrix(built(weight)), key
    if geometry.stack:
        keys = jax.random.split(key, geometry.stack)
    if spec.slices is not None:
        init = _sliced(init, spec.slices, geometry)
    for _ in geometry.stack:
        init = jax.vmap(init)
    shapes = forms.factor_shapes(geometry, spec.rank, spec.slices)
    a, b, *rest = init(keys, matrices)
    return a.reshape(shapes[0]), b.reshape(shapes[1]), *map(geometry.from_matrix, rest)


def _sliced(init: Any, slices: tuple[tuple[int, int], ...], geometry: Geometry) -> Any:
    """Initialize each range of outputs as a weight of its own."""
    per = geometry.fan_out // geometry.out_dims[0]  # columns per element of the sliced dimension

    def run(key: PRNGKeyArray, matrix: Any) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(slices))
        columns = [slice(start * per, stop * per) for start, stop in slices]
        parts = [init(k, matrix[:, some]) for k, some in zip(keys, columns, strict=True)]
        a, b = (jnp.concatenate([p[k] for p in parts], axis=1) for k in (0, 1))
        if len(parts[0]) == 2:
            return a, b
        for some, part in zip(columns, parts, strict=True):
            matrix = matrix.at[:, some].set(part[2])
        return a, b, matrix

    return run
