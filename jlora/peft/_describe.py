"""Write adapter_config.json: the rank, alpha, targets and biases that describe the tensors."""

import collections
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora._paths import brief, near_misses
from jlora.peft._linear import HEADS
from jlora.peft._match import Patterns, ends_with, parents
from jlora.peft._names import Place
from jlora.peft._tensors import MAGNITUDE

# Entries that the caller may set, and their defaults.
_GIVEN = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "peft_version": None,
    "revision": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_rslora": False,
}


class Adapted(NamedTuple):
    """The tensors of one adapted parameter, by the endings of their keys; its rank and alpha."""

    tensors: Mapping[str, np.ndarray]
    rank: int
    alpha: float | int
    is_parameter: bool
    spelled: str  # the module's key in the file
    target: str  # what PEFT matches: a module's name, or a parameter's


def describe_adapter(
    parts: Mapping[Place, Adapted],
    fulls: Iterable[Place],
    found: Mapping[str, Place],
    given: Mapping[str, Any],
    call: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration's entries, and the keys of fully saved parameters by name."""
    for key in given:
        if key not in _GIVEN:
            raise ValueError(
                f'`{call}`: "{key}" cannot be set: it is unknown, or follows from '
                f"the parameters. {near_misses(key, _GIVEN)}"
            )
    init = given.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"`{call}`: init_lora_weights={brief(init)} makes PEFT move the base weights when it "
            "loads the adapter. Leave it out."
        )
    if given.get("lora_bias") and init not in (True, False):
        raise ValueError(
            f"`{call}`: PEFT has no lora_bias=True together with init_lora_weights={brief(init)}."
        )
    try:
        json.dumps(dict(given), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{call}`: the entries are not JSON: {error}.") from None
    layers = {place.module: one for place, one in parts.items() if not one.is_parameter}
    modules = {one.target for one in layers.values()}
    parameters = [one.target for one in parts.values() if one.is_parameter]
    full_modules, bias = _full_modules(set(fulls), set(layers), found, given.get("task_type"), call)
    ranks = {one.target: one.rank for one in parts.values()}
    alphas = {one.target: one.alpha for one in parts.values()}
    for one in parts.values():
        if (ranks[one.target], alphas[one.target]) != (one.rank, one.alpha):
            raise ValueError(
                f'`{call}`: PEFT has one rank and alpha for "{one.target}", whose two projections '
                "have different ones here."
            )
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8)
    entries = {
        **_GIVEN,
        **given,
        "alpha_pattern": _pattern(alphas, alpha, call),
        "bias": bias,
        "lora_alpha": alpha,
        "modules_to_save": full_modules or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _pattern(ranks, rank, call),
        "target_modules": _targets(modules, found),
        "target_parameters": _parameters(parameters, found, call),
        "use_dora": _dora(parts, call),
    }
    spelled = {place.name: place.name for place in fulls}
    for place in fulls:
        if bias != "none" and place.parameter == "bias" and place.module in layers:
            spelled[place.name] = f"{layers[place.module].spelled}.base_layer.bias"
    return entries, spelled


def _dora(parts: Mapping[Place, Adapted], call: str) -> bool:
    """Whether all have magnitudes; PEFT has them everywhere or nowhere."""
    without = [place.path for place, one in parts.items() if MAGNITUDE not in one.tensors]
    if without and len(without) < len(parts):
        raise ValueError(
            f"`{call}`: PEFT has DoRA in all adapted layers or in none; here {len(without)} of "
            f'{len(parts)} have no magnitude, the first "{without[0]}". Give all '
            "`LoraSpec(dora=True)`."
        )
    return bool(parts) and not without


def _ending(inside: Iterable[str], modules: set[str]) -> dict[str, list[str]]:
    """Return the other modules whose names end with a name, by that name."""
    ending = collections.defaultdict(list)
    for other in set(inside) - modules:
        for k in range(len(other)):
            ending[other[k:]].append(other)
    return ending


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counts = collections.Counter(values).most_common()
    return min((v for v, n in counts if n == counts[0][1]), default=default)


def _pattern(values: Mapping[str, Any], default: Any, call: str) -> dict[str, Any]:
    """Return the entries that differ from the default; a key is a name, anchored if ambiguous."""
    odd = Patterns(sorted((name, value) for name, value in values.items() if value != default))
    hits = collections.Counter(key for name in values for key in odd.matching(name, call))
    return {
        name if hits[name] == 1 else "^" + re.escape(name): value for name, value in odd.items()
    }


def _targets(modules: set[str], found: Mapping[str, Place]) -> list[str] | str | None:
    """Return the modules' full names, or an exact pattern if these are suffixes of others."""
    others = {place.module for place in found.values()} - modules
    if any(ends_with(other, modules) for other in others):
        return "|".join(re.escape(m) for m in sorted(modules))
    return sorted(modules) or None


def _parameters(names: Sequence[str], found: Mapping[str, Place], call: str) -> list[str] | None:
    """Return the full names of adapted parameters; raise if one is a suffix of another."""
    adapted = set(names)
    for other in found:
        if other not in adapted and ends_with(other, adapted):
            raise ValueError(
                f'`{call}`: PEFT would adapt "{other}" too, because its name ends with that of an '
                "adapted parameter. Adapt it too."
            )
    return list(names) or None


def _highest(
    fulls: set[Place], inside: Mapping[str, list[Place]], heads: tuple[str, ...]
) -> list[str]:
    """Return the modules to save: the highest all of whose parameters are saved.

    A module that encloses a single one is not used, because `names` may not cover all of it, except
    for a head that PEFT saves by default.
    """
    saved = {m for m, places in inside.items() if fulls.issuperset(places)}
    several = {
        m for m in saved if len({p.module for p in inside[m]}) > 1 or (heads and m.endswith(heads))
    }
    modules = {p.module for p in fulls if p.parameter != "bias"}
    return sorted({next((m for m in parents(own) if m in several), own) for own in modules})


def _full_modules(
    fulls: set[Place],
    targeted: set[str],
    found: Mapping[str, Place],
    task: str | None,
    call: str,
) -> tuple[list[str], str]:
    """Describe fully trained parameters as PEFT does: full modules, and a choice of biases."""
    inside: dict[str, list[Place]] = {}
    for place in found.values():
        for module in parents(place.module):
            inside.setdefault(module, []).append(place)
    heads = HEADS.get(task, ())
    modules = _highest(fulls, inside, heads)
    ending = _ending(inside, set(modules))
    for module in modules:
        lacking = sorted(p.name for p in inside.get(module, ()) if p not in fulls)
        alike = sorted(ending[module])
        if not module or lacking or alike:
            raise ValueError(
                f'`{call}`: PEFT saves full modules, by the ends of their names: for "{module}" '
                f"{(lacking + alike)[:3]} must be fully trained too. Give them the rule "
                '"full" too, or none of them.'
            )
        head = next((m for m in parents(module)[:-1] if m.endswith(heads)), None) if heads else None
        if head:
            lacking = sorted(p.name for p in inside[head] if p not in fulls)
            raise ValueError(
                f'`{call}`: under task_type={brief(task)} PEFT saves all of "{head}", and fails on '
                f'a file of "{module}" alone. Give {lacking[:3]} the rule "full" too, or leave '
                "task_type out."
            )
    covered = {p.name for module in modules for p in inside[module]}
    biases = {p.name for p in found.values() if p.parameter == "bias"} - covered
    left = {p.name for p in fulls} & biases
    if not left:
        return modules, "none"
    if left == {name for name in biases if found[name].module in targeted}:
        return modules, "lora_only"
    if left == biases:
        return modules, "all"
    raise ValueError(
        f"`{call}`: PEFT trains all biases, those of the adapted modules, or none; here "
        f"{len(left)} of {len(biases)} train, and not {sorted(biases - left)[:3]}. Give all of "
        'them the rule "full", or those of the adapted weights.'
    )
