"""Assign the tensors of a file to leaves; collect missing, unexpected and misshaped keys."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jlora._arrays import Geometry
from jlora._paths import near_misses
from jlora.peft._config import Alpha, Config
from jlora.peft._forms import Slices, of_loralib, of_peft
from jlora.peft._keys import BIAS, Found, Groups, Owner, Tensors, owners, sort
from jlora.peft._match import first_match, is_saved, targeted
from jlora.peft._names import Place, bias_of, is_parameter, kind_of, refuse_variants
from jlora.peft._spell import PREFIX, names_of, strange_prefix
from jlora.peft._tensors import full_shape, parts_of
from jlora.peft._tied import is_tied_full, is_tied_lora, unties
from jlora.peft._tokens import Tokens, assign_tokens

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The tensors of one place, and how to read them."""

    place: Place
    tensors: Mapping[str, np.ndarray]
    geometry: Any  # None for a vector
    kind: str
    rank: int = 0
    scaling: float = 0.0
    slices: Slices = None

    @property
    def dtypes(self) -> list[str]:
        """The tensors' dtypes."""
        return [x.dtype.name for x in self.tensors.values()]


@dataclasses.dataclass
class Plan:
    """The contents of the file by leaf, in the order of its places, and its errors."""

    lora: dict[str, list[Assignment]] = dataclasses.field(default_factory=dict)
    full: dict[str, list[Assignment]] = dataclasses.field(default_factory=dict)
    base: list[Assignment] = dataclasses.field(default_factory=list)
    biases: list[Assignment] = dataclasses.field(
        default_factory=list
    )  # of lora_B, by the layer's bias
    tokens: list[Tokens] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    misshaped: list[str] = dataclasses.field(default_factory=list)

    def check_shape(self, key: str, x: np.ndarray, want: tuple[int, ...], place: Place) -> None:
        """Record a tensor whose shape does not match its place."""
        if x.shape != want:
            self.misshaped.append(
                f'"{key}" {list(x.shape)}, where "{place.path}" needs {list(want)}'
            )


def assign(
    tensors: Tensors,
    config: Config | Alpha,
    found: Found,
    parameters: Collection[str],
    call: str,
) -> Plan:
    """Assign every tensor; raise one error that lists everything that does not match.

    `parameters` are the `target_parameters` of a file without a configuration.
    """
    groups, plan = sort(tensors, found.places, call), Plan()
    targets = config.target_parameters if isinstance(config, Config) else parameters
    owned = owners(groups, tensors, targets, found, call)
    for spelled, kinds in groups.lora.items():
        if spelled in owned:
            _assign_lora(plan, owned[spelled], spelled, kinds, tensors, config, found, call)
        elif not is_tied_lora(kinds, groups, tensors):
            plan.unexpected += [key for keys in kinds.values() for key in keys.values()]
    for name, key in (*groups.full.items(), *groups.base.items()):
        place = found.places.get(name)
        is_copy = groups.base.get(name) == key
        if place is None or (not is_copy and place.path in plan.lora):
            repeated = _is_repeated(name, groups, tensors)
            if not repeated and not is_tied_full(key, is_copy, groups, tensors, found):
                plan.unexpected.append(key)
            continue
        geometry, kind = found.full_geometry(place, call, tensors[key].shape)
        plan.check_shape(key, tensors[key], full_shape(place.shape, geometry, kind), place)
        one = Assignment(place, {"value": tensors[key]}, geometry, kind)
        if is_copy:
            plan.base.append(one)
        else:
            plan.full.setdefault(place.path, []).append(one)
    assign_tokens(plan, groups, tensors, config, found, call)
    _note_missing(plan, groups, {o.place.name for o in owned.values()}, config, found, call)
    _refuse(plan, tensors, found, call)
    for parts in (*plan.lora.values(), *plan.full.values()):
        parts.sort(key=lambda one: one.place.index)
    return plan


def _is_repeated(name: str, groups: Groups, tensors: Tensors) -> bool:
    """Whether this bias is a second copy: with bias="all" PEFT saves both copies of a module.

    The trained copy equals the module's own; the original is not used.
    """
    # For biases of nested modules, PEFT leaves the adapter's name in the key.
    for copy in (r"\.modules_to_save\.", r"\.modules_to_save\.[^.]+\.", r"\.original_module\."):
        original, found = re.subn(copy, ".", name, count=1)
        own = groups.full.get(original)
        if found and name.endswith(".bias") and own is not None:
            same = np.array_equal(tensors[groups.full[name]], tensors[own])
            return same or "original" in copy
    return False


def _assign_lora(
    plan: Plan,
    owner: Owner,
    spelled: str,
    kinds: Mapping[str, Mapping[str, str]],
    tensors: Tensors,
    config: Config | Alpha,
    found: Found,
    call: str,
) -> None:
    """Check one module's parts, and record them under their leaf."""
    place, name = owner
    kind = next((k for k in ("embedding", "loralib") if k in kinds), "linear")
    keys = _of_kind(plan, spelled, kinds, kind, config)
    if keys is None or len(place.shape) < 2:
        plan.unexpected += (keys or {}).values()
        return
    parts = {part: tensors[key] for part, key in keys.items()}
    bias = parts.pop("bias", None)
    if kind == "loralib":
        form = "conv" if place.name == f"{spelled}.conv.weight" else "linear"
        geometry = found.geometry(place, form, call)
        made = of_loralib(parts, geometry, form, found.slices.get(place.path), place, call)
    else:
        form = "conv" if kind == "linear" and parts["lora_a"].ndim > 2 else kind
        geometry = found.geometry(place, form, call)
        made = of_peft(
            parts, geometry, form, _rank(parts, geometry, config, name, call), place, call
        )
    for part, x in parts.items():
        plan.check_shape(keys[part], x, made.wanted[part], place)
    if isinstance(config, Config):
        alpha = first_match(config.alpha_pattern, name, config.lora_alpha, call)
        scaling = config.scaling(alpha, made.rank)
        parameter = is_parameter(place, geometry)
        refuse_variants(place, parameter, form, config.use_dora, config.lora_bias, call)
    else:
        scaling = 1.0 if config == "rank" else config / made.rank
    if bias is not None:
        of = bias_of(place, found.places, call)
        plan.check_shape(keys["bias"], bias, (geometry.fan_out,), of)
        plan.biases.append(Assignment(of, {"value": bias}, None, form, made.rank, scaling))
    one = Assignment(place, made.tensors, geometry, form, made.rank, scaling, made.slices)
    plan.lora.setdefault(place.path, []).append(one)


