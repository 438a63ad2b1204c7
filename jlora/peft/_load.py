"""Load PEFT's files: assign keys to leaves, and check everything before building anything."""

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
from jlora._arrays import FullArray, LoraArray, is_adapted, is_leaf
from jlora._base import is_stored
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_directory, check_tree
from jlora._paths import brief
from jlora._placed import check_replicate, placed
from jlora._tensor_file import read
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
from jlora.peft._tensors import from_torch, full_from_torch
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
    replicate: Sequence[str] = (),
) -> PyTree:
    """Attach an adapter in PEFT's format to base weights: `W + s · A B` with `A = lora_A.weightᵀ`.

    AdaLoRA and VeRA files become nodes of these forms (`LoraSpec(form=...)`). Each VeRA node has a
    copy of the A and B that PEFT shares. DoRA's m is `lora_magnitude_vector`. A bias of lora_B
    (`lora_bias`) is added to the layer's bias, a `FullArray` with the value bias + s · b.

    A, B and m become float32 for training, as in PEFT: a step of 1e-5 changes few elements of a
    bfloat16 A. Fully trained parameters have the wider of the file's and the base's dtype. Weights
    stay in Flax's orientation: kernels (in, out) or HWIO, embeddings (vocab, d); 3-D attention
    kernels are reshaped by layout. PEFT's update of a convolution with groups covers the dense
    kernel: write the layer without groups. For an adapter initialized as "pissa" or "olora" the
    base becomes the residual of the weights, as in PEFT, and its nodes are `residual`.

    Args:
        directory: the folder with adapter_config.json and adapter_model.safetensors.
        params: base parameters, adapted or not (an adapter is dropped, its layouts are used).
        names: a mapping or a function from a leaf's path to the PyTorch parameter it came from:
            "layers_3/attn/q_proj/kernel" to "model.layers.3.self_attn.q_proj.weight"; None if
            there is none. The name of a stacked leaf has a "{}" per unrolled dimension, as in
            "model.layers.{}.self_attn.q_proj.weight", or is a list of names.
        adapter: the name of an adapter in a sub-folder; "default" is in `directory` itself.
        layouts: path to layout, as for `jlora.attach`; 2-D weights are "io" and 4-D ones "iiio".
            Required for a square weight unless its path ends with "kernel".
        kinds: path to "embedding", "conv", "Conv1D" (of transformers) or "parameter" (outside
            any layer, with its axes in the same order here) for fully saved parameters whose path
            does not tell their orientation; anything else is "linear".
        slices: path to the (start, stop) output ranges that a loralib MergedLinear adapts, as in
            `LoraSpec`; needed unless all are adapted.
        declared: adapted parameters of one module (experts) in PyTorch's order of declaration; only
            needed if their shapes are equal and `names` is not a mapping in that order (that of
            `model.named_parameters()`).
        target_parameters: PEFT's entry, in any order, for a file without adapter_config.json.
        alpha: α for files without adapter_config.json, such as loralib's; "rank" for α equal to
            each module's rank, so that s is 1.
        dtype: the dtype of A, B and m; None keeps the file's.
        replicate: as for `jlora.attach`.

    Returns:
        The adapted parameters. The base weights are the same arrays as in `params`, except
        residuals. A and B are placed as by `jlora.attach(base, ..., replicate=...)`.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: keys missing, unexpected or of another shape; a damaged file; a pickle; another
            method than LoRA, or a variant that jlora does not support; residuals in `params`.
        KeyError: `names`, `layouts` or `kinds` has a path that is not in the tree.
        TypeError: a name is not a string, or its leaf is not an array; `dtype` is not floating.

    Example:
        See `save`.

    Reference: PEFT's `PeftModel.from_pretrained`; loralib's `lora_state_dict`.
    """
    check_directory(directory, "jlora.peft.load(directory, params)")
    call = f"jlora.peft.load({str(directory)!r}, params)"
    check_tree(params, call)
    check_replicate(replicate, call)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{call}`: dtype={jnp.dtype(dtype).name} is not a floating type, and A and B train. "
            "Leave it out for float32, or give None for the file's own."
        )
    folder = _folder(directory, adapter, call)
    config = _config(folder, alpha, call)
    _refuse_residuals(params, call)
    base = detach(params)[0]
    leaves = leaves_with_paths(base, is_leaf)
    by_path = dict(leaves)
    arguments = {"names": names, "layouts": layouts, "kinds": kinds, "slices": slices}
    for argument, value in arguments.items():
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
    nodes = {p: placed(node, by_path[p], replicate, call) for p, node in nodes.items()}
    adapter_tree = map_with_paths(lambda path, _: nodes.get(path), base, is_leaf)
    return bind(base, adapter_tree)


def _layouts(params: PyTree) -> dict[str, str]:
    """Return the layouts of the weights that are already adapted."""
    nodes = leaves_with_paths(params, is_adapted)
    return {path: node.layout for path, node in nodes if isinstance(node, LoraArray)}


def _refuse_idle_slices(plan: Plan, slices: Mapping[str, Any], call: str) -> None:
    """Raise for slices of weights that the file does not adapt in slices."""
    for path, ranges in slices.items():
        found = {one.slices for one in plan.lora.get(path, [])}
        if found != {tuple(map(tuple, ranges))}:
            raise ValueError(
                f'`{call}`: `slices` has "{path}", which the file does not adapt in slices; a '
                "MergedLinear of loralib's is. Leave it out."
            )


def _refuse_residuals(params: PyTree, call: str) -> None:
    """Raise if a base weight is a residual."""
    for path, node in leaves_with_paths(params, is_adapted):
        if getattr(node, "residual", False):
            raise ValueError(
                f'`{call}`: the base of "{path}" is a residual, W less its first A and B '
                "(`pissa`, `corda`, ...). Pass the original weights, as passed to `attach`."
            )


def _residuals(
    base: PyTree, nodes: Mapping[str, Any], plan: Plan, init: bool | str, call: str
) -> PyTree:
    """Subtract from the base weights what PEFT subtracts when it loads such an adapter."""
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

    return map_with_paths(moved, base, is_leaf)


def _folder(directory: str | os.PathLike[str], adapter: str, call: str) -> Path:
    """Return the adapter's folder; raise if its name leads out of the directory."""
    root = Path(directory)
    folder = root if adapter == "default" else root / adapter
    is_name = adapter not in ("", ".", "..") and not set(adapter) & set("/\\\0")
    if not is_name or not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"`{call}`: adapter={brief(adapter)} leads out of the directory. Give the name of a "
            "folder in it."
        )
    if (folder / TENSORS).is_file():
        return folder
    if (folder / PICKLE).is_file():
        raise ValueError(
            f"`{call}`: {PICKLE} is a pickle, which can run arbitrary code, so jlora "
            "never loads one. Convert it in PyTorch: `safetensors.torch.save_file(torch.load("
            f'"{PICKLE}", map_location="cpu", weights_only=True), "{TENSORS}")`.'
        )
    others = sorted(p.parent.name for p in root.glob(f"*/{TENSORS}")) if root.is_dir() else []
    hint = f" Its sub-folders have the adapters {others}: give `adapter=`." if others else ""
    if (folder / CONFIG).is_file():
        hint += foreign(read_json(folder / CONFIG, call))
    raise FileNotFoundError(f"`{call}`: there is no {folder / TENSORS}.{hint}")


def _config(folder: Path, alpha: Alpha | None, call: str) -> Config | Alpha:
    """Read the configuration, or return `alpha` if there is none."""
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
    found: list[Assignment], shape: tuple[int, ...], path: str, dtype: DTypeLike | None, call: str
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
    """Build one fully trained parameter, without its original."""
    values = [
        full_from_torch(one.tensors["value"], one.place.shape, one.geometry, one.kind)
        for one in found
    ]
    value = np.stack(values).reshape(leaf.shape)
    kinds = [x.dtype for x in (value, leaf) if jnp.issubdtype(x.dtype, jnp.floating)]
    return FullArray(None, jnp.asarray(value, max(kinds, key=lambda kind: jnp.finfo(kind).bits)))


def _biases(
    plan: Plan, leaves: Mapping[str, Any], nodes: Mapping[str, Any]
) -> dict[str, FullArray]:
    """Add s·b, the scaled bias of lora_B, to the layer's bias, which is fully trained."""
    values: dict[str, np.ndarray] = {}
    for one in plan.biases:
        path, index = one.place.path, one.place.index
        bias = getattr(nodes.get(path), "value", leaves[path])
        value = values.setdefault(path, np.asarray(bias).astype(np.float32))
        added = np.float32(one.scaling) * one.tensors["value"].astype(np.float32)
        value[index] += added.reshape(value[index].shape)
    return {p: FullArray(None, jnp.asarray(v, leaves[p].dtype)) for p, v in values.items()}


def _same_base(plan: Plan, leaves: Mapping[str, Any], call: str) -> None:
    """Check that base weights in the file (PEFT saves targeted embeddings) are ours."""
    for one in plan.base:
        if is_stored(leaves[one.place.path]):
            continue  # it is near the weight of the file, by as much as its format allows
        ours = np.asarray(leaves[one.place.path])[one.place.index]
        theirs = full_from_torch(one.tensors["value"], one.place.shape, one.geometry, one.kind)
        if not np.array_equal(ours, theirs.astype(ours.dtype)):
            raise ValueError(
                f'`{call}`: the file also holds the base weight of "{one.place.module}", and it '
                f'is not that of "{one.place.path}": the adapter was trained on other weights. '
                "Put them into `params` first."
            )
