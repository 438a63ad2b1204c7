"""PEFT's way of matching module names: suffixes, whole regular expressions, layer indices.

Configurations may come from anywhere, so a pattern that could take exponential time is refused.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_REPEATS, _CHOICES = 5, 1e6


def check_pattern(pattern: str, call: str) -> None:
    """Refuse a regular expression that is broken, or that could run for ever.

    Backtracking is exponential where a group repeats or many groups have alternatives; otherwise
    it is a polynomial of the name's length, of the degree of the number of repeats.
    """
    why = None
    groups, bars = pattern.count("("), pattern.count("|")
    if re.search(r"\)(?:[*+]|\{)", pattern):
        why = "repeats a group"
    elif len(re.findall(r"(?<!\\)(?:[*+{]|(?<![(*+}])\?)", pattern)) > _REPEATS:
        why = f"repeats in more than {_REPEATS} places"
    elif groups > 1 and groups * math.log((bars + groups) / groups) > math.log(_CHOICES):
        why = "has too many groups of alternatives"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"`{call}`: the pattern {pattern[:80]!r} is not a regular expression: {error}."
        ) from None
    if why:
        raise ValueError(
            f"`{call}`: the pattern {pattern[:80]!r} {why}; matching it could take for ever, so it "
            "is refused. Write the names out, or a simpler pattern."
        )


def ends_with(name: str, entries: Sequence[str]) -> bool:
    """Whether an entry is the name or its last components: "q_proj", "self_attn.q_proj"."""
    return any(name == entry or name.endswith("." + entry) for entry in entries)


def first_match(patterns: Mapping[str, T], name: str, default: T, call: str) -> T:
    """Return the value of the first key that matches the name's last components."""
    for key, value in patterns.items():
        check_pattern(key, call)
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def holds(entries: Sequence[str], module: str, call: str) -> bool:
    """Whether an entry of `modules_to_save` is the module, or a module around it."""
    for entry in entries:
        check_pattern(entry, call)
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", module) for entry in entries)


def whole(pattern: str, name: str, call: str) -> bool:
    """Whether a pattern matches a whole name."""
    check_pattern(pattern, call)
    return re.fullmatch(pattern, name) is not None


def targeted(config: Any, module: str, call: str) -> bool:
    """Whether PEFT would give this module a LoRA layer.

    What is excluded or saved whole comes first; a string must match whole; an entry of a list must
    be the last components, and then the layer's index counts, except where it is the whole name.
    """
    exclude, target = config.exclude_modules, config.target_modules
    if isinstance(exclude, str):
        if whole(exclude, module, call):
            return False
    elif exclude and ends_with(module, exclude):
        return False
    if holds(config.modules_to_save, module, call) or target is None:
        return False
    if isinstance(target, str):
        return whole(target, module, call)
    if module in target:
        return True
    if not ends_with(module, target):
        return False
    if config.layers_to_transform is None:
        return True
    index = _layer(config.layers_pattern, module, call)
    return index is not None and index in config.layers_to_transform


def _layer(patterns: Sequence[str], module: str, call: str) -> int | None:
    """Return the index of the layer: the first number that stands alone below a list's name."""
    found = [re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)] if not patterns else []
    for pattern in patterns:
        check_pattern(pattern, call)
        found.append(re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module))
    match = next((m for m in found if m), None)
    return int(match["index"]) if match else None
