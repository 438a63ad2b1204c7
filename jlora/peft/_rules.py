"""Convert PEFT's configurations to rules with the same weights, ranks, alphas and init."""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping

from jaxtyping import PyTree

from jlora import initializers
from jlora._arrays import is_leaf
from jlora._boxes import leaves_with_paths
from jlora._check import check_tree, has_arrays
from jlora._paths import brief, is_doubtful, near_misses
from jlora._spec import LoraSpec
from jlora.peft._config import Config, read_config
from jlora.peft._forms import equal_ranges
from jlora.peft._initial import initializer, of_groups
from jlora.peft._keys import Found
from jlora.peft._linear import HEADS, all_linear
from jlora.peft._match import (
    Patterns,
    endings,
    ends_with,
    excluded,
    first_match,
    holds,
    is_saved,
    parents,
    targeted,
)
from jlora.peft._names import (
    Names,
    Place,
    bias_of,
    check_keys,
    check_kinds,
    kind_of,
    places,
    refuse_variants,
)


def rules(
    config: object,
    params: PyTree,
    *,
    names: Names,
    init: initializers.Initializer | None = None,
    groups: Mapping[str, int] | None = None,
    layouts: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, LoraSpec | str]:
    """Convert an adapter_config.json to rules, to reproduce a PEFT training recipe.

    PEFT's entries select PyTorch modules, which `names` maps to leaves. The head of a classifier
    ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") is trained too, as in PEFT, which adds it to
    `modules_to_save`. The keys of the rules are the leaves' paths, escaped. `lora_dropout` is an
    argument of `jlora.lora`, not of the rules. An entry of a list that matches nothing is ignored
    with a warning if others of the list match. AdaLoRA and VeRA configurations give specs with
    these forms.

    `init_lora_weights` may be True, False, "gaussian", "orthogonal", "olora", "pissa" or
    "pissa_niter_16"; those that need data ("eva", "corda", "lora_ga") or a quantizer ("loftq")
    raise unless `init` replaces them.

    Args:
        config: adapter_config.json, its folder, or its entries as a dict
            (`lora_config.to_dict()`).
        params: the base parameters, as arrays or shapes.
        names: from a leaf's path to its PyTorch name, as for `load`.
        init: the initializer for all weights, in place of `init_lora_weights`.
        groups: path to the number of groups of a convolution that has groups in PyTorch but a dense
            kernel here, (..., in, out). PEFT's update is dense too, with one slice of the outputs
            per group; `save` writes it as the kind "grouped". A kernel that has groups here too,
            (..., in/g, out), cannot be told apart by shape; it gets an update that merges into it,
            but PEFT has no such update and rejects its shapes.
        layouts: path to layout of leaves not stored as in Flax, as for `attach`. Without one, a
            stacked or expert leaf is (..., in, out).
        kinds: path to what the module is in PyTorch, as for `load`. "all-linear" selects "linear"
            and "Conv1D" only. If neither the path (".../kernel", ".../embedding") nor the shape
            tells, the module's name decides, with a warning that lists these paths.

    Returns:
        Rules for `jlora.attach`: a `LoraSpec` for each weight that PEFT would adapt, and "full"
        for `modules_to_save` and for the biases of `bias` and `lora_bias`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a method, a variant or an initializer that jlora does not have;
            a list or a pattern that matches nothing; layers of one stacked leaf that are to be
            adapted differently; groups that do not divide the outputs and the rank.
        KeyError: `names`, `groups` or `layouts` has a path that is not in the tree.
        TypeError: `config` is of another type.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"q": {"kernel": jnp.ones((4, 6))}, "k": {"kernel": jnp.ones((4, 6))}}
        >>> names = {"q/kernel": "model.q_proj.weight", "k/kernel": "model.k_proj.weight"}
        >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        >>> found = rules(config, params, names=names)
        >>> list(found), found["q/kernel"].s
        (['q/kernel'], 2.0)

    Reference: PEFT's `LoraConfig` and `get_peft_model`.
    """
    call = "jlora.peft.rules(config, params)"
    check_tree(params, call)
    if has_arrays(config):
        raise TypeError(
            f"`{call}`: `config` has arrays. The configuration comes first, then the parameters."
        )
    parsed = _with_heads(read_config(config, call))
    leaves = leaves_with_paths(params, is_leaf)
    arguments = {"names": names, "groups": groups, "layouts": layouts, "kinds": kinds}
    for argument, value in arguments.items():
        check_keys(value, [path for path, _ in leaves], argument, call)
    check_kinds(kinds or {}, call)
    where = Found(places(leaves, names, call), dict(layouts or {}), dict(kinds or {}))
    found = where.places
    _check_tokens(parsed, call)
    chosen = _choose(parsed, where, call)
    decided: dict[str, LoraSpec | str | None] = {}
    for place in found.values():
        rule = _rule(parsed, place, chosen.get(place.name), init, where, call)
        if isinstance(rule, LoraSpec) and layouts and place.path in layouts:
            rule = dataclasses.replace(rule, layout=layouts[place.path])
        if isinstance(rule, LoraSpec) and groups and place.path in groups:
            rule = _grouped(rule, place, groups[place.path], init is None, call)
        if decided.setdefault(place.path, rule) != rule:
            raise ValueError(
                f'`{call}`: "{place.path}" is one stacked leaf, but the configuration has '
                f'{decided[place.path]} for its first layer and {rule} for "{place.name}". '
                "Unstack the layers, or adapt all of them alike."
            )
    return {re.escape(path): rule for path, rule in decided.items() if rule is not None}


