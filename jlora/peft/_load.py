"""PEFT's files in: which key is which leaf, and everything refused before anything is built."""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jlora._adapt import bind, detach
from jlora._arrays import FullArray, LoraArray, is_adapted
from jlora._paths import leaves_with_paths, map_with_paths
from jlora.peft._assign import Assignment, Found, Plan, assign
from jlora.peft._config import (
    CONFIG,
    PICKLE,
    TENSORS,
    Alpha,
    Config,
    check_init,
    foreign,
    parse,
    read_json,
)
from jlora.peft._initial import REPEATED, residual
from jlora.peft._keys import order_of
from jlora.peft._methods import as_lora, with_extra
from jlora.peft._names import Names, check_keys, check_kinds, places
from jlora.peft._tensors import from_torch, read, whole_from_torch
from jlora.peft._tokens import with_tokens


def load(
    directory: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Names,
    adapter: str = "default",
    layouts: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    slices: Mapping[str, tuple[tuple[int, int], ...]] | None = None,
    declared: Sequence[str] | None = None,
    target_parameters: Collection[str] | None = None,
    alpha: Alpha | None = None,
    dtype: DTypeLike | None = jnp.float32,
) -> PyTree:
    """Put an adapter of PEFT's on base weights: `W + s · A B` with `A = lora_A.weightᵀ`.

    AdaLoRA's and VeRA's files become nodes of these forms (`LoraSpec(form=...)`); VeRA's nodes have
    a copy each of the A and B that PEFT shares.
    DoRA's m is `lora_magnitude_vector`. A bias of lora_B (`lora_bias`) becomes a part of the
    layer's own, a `FullArray` of value bias + s · b. A, B and m become float32, in which they
    train, as in PEFT: a step of 1e-5 changes few elements of a bfloat16 A. What is trained whole
    has the file's dtype or the base's, the wider of the two.
    Weights stay in Flax's orientation: kernels (in, out) or HWIO, embeddings (vocab, d); attention
    kernels of three dimensions are reshaped by layout.
    PEFT's update of a convolution with groups fills the whole kernel: write the layer without.
    An adapter that began as "pissa" or "olora" stands, as in PEFT, over the residual that this
    leaves of the given weights; its nodes are `residual`.

    Args:
        directory: the folder with adapter_config.json and adapter_model.safetensors.
        params: base parameters, plain or adapted (their adapter is left out, its layouts kept).
        names: a mapping or a function from a leaf's path to the PyTorch parameter it came from:
            "layers_3/attn/q_proj/kernel" to "model.layers.3.self_attn.q_proj.weight"; None where
            there is none. A stacked leaf's name holds a "{}" for each dimension that is unrolled,
            "model.layers.{}.self_attn.q_proj.weight", or is a list of names.
        adapter: the name of an adapter in a sub-folder; "default" is in `directory` itself.
        layouts: path to layout, as for `jlora.attach`; 2-D weights are "io" and 4-D ones "iiio".
            A square weight fits both ways round: unless it is called "kernel", it must be here.
        kinds: path to "embedding", "conv", "Conv1D" (of transformers) or "parameter" (of no
            layer's, with its axes in the same order here) for parameters saved whole whose
            orientation their path does not tell; anything else is "linear".
        slices: path to the (start, stop) ranges of outputs that a MergedLinear of loralib's adapts,
            as in `LoraSpec`; needed only where they are not all.
        declared: adapted parameters of one module (experts) in the order in which PyTorch declares
            them, needed only where neither their shapes tell nor `names`, a mapping in that order
            (of `model.named_parameters()`).
        target_parameters: PEFT's entry, in any order, for a file without adapter_config.json.
        alpha: α of all, for files without adapter_config.json, such as loralib's; "rank" where it
            is each module's own rank, so that s is 1.
        dtype: of A, B and m; None keeps the file's.

    Returns:
        The adapted parameters; the base weights are the very arrays that were given, but for
        residuals.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: keys missing, unexpected or of another shape; a damaged file; a pickle; another
            method than LoRA, or a variant that jlora does not have; `params` over a residual.
        KeyError: `names`, `layouts` or `kinds` speak of a leaf that is not there.
        TypeError: a name that is no string, or of a leaf that is no array; a dtype that is not
            floating.

    Example:
        See `save`.

    Reference: PEFT's `PeftModel.from_pretrained`; loralib's `lora_state_dict`.
    """
    call = f"jlora.peft.load({str(directory)!r}, params)"
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: dtype={jnp.dtype(dtype).name} is not a floating type, and A and B train. "
            "Leave it out for float32, or give None for the file's own."
        )
    folder = _folder(directory, adapter, call)
    config = _config(folder, alpha, call)
    _refuse_residuals(params, call)
    base = detach(params)[0]
    leaves = leaves_with_paths(base)
    by_path = dict(leaves)
    given = {"names": names, "layouts": layouts, "kinds": kinds, "slices": slices}
    for argument, value in given.items():
        check_keys(value, [path for path, _ in leaves], argument, call)
    check_kinds(kinds or {}, call)
    known = _layouts(params) | dict(layouts or {})
    where = places(leaves, names, call)
    order = order_of(names, declared, where)
    found = Found(where, known, dict(kinds or {}), dict(slices or {}), order)
    method = as_lora(read(folder / TENSORS, call), config, found, call)
    plan = assign(method.tensors, config, found, target_parameters or (), call)
    _refuse_idle_slices(plan, slices or {}, call)
    shapes = {place.path: tuple(np.shape(by_path[place.path])) for place in where.values()}
    nodes: dict[str, Any] = {
        path: with_extra(
            _lora(parts, shapes[path], path, dtype, call), [p.place for p in parts], method, dtype
        )
        for path, parts in plan.lora.items()
    }
    _same_base(plan, by_path, call)
    if isinstance(config, Config) and str(config.init_lora_weights).lower() in REPEATED:
        nodes = {path: dataclasses.replace(x, residual=True) for path, x in nodes.items()}
        base = _residuals(base, nodes, plan, config.init_lora_weights, call)
    nodes |= {path: _full(parts, by_path[path]) for path, parts in plan.full.items()}
    nodes |= with_tokens(plan.tokens, by_path)
    nodes |= _biases(plan, by_path, nodes)
    adapter_tree = map_with_paths(lambda path, _: nodes.get(path), base)
    return bind(base, adapter_tree)


