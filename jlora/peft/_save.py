"""Save adapters in PEFT's format; every tensor and key is checked before a file is touched."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jlora import forms
from jlora._adapters import shape_of
from jlora._arrays import FullArray, Geometry, LoraArray, is_adapted, is_leaf
from jlora._boxes import leaves_with_paths
from jlora._check import check_directory, check_tree
from jlora._paths import near_misses
from jlora._processes import gathered, in_first
from jlora.peft._config import alpha_of
from jlora.peft._describe import Adapted, describe_adapter
from jlora.peft._forms import Shaped, equal_ranges, unrolled
from jlora.peft._keys import BIAS, Found, declare, in_order, order_of
from jlora.peft._methods import bare, of_lora
from jlora.peft._names import (
    Names,
    Place,
    bias_of,
    check_keys,
    check_kinds,
    geometry_of,
    is_parameter,
    kind_of,
    places,
    refuse_variants,
)
from jlora.peft._spell import PREFIX
from jlora.peft._tensors import full_to_torch, in_dtype, parts_of, to_torch
from jlora.peft._tokens import take_tokens
from jlora.peft._write import write


def save(
    directory: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Names,
    layouts: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    declared: Sequence[str] | None = None,
    peft_type: str = "LORA",
    dtype: DTypeLike | None = None,
    **config: Any,
) -> None:
    """Save an adapter in PEFT's format: adapter_model.safetensors and adapter_config.json.

    PEFT and transformers load these files. They are written to a temporary directory, then renamed
    into place. An existing adapter is replaced; other files in the folder are kept. In a program of
    several processes each of them calls `save`, and process 0 writes.

    Variants that PEFT's LoRA lacks are written as LoRA with the same update: slices become one A
    and B, and matrices or scales between A and B (`LoraSpec(form="lora_xs")`, "vera", "adalora")
    are multiplied into B. They load as LoRA too; `jlora.checkpoint` and `peft_type` keep the form.

    Args:
        directory: the folder. PEFT stores each of several adapters in a sub-folder of its name.
        params: adapted parameters, or an adapter from `jlora.detach`.
        names: from a leaf's path to its PyTorch name, as for `load`.
        layouts: path to layout of fully trained parameters with three or more dimensions.
        kinds: path to "embedding", "conv" or "Conv1D" (of transformers) where neither the path
            (".../embedding") nor the layout ("iiio") tells; anything else is "linear". "grouped"
            is a convolution with groups in PyTorch whose kernel here has none; "parameter" is a
            weight outside any layer, as in `x @ proj`, with the same axes in PyTorch.
        declared: adapted parameters of one module (experts) in PyTorch's order of declaration, as
            in `load`.
        peft_type: "LORA", or "ADALORA" or "VERA" if all nodes have this form.
        dtype: float32, float16 or bfloat16 for every tensor of the file; None keeps the dtypes of
            `params` and is lossless. To halve the file after training, pass `dtype=jnp.bfloat16`;
            an adapter loaded as bfloat16 and not trained is written unchanged.
        **config: entries of adapter_config.json that do not follow from the parameters:
            `base_model_name_or_path`, `task_type`, `lora_dropout`, `fan_in_fan_out`, `revision`,
            `init_lora_weights`, `inference_mode`; `use_rslora=True` to write the same scaling as
            α/√r; `lora_bias=True` to write the fully trained biases of adapted layers as
            biases of lora_B, (value - original) / s; `trainable_token_indices`, the rows of an
            embedding that changed, to write them alone.

    Raises:
        ValueError: nothing is adapted; an adapted leaf without a name, or with a residual base;
            fully trained parameters that do not make up a module; magnitudes in only some adapted
            layers, or for experts or MultiheadAttention; an entry of `config` that follows from the
            parameters; values that `dtype` cannot represent.
        TypeError: a name is not a string.

    Example:
        >>> import jax, jax.numpy as jnp, tempfile
        >>> from jlora import LoraSpec, attach
        >>> from jlora.peft import load
        >>> base = {"q": {"kernel": jnp.ones((4, 6))}}
        >>> params = attach(base, {"q/kernel": LoraSpec(2)}, key=jax.random.key(0))
        >>> names = {"q/kernel": "model.q_proj.weight"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, params, names=names)
        ...     loaded = load(folder, base, names=names)
        >>> bool((loaded["q"]["kernel"].lora_a == params["q"]["kernel"].lora_a).all())
        True

    Reference: PEFT's `save_pretrained`. `alpha` is the shortest decimal whose α/r is the scaling.
    """
    check_directory(directory, "jlora.peft.save(directory, params)")
    call = f"jlora.peft.save({str(directory)!r}, params)"
    check_tree(params, call)
    leaves = leaves_with_paths(params, is_leaf)
    adapted = {path: node for path, node in leaves if is_adapted(node)}
    if not adapted:
        raise ValueError(f"`{call}`: nothing in `params` is adapted. Call `jlora.attach` first.")
    holes = leaves_with_paths(params, lambda x: x is None or is_leaf(x))
    for argument, value in (("layouts", layouts), ("kinds", kinds)):
        check_keys(value, [path for path, _ in holes], argument, call)
    check_kinds(kinds or {}, call)
    for path, node in adapted.items():
        _check(path, node, call)
    leaves = [(path, _gathered(node)) for path, node in leaves]
    attached = adapted = {path: node for path, node in leaves if is_adapted(node)}
    if peft_type != "LORA":
        leaves = [(path, bare(path, node, peft_type, call)) for path, node in leaves]
    leaves = [(path, _as_peft(path, node, (kinds or {}).get(path), call)) for path, node in leaves]
    adapted = {path: node for path, node in leaves if is_adapted(node)}
    shaped = [(path, Shaped(shape_of(node))) for path, node in leaves]
    found = places(shaped, names, call)
    named = dict.fromkeys(place.path for place in found.values())
    for path in adapted:
        if path not in named:
            raise ValueError(
                f'`{call}`: "{path}" is adapted, but `names` gives it no PyTorch name. '
                f"{near_misses(path, named)}"
            )
    depths = {place.path: len(place.index) for place in found.values()}
    adapted = {
        path: unrolled(x, depths[path]) if isinstance(x, LoraArray) else x
        for path, x in adapted.items()
    }
    known = dict(layouts or {})
    known |= {path: x.layout for path, x in adapted.items() if isinstance(x, LoraArray)}
    where = Found(found, known, dict(kinds or {}), declared=order_of(names, declared, found))
    parts = _parts(where, adapted, config, call)
    fulls = _fulls(where, adapted, call)
    if config.get("lora_bias"):
        parts, fulls = _with_biases(parts, fulls, where, adapted, call)
    tokens = config.get("trainable_token_indices")
    rows = take_tokens(fulls, adapted, tokens, where, call) if tokens else {}
    entries, spelled = describe_adapter(parts, fulls, found, config, call)
    shared: dict[str, np.ndarray] = {}
    if peft_type != "LORA":
        parts, shared, entries = of_lora(peft_type, parts, attached, entries, call)
    tensors = shared | {
        f"{PREFIX}{one.spelled}.{ending}": x
        for one in parts.values()
        for ending, x in one.tensors.items()
    }
    tensors |= {PREFIX + spelled[place.name]: x for place, x in fulls.items()}
    tensors |= {PREFIX + name: x for name, x in rows.items()}
    written = in_dtype(tensors, dtype, call)
    in_first(lambda: write(Path(directory), written, entries), call)


def _gathered(node: Any) -> Any:
    """Gather what is sharded over several processes, except the base of a `LoraArray`."""
    if not isinstance(node, LoraArray):
        return gathered(node) if is_adapted(node) else node
    return dataclasses.replace(gathered(dataclasses.replace(node, base=None)), base=node.base)


def _check(path: str, node: LoraArray | FullArray, call: str) -> None:
    """Raise for an incomplete node; if the base is detached, its shape follows from A and B."""
    if isinstance(node, FullArray):
        if node.value is None:
            raise ValueError(
                f'`{call}`: the value of "{path}" is taken out. Put it together first: '
                "`jlora.combine(trainable, frozen)`."
            )
        return
    if node.residual:
        raise ValueError(
            f'`{call}`: the base of "{path}" is a residual, W less its first A and B (`pissa`, '
            "`corda`, ...), so over the model's own weights this adapter computes something else. "
            "Convert it: `jlora.arithmetic.residual_to_lora(params, initial, base)`."
        )
    if node.base is None and node.slices is not None:
        raise ValueError(
            f'`{call}`: "{path}" is adapted on some slices of its outputs, and how many outputs '
            "there are only its base tells. Put it together first: `jlora.bind(base, adapter)`."
        )
    if node.base is None and node.lora_a is not None and node.lora_b is not None:
        base = jax.ShapeDtypeStruct(shape_of(node), node.lora_a.dtype)
        node = dataclasses.replace(node, base=base)
    forms.check(path, node, call)


def _as_peft(path: str, node: Any, kind: str | None, call: str) -> Any:
    """Convert slices and forms to one A and B per weight, except slices of groups."""
    if kind != "grouped" or not is_adapted(node):
        return forms.as_lora(node, shape_of(node)) if isinstance(node, LoraArray) else node
    slices = getattr(node, "slices", None)  # a `FullArray` has none
    outs = Geometry.of(node.shape, node.layout).out_dims if slices else (0,)
    if slices is None or slices != equal_ranges(outs[0], len(slices)):
        raise ValueError(
            f'`{call}`: the kind of "{path}" is "grouped", whose update is of equal slices of all '
            f"its outputs, one a group; here they are {slices}. Give `LoraSpec(slices=...)`, as "
            "`jlora.peft.rules(groups=...)` does, or leave the kind out."
        )
    return node


def _parts(
    where: Found, adapted: Mapping[str, Any], config: Mapping[str, Any], call: str
) -> dict[Place, Adapted]:
    """Arrange A and B of every place, and spell their keys."""
    nodes = {
        place: adapted[place.path]
        for place in where.places.values()
        if isinstance(adapted.get(place.path), LoraArray)
    }
    layout, rslora = where.layouts, bool(config.get("use_rslora"))
    bias = bool(config.get("lora_bias"))
    kinds = {p: kind_of(p, layout[p.path], where.kinds) for p in nodes}
    sides = {p: geometry_of(p, layout[p.path], kinds[p], call) for p in nodes}
    parameters = {p: None for p in nodes if is_parameter(p, sides[p])}  # in order
    spelled = _spelled(list(nodes), list(parameters), where.declared, call)
    parts = {}
    for place, node in nodes.items():
        dora = forms.has_gain(node)
        refuse_variants(place, place in parameters, kinds[place], dora, bias, call)
        endings = parts_of(kinds[place], dora)
        values = {part: np.asarray(node.parts[part])[place.index] for part in endings}
        rank = node.lora_a.shape[-1]  # of groups together
        arranged = to_torch(values, sides[place], kinds[place])
        parts[place] = Adapted(
            {endings[part]: x for part, x in arranged.items()},
            rank,
            alpha_of(_scaling(node, place, call), rank, rslora),
            place in parameters,
            *spelled[place],
        )
    return parts


def _scaling(node: LoraArray, place: Place, call: str) -> np.float32:
    """Return the one scaling of a place."""
    scaling = np.asarray(node.scaling, np.float32)
    s = np.unique(scaling[place.index] if scaling.ndim else scaling)
    if len(s) > 1 or not np.isfinite(s).all():
        raise ValueError(
            f'`{call}`: the scalings of "{place.path}" are {s.tolist()}; PEFT has one finite '
            f'alpha for "{place.name}".'
        )
    return s[0]


def _spelled(
    places: Sequence[Place], parameters: Sequence[Place], order: Sequence[str], call: str
) -> dict[Place, tuple[str, str]]:
    """Return each place's module in the keys, and the name by which PEFT targets it.

    Of several parameters of one module, the one declared last is outermost. The second projection
    of a MultiheadAttention is inside the module of the first.
    """
    spelled = {place: (place.module, place.module) for place in places}
    by_name = {place.name: place for place in places}
    for first in [p for p in places if p.parameter == "in_proj_weight"]:
        second = by_name.get(f"{first.module}.out_proj.weight")
        if second is None:
            raise ValueError(
                f'`{call}`: PEFT adapts both projections of "{first.module}" or none; adapt '
                f'"{first.module}.out_proj.weight" too.'
            )
        spelled[second] = (f"{first.module}.base_layer.out_proj", first.module)
    by_module: dict[str, list[Place]] = {}
    for place in parameters:
        by_module.setdefault(place.module, []).append(place)
    for module, inside in by_module.items():
        ordered = in_order(inside, order) if len(inside) > 1 else inside
        if ordered is None:
            raise ValueError(
                f'`{call}`: several parameters of "{module}" are adapted, and PEFT distinguishes '
                f"them only by order. {declare([p.name for p in inside])}"
            )
        for depth, place in enumerate(reversed(ordered)):
            spelled[place] = (module + ".base_layer" * depth, place.name)
    return spelled


def _fulls(where: Found, adapted: Mapping[str, Any], call: str) -> dict[Place, np.ndarray]:
    """Arrange the fully trained parameters."""
    fulls = {}
    for place in where.places.values():
        node = adapted.get(place.path)
        if isinstance(node, FullArray):
            geometry, kind = where.full_geometry(place, call)
            fulls[place] = full_to_torch(np.asarray(node.value)[place.index], geometry, kind)
    return fulls


def _with_biases(
    parts: Mapping[Place, Adapted],
    fulls: Mapping[Place, np.ndarray],
    where: Found,
    adapted: Mapping[str, Any],
    call: str,
) -> tuple[dict[Place, Adapted], dict[Place, np.ndarray]]:
    """Write the change of a layer's bias as the bias of its lora_B."""
    made, left = {}, dict(fulls)
    for place, one in parts.items():
        of = bias_of(place, where.places, call)
        node, s = adapted.get(of.path), _scaling(adapted[place.path], place, call)
        if not isinstance(node, FullArray) or node.base is None or s == 0:
            kept = f'"{of.path}" is not trained with its original kept'
            why = "its scaling is 0" if s == 0 else kept
            raise ValueError(
                f"`{call}`: lora_bias=True writes (value - original) / s of the bias of "
                f'"{place.module}", but {why}. Give it the rule "full", and the base weights with '
                "`jlora.bind(base, adapter)`; or leave lora_bias out."
            )
        value, base = (np.asarray(x, np.float32)[of.index] for x in (node.value, node.base))
        made[place] = one._replace(tensors={**one.tensors, BIAS: ((value - base) / s).reshape(-1)})
        left.pop(of)
    return made, left