def _with_heads(config: Config) -> Config:
    """Add the heads that PEFT trains and saves by default for a task."""
    heads = HEADS.get(config.task_type, ())
    added = [head for head in heads if head not in config.modules_to_save]
    saved = Patterns(dict.fromkeys([*config.modules_to_save, *added]))
    return dataclasses.replace(config, modules_to_save=saved)


def _check_tokens(config: Config, call: str) -> None:
    """Raise for training only some rows of an embedding, which rules cannot express."""
    if config.trainable_token_indices:
        raise ValueError(
            f"`{call}`: trainable_token_indices trains some rows of an embedding, and a rule all "
            'of it. Take the entry out, give the embedding the rule "full", and set the '
            "gradient of its other rows to zero; `save(..., trainable_token_indices=...)` writes "
            "the rows alone."
        )


def _choose(config: Config, where: Found, call: str) -> dict[str, str]:
    """Return "lora", "parameter" or "full" for every selected PyTorch parameter."""
    found = where.places
    if config.target_modules is None and not config.target_parameters:
        raise ValueError(
            f"`{call}`: the configuration has no target_modules; PEFT then takes those it knows "
            "for the architecture. Write them, as PEFT does when it saves an adapter."
        )
    if not config.target_modules and not config.target_parameters:
        raise ValueError(
            f"`{call}`: target_modules is empty and there are no target_parameters, so nothing "
            'would be adapted; PEFT refuses it too. Name modules, or give "all-linear".'
        )
    linear = (
        isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    )
    linears = all_linear(where, config.task_type, call) if linear else set()
    chosen = {}
    for place in found.values():
        if ends_with(place.name, config.target_parameters):
            chosen[place.name] = "parameter"
        elif place.parameter in ("weight", "in_proj_weight"):
            if linear:
                takes = place.name in linears and not (
                    excluded(config, place.module, call)
                    or holds(config.modules_to_save, place.module, call)
                )
            else:
                takes = targeted(config, place.module, call)
            if takes:
                chosen[place.name] = "lora"
    modules = {found[name].module for name in chosen}
    _check_idle(config, modules, list(chosen), found, call)
    if config.lora_bias:
        chosen |= {bias_of(found[name], found, call).name: "full" for name in list(chosen)}
    for place in found.values():
        is_bias = place.parameter == "bias" and (
            config.bias == "all" or (config.bias == "lora_only" and place.module in modules)
        )
        if is_bias or is_saved(config.modules_to_save, place.module):
            chosen[place.name] = "full"
    return chosen


