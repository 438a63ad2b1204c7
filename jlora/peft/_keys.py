"""Parse the keys of a file: the module whose A and B they are, and the leaf for that module."""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jlora._arrays import Geometry
from jlora._paths import is_doubtful
from jlora.peft._match import ends_with
from jlora.peft._names import Names, Place, ask_orientation, geometry_of, kind_of
from jlora.peft._spell import names_of
from jlora.peft._tensors import AS_IT_IS, MAGNITUDE, PARTS, full_shape, turns

Tensors = Mapping[str, np.ndarray]

BIAS = "lora_B.bias"
TOKENS = "token_adapter.trainable_tokens_delta"

# The endings of keys of variants that jlora does not support.
_LACKED = {
    r"lora_A\.bias": "a bias on lora_A",
    r"lora_diag": "KaSA",
    r"lora_velora_embed": "VeLoRA",
    r"lora_monteclora_sampler\.\w+": "MonteCLoRA",
}
_ENDINGS = [
    *((kind, part, ending) for kind, parts in PARTS.items() for part, ending in parts.items()),
    *(("any", "magnitude", MAGNITUDE), ("any", "magnitude", MAGNITUDE + ".weight")),
    ("any", "bias", BIAS),
]


class Owner(NamedTuple):
    """The parameter that A and B adapt, and the name matched by rank and alpha patterns."""

    place: Place
    pattern_name: str


@dataclasses.dataclass(frozen=True)
class Found:
    """The places from `names`, and what is known about their leaves."""

    places: Mapping[str, Place]
    layouts: Mapping[str, str]
    kinds: Mapping[str, str]
    slices: Mapping[str, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)
    declared: Sequence[str] = ()  # parameters in PyTorch's order, as far as known

    def layout(self, place: Place) -> str | None:
        """Return the layout of a place if known; unrolled dimensions have no letter."""
        layout = self.layouts.get(place.path)
        return layout and layout[-len(place.shape) :]

    def geometry(self, place: Place, kind: str, call: str) -> Geometry:
        """Return the geometry of a place; unrolled dimensions are stack."""
        return geometry_of(place, self.layout(place), kind, call)

    def full_geometry(
        self, place: Place, call: str, file: tuple[int, ...] | None = None
    ) -> tuple[Geometry | None, str]:
        """Return the geometry and kind of a fully saved parameter; None for a vector or a bias.

        `file` is its shape in the file that is read, and None when a file is written.
        """
        kind = kind_of(place, self.layouts.get(place.path), self.kinds)
        if len(place.shape) < 2 or place.parameter == "bias":
            return None, "linear"
        is_raw = place.parameter not in ("weight", "in_proj_weight")
        if is_raw and place.path not in self.kinds and kind not in AS_IT_IS:
            kind = self._raw(place, kind, call, file)
        if kind in AS_IT_IS:
            return None, kind
        if file is None and self.layout(place) is None and is_doubtful(place.path):
            ask_orientation(place, kind, call)
        return self.geometry(place, kind, call), kind

    def _raw(self, place: Place, kind: str, call: str, file: tuple[int, ...] | None) -> str:
        """Return "parameter" if a parameter outside any layer has its axes in PyTorch's order."""
        default = "i" * (len(place.shape) - 1) + "o" if kind == "conv" else "io"
        sides = geometry_of(place, self.layout(place) or default, kind, call)
        if not turns(place.shape, sides, kind):
            return "parameter"
        turned = full_shape(place.shape, sides, kind)
        if file is not None and turned != place.shape:
            return kind if file == turned else "parameter"
        raise ValueError(
            f'`{call}`: "{place.name}" is no layer\'s weight, but all of it is saved: '
            f'its axes may be those of "{place.path}" {list(place.shape)} or reversed. '
            f'Give `kinds={{"{place.path}": "parameter"}}` where they are the same, as in '
            '`x @ proj`, or "linear" where PyTorch has (out, in).'
        )


@dataclasses.dataclass
class Groups:
    """Keys of A and B by module, kind and part; keys of fully saved parameters by name."""

    lora: dict[str, dict[str, dict[str, str]]] = dataclasses.field(default_factory=dict)
    full: dict[str, str] = dataclasses.field(default_factory=dict)
    base: dict[str, str] = dataclasses.field(default_factory=dict)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)


