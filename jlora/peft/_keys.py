"""The keys of a file, taken apart: which module's A and B, and which leaf that module is."""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jlora._arrays import Geometry
from jlora.peft._match import ends_with
from jlora.peft._names import Place, geometry_of, kind_of
from jlora.peft._tensors import MAGNITUDE, PARTS

PREFIX = "base_model.model."

Tensors = Mapping[str, np.ndarray]

BIAS = "lora_B.bias"

# What the keys of variants that jlora lacks end with.
_LACKED = {
    r"lora_A\.bias": "a bias on lora_A",
    r"lora_diag": "KaSA",
    r"lora_velora_embed": "VeLoRA",
    r"lora_monteclora_sampler\.\w+": "MonteCLoRA",
    r"token_adapter\.\w+": "trainable tokens",
}
_ENDINGS = [
    *((kind, part, ending) for kind, parts in PARTS.items() for part, ending in parts.items()),
    *(("any", "magnitude", MAGNITUDE), ("any", "magnitude", MAGNITUDE + ".weight")),
    ("any", "bias", BIAS),
]


class Owner(NamedTuple):
    """The parameter that A and B adapt, and the name that rank and alpha patterns see."""

    place: Place
    pattern_name: str


@dataclasses.dataclass(frozen=True)
class Found:
    """The places that `names` gives, and what is known of their leaves."""

    places: Mapping[str, Place]
    layouts: Mapping[str, str]
    kinds: Mapping[str, str]
    slices: Mapping[str, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)

    def geometry(self, place: Place, kind: str, call: str) -> Geometry:
        """Divide the shape of a place; what its name unrolls is stack, and has no letter."""
        layout = self.layouts.get(place.path)
        return geometry_of(place, layout and layout[-len(place.shape) :], kind, call)

    def whole(self, place: Place, call: str) -> tuple[Geometry | None, str]:
        """Return geometry and kind of a parameter saved whole; a vector or a bias has no sides."""
        kind = kind_of(place, self.layouts.get(place.path), self.kinds)
        if len(place.shape) < 2 or place.parameter == "bias":
            return None, "linear"
        return self.geometry(place, kind, call), kind


@dataclasses.dataclass
class Groups:
    """Keys by module as the file spells it, kind and part; of whole parameters by their name."""

    lora: dict[str, dict[str, dict[str, str]]] = dataclasses.field(default_factory=dict)
    full: dict[str, str] = dataclasses.field(default_factory=dict)
    base: dict[str, str] = dataclasses.field(default_factory=dict)


def sort(tensors: Tensors, call: str) -> Groups:
    """Take the keys apart; a part of a variant that jlora lacks is refused by name."""
    groups = Groups()
    for key in tensors:
        name = key.removeprefix(PREFIX)
        for pattern, variant in _LACKED.items():
            if re.search(rf"(^|\.){pattern}$", name[-200:]):
                raise ValueError(
                    f'`{call}`: "{key[-200:]}" is of {variant}, which jlora does not have yet; '
                    "without it the adapter would give other numbers."
                )
        for kind, part, ending in _ENDINGS:
            if name.endswith("." + ending):
                module = name.removesuffix("." + ending)
                groups.lora.setdefault(module, {}).setdefault(kind, {})[part] = key
                break
        else:
            is_copy = name.endswith(".base_layer.weight")
            (groups.base if is_copy else groups.full)[name.replace(".base_layer.", ".")] = key
    return groups


def owners(
    groups: Groups,
    tensors: Tensors,
    targets: Collection[str],
    found: Found,
    declared: Sequence[str],
    call: str,
) -> dict[str, Owner]:
    """Say whose A and B stand under each module of the file; `targets` is target_parameters."""
    by_module: dict[str, list[Place]] = {}
    for place in found.places.values():
        if ends_with(place.name, targets):
            by_module.setdefault(place.module, []).append(place)
    owned: dict[str, Owner] = {}
    for spelled in groups.lora:
        if re.sub(r"(\.base_layer)+$", "", spelled) in by_module:
            continue
        candidates = {f"{spelled}.weight": spelled, f"{spelled}.in_proj_weight": spelled}
        if "loralib" in groups.lora[spelled]:  # whose convolutions hold PyTorch's own inside
            candidates[f"{spelled}.conv.weight"] = spelled
        outer, inside, _ = spelled.rpartition(".base_layer.out_proj")
        if inside and f"{outer}.in_proj_weight" in found.places:  # MultiheadAttention's second
            candidates[f"{outer}.out_proj.weight"] = outer
        for name, pattern_name in candidates.items():
            if name in found.places:
                owned.setdefault(spelled, Owner(found.places[name], pattern_name))
    for module, places in by_module.items():
        order = _nested(module, places, groups, tensors, found, declared, call)
        owned |= {spelled: Owner(place, place.name) for spelled, place in order.items()}
    return owned


def _nested(
    module: str,
    places: list[Place],
    groups: Groups,
    tensors: Tensors,
    found: Found,
    declared: Sequence[str],
    call: str,
) -> dict[str, Place]:
    """Order the adapted parameters of one module: the one declared last is outermost."""
    spelled = [module + ".base_layer" * depth for depth in range(len(places))]
    spelled = [
        s for s in spelled if {"lora_a", "lora_b"} <= set(groups.lora.get(s, {}).get("linear", {}))
    ]
    if len(spelled) < len(places) or len(places) == 1:
        return dict(zip(spelled, places, strict=False))  # the others are missing
    given = in_order(places, declared)
    if given:
        return dict(zip(spelled, reversed(given), strict=True))

    def fits(order: Sequence[Place]) -> bool:
        return all(
            _widths(s, groups, tensors) == _sides(p, found, call)
            for s, p in zip(spelled, order, strict=True)
        )

    orders = [order for order in itertools.permutations(places) if fits(order)]
    if len(orders) > 1:
        raise ValueError(
            f'`{call}`: several parameters of "{module}" are adapted, '
            f"{[p.parameter for p in places]}, of equal shapes, and the file does not say which is "
            "which. Give `target_parameters=[...]` in the order in which PyTorch declares them."
        )
    return dict(zip(spelled, orders[0] if orders else places, strict=True))


def in_order(places: Sequence[Place], declared: Sequence[str]) -> list[Place] | None:
    """Sort parameters as `declared` has them, where it has them all."""
    position = {
        place.name: k
        for k, entry in reversed(list(enumerate(declared)))
        for place in places
        if ends_with(place.name, [entry])
    }
    if len(position) < len(places) or len(set(position.values())) < len(places):
        return None
    return sorted(places, key=lambda place: position[place.name])


def _widths(spelled: str, groups: Groups, tensors: Tensors) -> tuple[int, int]:
    keys = groups.lora[spelled]["linear"]
    a, b = tensors[keys["lora_a"]], tensors[keys["lora_b"]]
    return (a.shape or (0,))[-1], (b.shape or (0,))[0]


def _sides(place: Place, found: Found, call: str) -> tuple[int, int]:
    geometry = found.geometry(place, "linear", call)
    return geometry.fan_in, geometry.fan_out