def _of_kind(
    plan: Plan,
    spelled: str,
    kinds: Mapping[str, Mapping[str, str]],
    kind: str,
    config: Config | Alpha,
) -> dict[str, str] | None:
    """Return the keys of a module's parts; record unexpected and missing ones, None if any miss."""
    dora, bias = (
        (config.use_dora, config.lora_bias) if isinstance(config, Config) else (False, False)
    )
    wanted = parts_of(kind, dora) | ({"bias": BIAS} if bias else {})
    there = {**kinds.get(kind, {}), **kinds.get("any", {})}
    others = [k for other in kinds if other not in (kind, "any") for k in kinds[other].values()]
    plan.unexpected += others + [key for part, key in there.items() if part not in wanted]
    keys = {part: key for part, key in there.items() if part in wanted}
    lacking = [f"{PREFIX}{spelled}.{wanted[part]}" for part in wanted if part not in keys]
    plan.missing += lacking
    return None if lacking else keys


def _rank(
    parts: Mapping[str, np.ndarray],
    geometry: Geometry,
    config: Config | Alpha,
    name: str,
    call: str,
) -> int:
    """Return the rank from the configuration or, without one, from the shape of A."""
    if isinstance(config, Config):
        return first_match(config.rank_pattern, name, config.r, call)
    return max(1, (*parts["lora_a"].shape, 1)[0] // math.prod(geometry.stack))


def _note_missing(
    plan: Plan,
    groups: Groups,
    adapted: set[str],
    config: Config | Alpha,
    found: Found,
    call: str,
) -> None:
    """Record what the configuration or the rest of a stack requires and the file lacks."""
    for place in found.places.values():
        full, saved = place.name in groups.full, place.path in plan.full
        if place.path in plan.lora and place.name not in adapted:
            plan.missing.append(f"{PREFIX}{place.module}.{parts_of('linear')['lora_a']}")
        elif not full and (saved or _asks_full(place, config, found, call)):
            plan.missing.append(f"{PREFIX}{place.name}")
        elif place.name not in adapted and _asks_lora(place, config, call):
            kind = kind_of(place, found.layouts.get(place.path), found.kinds)
            plan.missing += [f"{PREFIX}{place.module}.{e}" for e in parts_of(kind).values()]


def _asks_lora(place: Place, config: Config | Alpha, call: str) -> bool:
    is_weight = place.parameter in ("weight", "in_proj_weight") and len(place.shape) >= 2
    if not isinstance(config, Config) or not is_weight:
        return False
    try:
        return targeted(config, place.module, call)
    except ValueError:
        return False  # a pattern too costly to try: rely on the keys of the file


def _asks_full(place: Place, config: Config | Alpha, found: Found, call: str) -> bool:
    if not isinstance(config, Config):
        return False
    if is_saved(config.modules_to_save, place.module):
        return True
    if place.parameter != "bias":
        return False
    weight = found.places.get(f"{place.module}.weight")
    return config.bias == "all" or (
        config.bias == "lora_only" and weight is not None and _asks_lora(weight, config, call)
    )


def _refuse(plan: Plan, tensors: Tensors, found: Found, call: str) -> None:
    """Raise one error that lists everything that does not match."""
    said = []
    for word, keys in (("missing", plan.missing), ("unexpected", plan.unexpected)):
        if keys:
            more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            said.append(
                f"{len(keys)} keys are {word}: "
                + ", ".join(f'"{k[:200]}"' for k in keys[:_SHOWN])
                + more
            )
    if plan.misshaped:
        said.append(
            f"{len(plan.misshaped)} keys have another shape: " + "; ".join(plan.misshaped[:_SHOWN])
        )
        said.append(
            "For weights not stored as in Flax, such as (out, in) in Equinox, pass "
            "`layouts=jlora.layouts(fn, params, x)`; for an embedding or another fully saved "
            "parameter that is stored as in PyTorch, pass `kinds`"
        )
    if not said and not plan.lora and not plan.full and not plan.tokens:
        said.append("the file holds no tensors")
    names = names_of(plan.unexpected, found.places, call).values()
    prefix = strange_prefix(names, {place.module for place in found.places.values()})
    if prefix:
        said.append(f'Each of these keys has the prefix "{prefix}", which `names` does not have')
    said += unties(plan.unexpected, tensors, found)
    if said:
        odd = (plan.unexpected or plan.missing or [PREFIX])[0].removeprefix(PREFIX)[:200]
        raise ValueError(
            f"`{call}`: the file does not match the model. "
            + ". ".join(said)
            + ". Is it an adapter "
            f"of this model, and are its `names` right? {near_misses(odd, found.places)}"
        )