def _layouts(params: PyTree) -> dict[str, str]:
    """Return the layouts of what is adapted already."""
    nodes = leaves_with_paths(params, is_adapted)
    return {path: node.layout for path, node in nodes if isinstance(node, LoraArray)}


def _refuse_idle_slices(plan: Plan, slices: Mapping[str, Any], call: str) -> None:
    """Refuse slices of what the file does not adapt in slices."""
    for path, given in slices.items():
        found = {one.slices for one in plan.lora.get(path, [])}
        if found != {tuple(map(tuple, given))}:
            raise ValueError(
                f'`{call}`: `slices` has "{path}", which the file does not adapt in slices; a '
                "MergedLinear of loralib's is. Leave it out."
            )


def _refuse_residuals(params: PyTree, call: str) -> None:
    """Refuse base weights that are not the model's own."""
    for path, node in leaves_with_paths(params, is_adapted):
        if getattr(node, "residual", False):
            raise ValueError(
                f'`{call}`: the base of "{path}" is a residual, W less its first A and B '
                "(`pissa`, `corda`, ...). Give the original weights, what `jlora.attach` was given."
            )


def _residuals(
    base: PyTree, nodes: Mapping[str, Any], plan: Plan, init: bool | str, call: str
) -> PyTree:
    """Take out of the base weights what PEFT takes out when it loads such an adapter."""
    for path, parts in plan.lora.items():
        first = parts[0]
        if first.kind != "linear" or first.geometry.stack or min(p.scaling for p in parts) <= 0:
            raise ValueError(
                f'`{call}`: PEFT begins with "pissa" and "olora" on linear layers alone and with '
                f'an alpha above 0, and "{path}" is {first.kind} with the scaling {first.scaling}. '
                "The configuration is not of this file."
            )

    def moved(path: str, weight: Any) -> Any:
        if path not in nodes:
            return weight
        return residual(REPEATED[str(init).lower()], jnp.asarray(weight), nodes[path])

    return map_with_paths(moved, base)


