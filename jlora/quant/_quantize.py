"""`quantize` and `dequantize`: by rules, arrays become stored weights, and arrays again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jlora import _compat
from jlora._arrays import Geometry, LoraArray, is_adapted, is_leaf
from jlora._base import built, is_stored
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_mapping, check_tree
from jlora._nnx import Opened
from jlora._paths import describe, near_misses
from jlora._spec import check_rules, decided, layout_of
from jlora.quant._array import QuantArray, pack
from jlora.quant._format import Format
from jlora.quant._formats import format_of

_CALL = "jlora.quantize"


def quantize(
    params: PyTree, rules: Mapping[str, Any], *, layouts: Mapping[str, str] | None = None
) -> PyTree:
    """Store each weight that a rule selects in a format of `jlora.quant`.

    A `jlora.quant.QuantArray` takes the place of the array. `jlora.lora(fn)` runs on it, with or
    without an adapter, and builds a weight only where it is multiplied. Quantize first and
    `jlora.attach` then: an adapter does not depend on how its base is stored. Train with
    `jlora.value_and_grad(loss)`, since `jax.grad` refuses trees that contain integers.

    Blocks and groups are runs of inputs, in the row-major order of a weight's input axes, and never
    extend over two outputs or two stack elements. An embedding, by the name of its leaf, is stored
    by rows, whatever `layouts` says: each token has scales of its own.

    Codes and scales are sharded as the weight is. They are rows of outputs, so a weight that is
    gathered for its product (FSDP) is best split along its outputs: along its inputs, XLA
    transposes the codes first.

    Args:
        params: any pytree of arrays, or an NNX module; it is not modified.
        rules: ordered mapping from a regular expression, which must match the full "/"-joined path
            of a leaf, to a format (`jlora.quant.NF4(block=128)`), the name of one ("nf4") or `None`
            (leave it dense). The first match wins.
        layouts: as in `jlora.attach`: which axes are inputs. 2-D weights are "io" and 4-D weights
            "iiio" by default; leaves named "weight" require a layout.

    Returns:
        A tree of the same structure. The other leaves are the same arrays.

    Raises:
        ValueError: an unknown format; a block that does not divide the inputs of a weight; a layout
            that does not fit or is not known; a rule that applies to no leaf; a leaf that is a
            vector, adapted or stored already; a weight that is not finite, or too large for the
            format's scales.
        TypeError: a leaf that is not a floating-point array; a value that is no format; an array
            that is traced, for the formats of GGUF.
        KeyError: `layouts` has a path that is not in `params`.

    Example:
        >>> params = {"dense": {"kernel": jnp.ones((64, 6)), "bias": jnp.ones(6)}}
        >>> params = quantize(params, {r".*/kernel": "nf4"})
        >>> params["dense"]["kernel"].format, params["dense"]["kernel"].shape
        (NF4(block=64, double=True), (64, 6))

    Reference: Dettmers et al. 2023, arXiv:2305.14314. transformers's `quantization_config`.
    """
    check_tree(params, f"{_CALL}(params, rules)")
    if layouts is not None:
        check_mapping(layouts, f"{_CALL}(layouts=...)", "jlora.layouts(fn, params, x)")
    check_rules(rules, f"{_CALL}(rules=...)", "formats", 'r".*/kernel": "nf4"')
    layouts, opened = layouts or {}, Opened(params)
    leaves = dict(leaves_with_paths(opened.tree, is_leaf))
    for path in layouts:
        if path not in leaves:
            raise KeyError(
                f'`{_CALL}(layouts=...)`: no parameter "{path}". {near_misses(path, leaves)}'
            )
    formats = {key: format_of(key, value, f"{_CALL}(rules=...)") for key, value in rules.items()}
    chosen = decided(formats, list(leaves), f"{_CALL}(rules=...)")
    plan = {
        path: (chosen[path], _layout(path, leaf, chosen[path], layouts.get(path)))
        for path, leaf in leaves.items()
        if chosen.get(path) is not None
    }

    def stored(path: str, leaf: PyTree) -> PyTree:
        return quantized(path, leaf, *plan[path], _CALL) if path in plan else leaf

    return opened.closed(map_with_paths(stored, opened.tree, is_leaf))


def _layout(path: str, leaf: Any, format: Format, known: str | None) -> str:
    """Validate a leaf against its format; return its layout."""
    if is_adapted(leaf):
        raise ValueError(
            f"`{_CALL}`: {describe(path, leaf)} is adapted. Quantize the base and bind the adapter "
            "again: `base, adapter = jlora.detach(params)`, then "
            "`jlora.bind(jlora.quantize(base, rules), adapter)`."
        )
    if is_stored(leaf):
        raise ValueError(
            f"`{_CALL}`: {describe(path, leaf)} is stored already. Start from `jlora.dequantize"
            "(params)`, or map its path to None."
        )
    if not hasattr(leaf, "shape") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"`{_CALL}`: {describe(path, leaf)} is not a floating-point array, so it has no format "
            "of lower precision. Narrow the rule, or map this path to None."
        )
    if len(leaf.shape) < 2:
        raise ValueError(
            f"`{_CALL}`: {describe(path, leaf)} has no input and output side, and a vector takes "
            'little memory. Narrow the rule, r".*/kernel", or map this path to None.'
        )
    by_row = "embedding" in path.rpartition("/")[2] and len(known or leaf.shape) == 2
    given = "oi" if by_row else known
    layout = layout_of(path, leaf, given, _CALL, f'`layouts={{"{path}": "ioo"}}`')
    inputs = Geometry.of(leaf.shape, layout).fan_in
    if inputs % format.block:
        raise ValueError(
            f"`{_CALL}`: {describe(path, leaf)} with layout {layout!r} has {inputs} inputs, which "
            f"the block of {format}, {format.block}, does not divide. {_instead(inputs, format)} "
            "or map this path to None."
        )
    if getattr(format, "write", format) is None:
        raise ValueError(
            f"`{_CALL}`: {describe(path, leaf)} cannot be stored as {format}, which is read from "
            'GGUF files and not written. Use "q4_0", "q4_1", "q5_0", "q5_1", "q8_0" or "nf4".'
        )
    return layout


def _instead(inputs: int, format: Format) -> str:
    """Say which block divides the inputs, or which format needs none."""
    name = next(iter(format.settings), None)
    blocks = [n for n in range(2, inputs + 1, 2) if inputs % n == 0]
    if name is None:
        fits = inputs % 32 == 0 and format.block > 32
        return 'Use "q8_0" or another format with blocks of 32,' if fits else 'Use "int8",'
    if not blocks:
        return 'Use "int8", which has a scale per output,'
    near = min(blocks, key=lambda n: abs(n - format.block))
    return f"The nearest that does is `{type(format).__name__}({name}={near})`. Use it,"


def quantized(path: str, weight: Any, format: Format, layout: str, call: str) -> QuantArray:
    """Store one weight; refuse one whose scales are not finite."""
    if _compat.is_traced(weight) and getattr(format, "on_host", False):
        raise TypeError(
            f"`{call}`: {describe(path, weight)} is traced, and {format} is computed on the host, "
            "to the same bytes as gguf-py's. Call it outside of `jax.jit`."
        )
    made = pack(weight, format, layout)
    # The weight too: a maximum that is compiled may pass over NaN.
    for x in (weight, *made.parts.values()):
        if jnp.issubdtype(x.dtype, jnp.floating) and not _compat.is_traced(x):
            if not jnp.isfinite(x).all():
                raise ValueError(
                    f"`{call}`: the scales of {describe(path, weight)} in {format} are not finite: "
                    f"the weight has NaN or infinity, or values beyond the range of {x.dtype} "
                    "scales. Map this path to None, or repair the weight."
                )
    return made


def dequantize(params: PyTree) -> PyTree:
    """Build every stored weight: plain arrays again, of the dtypes that they stand for.

    Adapted weights keep their adapter, over a dense base.

    Args:
        params: a tree with stored weights, adapted or not, or an NNX module.

    Returns:
        A tree of the same structure without stored weights. The other leaves are the same arrays.

    Example:
        >>> params = quantize({"w": jnp.ones((64, 6))}, {"w": "int8"})
        >>> dequantize(params)["w"].shape
        (64, 6)
    """
    check_tree(params, "jlora.dequantize(params)")
    opened = Opened(params)

    def dense(_: str, leaf: PyTree) -> PyTree:
        if isinstance(leaf, LoraArray):
            return dataclasses.replace(leaf, base=_build(leaf.base))
        return _build(leaf)

    return opened.closed(map_with_paths(dense, opened.tree, is_leaf))


_jitted = jax.jit(built)


def _build(x: PyTree) -> PyTree:
    return _jitted(x) if is_stored(x) else x
