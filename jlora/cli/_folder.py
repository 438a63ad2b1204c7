"""PEFT folders as adapters for `jlora.arithmetic`, and back: by names alone, without a checkpoint.

The tree of an adapter is `{"model.layers.0.self_attn.q_proj.weight": node, ...}`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora._arrays import FullArray, LoraArray, is_adapted
from jlora.cli._adapter import Adapter, is_lora, module_of, node_of
from jlora.cli._output import check_space
from jlora.peft._assign import assign
from jlora.peft._keys import Found
from jlora.peft._methods import as_lora
from jlora.peft._names import Place
from jlora.peft._save import save
from jlora.peft._spell import names_of

Tree = dict[str, Any]


def tree_of(adapter: Adapter, call: str) -> tuple[Tree, dict[str, str]]:
    """Return an adapter's nodes by name, and the kinds of those that are not linear layers."""
    config, folder = adapter.config, adapter.folder.name
    for has, what in (
        (config.target_parameters, "expert parameters (target_parameters)"),
        (config.trainable_token_indices, "trainable tokens"),
        (config.lora_bias, "biases of lora_B (lora_bias)"),
    ):
        if has:
            raise ValueError(
                f"`{call}`: {folder} has {what}, whose meaning depends on the base. Merge it: "
                "`jlora merge BASE ADAPTER OUT`."
            )
    found = _places(adapter, call)
    method = as_lora(adapter.tensors, config, found, call)
    plan = assign(method.tensors, config, found, (), call)
    tree: Tree = {path: node_of(one, method) for path, (one,) in plan.lora.items()}
    for path, (one,) in plan.full.items():
        value = one.tensors["value"].reshape(one.place.shape)
        tree[path] = FullArray(None, jnp.asarray(value))
    return tree, dict(found.kinds)


def _places(adapter: Adapter, call: str) -> Found:
    """Return what the tensors of the file tell of the weights that they adapt."""
    places, layouts, kinds = {}, {}, {}
    by_module: dict[str, dict[str, Any]] = {}
    for key, name in names_of(adapter.tensors, (), call).items():
        if is_lora(name):
            ending = name.removeprefix(f"{module_of(name)}.").removeprefix("base_layer.")
            by_module.setdefault(module_of(name), {})[ending] = adapter.tensors[key]
        elif not name.endswith(".base_layer.weight"):
            full = name.replace(".base_layer.", ".")
            places[full] = Place(full, (), full, adapter.tensors[key].shape)
            kinds[full] = "parameter"
    for module, parts in by_module.items():
        name = f"{module}.weight"
        shape, layout, kind = _weight(parts)
        if shape is None:  # as VeRA's, whose A and B are shared, or a half: `assign` says what
            continue
        places[name] = Place(name, (), name, shape)
        layouts[name] = layout
        kinds |= {name: kind} if kind else {}
    return Found(places, layouts, kinds)


def _weight(parts: Mapping[str, Any]) -> tuple[Any, str, str | None]:
    """Return shape, layout and kind of a weight, from its A and B."""
    a, b = (parts.get(f"lora_embedding_{x}") for x in "AB")
    if a is not None and b is not None:
        return (a.shape[-1], b.shape[0]), "io", "embedding"
    a = parts.get("lora_A.weight", parts.get("lora_A"))
    b = parts.get("lora_B.weight", parts.get("lora_B"))
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return None, "", None
    return (b.shape[0], *a.shape[1:]), "o" + "i" * (a.ndim - 1), None if a.ndim == 2 else "conv"


def aligned(trees: list[Tree]) -> list[Tree]:
    """Return trees of the same names, with None where one does not adapt a weight."""
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    return [{name: tree.get(name) for name in names} for tree in trees]


def write_adapter(
    out: Path, tree: Tree, kinds: Mapping[str, str], said: Mapping[str, Any], dtype: Any = None
) -> None:
    """Write an adapter as a PEFT folder, if the disk has room for it."""
    check_space(out, sum(x.nbytes for x in jax.tree.leaves(tree)), "jlora")
    tree = {name: node for name, node in tree.items() if is_adapted(node)}
    kept = ("base_model_name_or_path", "task_type", "fan_in_fan_out", "revision", "lora_dropout")
    config = {key: said[key] for key in kept if said.get(key) is not None}
    kinds = {name: kind for name, kind in kinds.items() if name in tree}
    save(out, tree, names={name: name for name in tree}, kinds=kinds, dtype=dtype, **config)


def ranks_of(tree: Tree) -> str:
    """Print the ranks: "8", or "3 to 16 (mean 7.5)"."""
    ranks = [x.rank for x in tree.values() if isinstance(x, LoraArray)]
    if len(set(ranks)) < 2:
        return str(ranks[0]) if ranks else "none"
    return f"{min(ranks)} to {max(ranks)} (mean {sum(ranks) / len(ranks):.3g})"