def _check_idle(
    config: Config, modules: set[str], chosen: list[str], found: Mapping[str, Place], call: str
) -> None:
    """Warn about entries that match nothing, as PEFT ignores them; raise if no entry matches."""
    targets = config.target_modules
    parameters = sorted(config.target_parameters)
    # PEFT adds the usual names of a head itself, whichever the model has.
    saved = [e for e in config.modules_to_save if e not in HEADS.get(config.task_type, ())]
    inside = {m for place in found.values() for m in parents(place.module)} if saved else set()
    ends = {m[k:] for m in inside for k in range(len(m))}
    hit = {ending for name in chosen for ending in endings(name)}
    idle = {
        "target_parameters": [e for e in parameters if e not in hit],
        "modules_to_save": [e for e in saved if e not in ends],
    }
    asked = {"target_parameters": len(parameters), "modules_to_save": len(saved)}
    if isinstance(targets, str):
        idle["target_modules"], asked["target_modules"] = [] if modules else [targets], 1
    else:
        hit = {ending for module in modules for ending in endings(module)}
        asked["target_modules"] = len(targets or ())
        idle["target_modules"] = [e for e in sorted(targets or ()) if e not in hit]
    known = sorted({place.module.rpartition(".")[2] for place in found.values()})
    for key, entries in idle.items():
        if not entries:
            continue
        said = (
            f"`{call}`: {brief(entries)} of the configuration choose nothing among the parameters "
            f"that `names` names, in {key}"
        )
        hint = near_misses(entries[0], known)
        if len(entries) == asked[key]:
            raise ValueError(f"{said}. Take them out, or name those weights. {hint}")
        warnings.warn(f"{said}; the other entries do. {hint}", stacklevel=4)


def _rule(
    config: Config,
    place: Place,
    chosen: str | None,
    init: initializers.Initializer | None,
    where: Found,
    call: str,
) -> LoraSpec | str | None:
    if chosen is None or chosen == "full":
        return chosen
    name = place.name if chosen == "parameter" else place.module
    kind = kind_of(place, None, where.kinds)
    refuse_variants(place, chosen == "parameter", kind, config.use_dora, config.lora_bias, call)
    if config.form != "lora":
        return _of_method(config, place, chosen == "parameter" or kind != "linear", init, call)
    return LoraSpec(
        rank=first_match(config.rank_pattern, name, config.r, call),
        alpha=first_match(config.alpha_pattern, name, config.lora_alpha, call),
        scaling="rslora" if config.use_rslora else "lora",
        dora=config.use_dora,
        init=init or initializer(config.init_lora_weights, kind == "embedding", call),
        layout=_layout(place, chosen, kind),
    )


def _of_method(
    config: Config, place: Place, odd: bool, init: initializers.Initializer | None, call: str
) -> LoraSpec:
    """Return the spec for AdaLoRA or VeRA, with PEFT's scaling."""
    if odd or config.d_initial != 0.1 or config.init_lora_weights is not True:
        raise ValueError(
            f"`{call}`: peft_type {config.form.upper()!r} is of linear layers, which begin as "
            f'`LoraSpec(form="{config.form}")` has them (d_initial=0.1, init_lora_weights=True); '
            f'"{place.name}" is not. Take it out of target_modules, or the entry out.'
        )
    alpha = config.scaling(config.lora_alpha, config.r) * config.r
    layout = _layout(place, "lora", "linear")
    return LoraSpec(config.r, alpha, form=config.form, init=init, layout=layout)


def _grouped(spec: LoraSpec, place: Place, n: int, own_init: bool, call: str) -> LoraSpec:
    """Split an update over the groups of a convolution, with the same scaling."""
    outs, is_conv = place.shape[-1], kind_of(place, None, {}) == "conv" or len(place.shape) == 3
    if not isinstance(n, int) or n < 1 or outs % n or spec.rank % n or not is_conv:
        raise ValueError(
            f'`{call}`: `groups` has {brief(n)} for "{place.path}" {list(place.shape)}, of rank '
            f"{spec.rank}. Give what PyTorch's convolution has, whose kernel here ends with the "
            "outputs: PEFT wants it to divide the rank, which is that of all groups together."
        )
    return dataclasses.replace(
        spec,
        rank=spec.rank // n,
        alpha=spec.alpha / (math.sqrt(n) if spec.scaling == "rslora" else n),
        init=of_groups(spec.init, n) if own_init else spec.init,
        layout="i" * (len(place.shape) - 1) + "o",
        slices=equal_ranges(outs, n),
    )


def _layout(place: Place, chosen: str, kind: str) -> str | None:
    """Return the layout if `attach` cannot infer it, for a leaf with stack dimensions."""
    dims, stacked = len(place.shape), bool(place.index) or chosen == "parameter"
    if is_doubtful(place.path):
        return None  # (out, in), perhaps: `attach` asks, or has it from its `layouts`
    if stacked and (dims == 2 or chosen == "parameter"):
        return "io"
    return "i" * (dims - 1) + "o" if stacked and kind == "conv" else None