def _folder(directory: str | os.PathLike[str], adapter: str, call: str) -> Path:
    """Find the adapter's folder, and refuse a name that leads out of the directory."""
    root = Path(directory)
    folder = root if adapter == "default" else root / adapter
    plain = adapter not in ("", ".", "..") and not set(adapter) & set("/\\\0")
    if not plain or not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"`{call}`: adapter={adapter!r} leads out of the directory. Give the name of a folder "
            "in it."
        )
    if (folder / TENSORS).is_file():
        return folder
    if (folder / PICKLE).is_file():
        raise ValueError(
            f"`{call}`: {PICKLE} is a pickle, which can run any program when it is read, so jlora "
            "never reads one. Convert it in PyTorch: `safetensors.torch.save_file(torch.load("
            f'"{PICKLE}", map_location="cpu", weights_only=True), "{TENSORS}")`.'
        )
    others = sorted(p.parent.name for p in root.glob(f"*/{TENSORS}")) if root.is_dir() else []
    hint = f" Its sub-folders have the adapters {others}: give `adapter=`." if others else ""
    if (folder / CONFIG).is_file():
        hint += foreign(read_json(folder / CONFIG, call))
    raise FileNotFoundError(f"`{call}`: there is no {folder / TENSORS}.{hint}")


def _config(folder: Path, alpha: Alpha | None, call: str) -> Config | Alpha:
    """Read the configuration; where there is none, alpha is all that is known of it."""
    if (folder / CONFIG).is_file():
        config = parse(read_json(folder / CONFIG, call), call)
        check_init(config, call)
        return config
    if alpha is None:
        raise FileNotFoundError(
            f"`{call}`: there is no {folder / CONFIG}, so alpha is not known. Copy it too or, for "
            'loralib\'s files, give `alpha=`: a number, or "rank" where s is 1 everywhere.'
        )
    return alpha


def _lora(
    found: list[Assignment], shape: tuple[int, ...], path: str, dtype: Any, call: str
) -> LoraArray:
    """Build one node, without its base, from the tensors of all its places."""
    first = found[0]
    for one in found:
        same = one.rank == first.rank and one.dtypes == first.dtypes
        if not same:
            raise ValueError(
                f'`{call}`: "{path}" is one stacked leaf, with one rank and one dtype, but '
                f'"{first.place.name}" has rank {first.rank} and "{one.place.name}" rank '
                f"{one.rank} (dtypes {first.dtypes} and {one.dtypes}). Unstack the layers."
            )
    arranged = [from_torch(one.tensors, one.geometry, one.kind) for one in found]
    lead = shape[: len(first.place.index)]
    parts = {
        name: jnp.asarray(
            np.stack([x[name] for x in arranged]).reshape(*lead, *arranged[0][name].shape), dtype
        )
        for name in arranged[0]
    }
    stack = first.geometry.stack
    scaling = np.array([one.scaling for one in found], np.float32)
    scaling = scaling.reshape((*lead, *(1 for _ in stack)))
    scaling = jnp.asarray(np.broadcast_to(scaling, (*lead, *stack)))
    layout, slices = first.geometry.layout, first.slices
    return LoraArray(None, None, None, scaling, layout, slices).with_parts(parts)


def _full(found: list[Assignment], leaf: Any) -> FullArray:
    """Build one parameter that is trained whole, without its original."""
    values = [
        whole_from_torch(one.tensors["value"], one.place.shape, one.geometry, one.kind)
        for one in found
    ]
    value = np.stack(values).reshape(leaf.shape)
    kinds = [x.dtype for x in (value, leaf) if jnp.issubdtype(x.dtype, jnp.floating)]
    return FullArray(None, jnp.asarray(value, max(kinds, key=lambda kind: jnp.finfo(kind).bits)))


def _biases(plan: Any, leaves: Mapping[str, Any], nodes: Mapping[str, Any]) -> dict[str, FullArray]:
    """Add what lora_B adds to a layer's bias, s·b, to that bias, which trains whole."""
    values: dict[str, np.ndarray] = {}
    for one in plan.biases:
        path, index = one.place.path, one.place.index
        bias = getattr(nodes.get(path), "value", leaves[path])
        value = values.setdefault(path, np.asarray(bias).astype(np.float32))
        added = np.float32(one.scaling) * one.tensors["value"].astype(np.float32)
        value[index] += added.reshape(value[index].shape)
    return {p: FullArray(None, jnp.asarray(v, leaves[p].dtype)) for p, v in values.items()}


def _same_base(plan: Any, leaves: Mapping[str, Any], call: str) -> None:
    """A base weight that the file repeats (PEFT saves targeted embeddings) must be ours."""
    for one in plan.base:
        ours = np.asarray(leaves[one.place.path])[one.place.index]
        theirs = whole_from_torch(one.tensors["value"], one.place.shape, one.geometry, one.kind)
        if not np.array_equal(ours, theirs.astype(ours.dtype)):
            raise ValueError(
                f'`{call}`: the file also holds the base weight of "{one.place.module}", and it '
                f'is not that of "{one.place.path}": the adapter was trained on other weights. '
                "Put them into `params` first."
            )