def sort(tensors: Tensors, known: Collection[str], call: str) -> Groups:
    """Sort keys by what they are; raise for those of variants that jlora does not support."""
    groups = Groups()
    for key, name in names_of(tensors, known, call).items():
        for pattern, variant in _LACKED.items():
            if re.search(rf"(^|\.){pattern}$", name[-200:]):
                raise ValueError(
                    f'`{call}`: "{key[-200:]}" is of {variant}, which jlora does not '
                    "support; without it the adapter would compute something else."
                )
        for kind, part, ending in _ENDINGS:
            if name.endswith("." + ending):
                module = name.removesuffix("." + ending)
                groups.lora.setdefault(module, {}).setdefault(kind, {})[part] = key
                break
        else:
            module, is_tokens, rest = name.partition(f".{TOKENS}")
            if is_tokens and not rest:
                groups.tokens[module] = key
                continue
            is_copy = name.endswith(".base_layer.weight")
            (groups.base if is_copy else groups.full)[name.replace(".base_layer.", ".")] = key
    return groups


def owners(
    groups: Groups,
    tensors: Tensors,
    targets: Collection[str],
    found: Found,
    call: str,
) -> dict[str, Owner]:
    """Return the owner of A and B for each module; `targets` is target_parameters."""
    by_module: dict[str, list[Place]] = {}
    for place in found.places.values():
        if ends_with(place.name, targets):
            by_module.setdefault(place.module, []).append(place)
    owned: dict[str, Owner] = {}
    for spelled in groups.lora:
        if re.sub(r"(\.base_layer)+$", "", spelled) in by_module:
            continue
        candidates = {f"{spelled}.weight": spelled, f"{spelled}.in_proj_weight": spelled}
        if "loralib" in groups.lora[spelled]:  # its convolutions wrap PyTorch's
            candidates[f"{spelled}.conv.weight"] = spelled
        outer, inside, _ = spelled.rpartition(".base_layer.out_proj")
        if inside and f"{outer}.in_proj_weight" in found.places:  # MultiheadAttention's second
            candidates[f"{outer}.out_proj.weight"] = outer
        for name, pattern_name in candidates.items():
            if name in found.places:
                owned.setdefault(spelled, Owner(found.places[name], pattern_name))
    for module, places in by_module.items():
        order = _nested(module, places, groups, tensors, found, call)
        owned |= {spelled: Owner(place, place.name) for spelled, place in order.items()}
    return owned


def _nested(
    module: str,
    places: list[Place],
    groups: Groups,
    tensors: Tensors,
    found: Found,
    call: str,
) -> dict[str, Place]:
    """Order the adapted parameters of one module: the one declared last is outermost."""
    spelled = [module + ".base_layer" * depth for depth in range(len(places))]
    spelled = [
        s for s in spelled if {"lora_a", "lora_b"} <= set(groups.lora.get(s, {}).get("linear", {}))
    ]
    if len(spelled) < len(places) or len(places) == 1:
        return dict(zip(spelled, places, strict=False))  # the others are missing

    def fits(order: Sequence[Place]) -> bool:
        return all(
            _widths(s, groups, tensors) == _sides(p, found, call)
            for s, p in zip(spelled, order, strict=True)
        )

    orders = [order for order in itertools.permutations(places) if fits(order)]
    ordered = in_order(places, found.declared)
    if ordered and tuple(reversed(ordered)) in orders:
        orders = [tuple(reversed(ordered))]
    if len(orders) > 1:
        raise ValueError(
            f'`{call}`: several parameters of "{module}" are adapted, '
            f"{[p.parameter for p in places]}, with equal shapes, and the file does not tell them "
            f"apart. {declare([p.name for p in places])}"
        )
    return dict(zip(spelled, orders[0] if orders else places, strict=True))


def declare(names: Sequence[str]) -> str:
    """Return the sentence that asks for the order of parameters of one module."""
    return (
        f"Give `declared={list(names)}` in the order in which PyTorch declares them, as in "
        "`model.named_parameters()`; target_parameters in adapter_config.json has no fixed order."
    )


def order_of(
    names: Names, declared: Sequence[str] | None, found: Mapping[str, Place]
) -> Sequence[str]:
    """Return what is known about PyTorch's order: `declared`, else the order of `names`.

    A mapping in the order of the tree is no evidence: it may come from iterating over its leaves.
    """
    if declared is not None:
        return declared
    if not isinstance(names, Mapping):
        return ()
    listed = {path: k for k, path in enumerate(names)}
    by_module: dict[str, list[Place]] = {}
    for place in found.values():
        by_module.setdefault(place.module, []).append(place)
    known = []
    for places in by_module.values():
        told = sorted(places, key=lambda place: listed[place.path])
        known += [place.name for place in told] if told != places else []
    return known


def in_order(places: Sequence[Place], declared: Sequence[str]) -> list[Place] | None:
    """Sort parameters in the order of `declared`; None unless it has them all."""
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
