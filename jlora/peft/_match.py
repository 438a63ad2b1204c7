"""PEFT's way of matching module names: suffixes, whole regular expressions, layer indices.

Configurations may come from anywhere, so a pattern that could take exponential time is refused.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_REPEATS, _CHOICES = 5, 1e6


@functools.lru_cache(maxsize=2**16)
def _compile(pattern: str, before: str, after: str) -> re.Pattern[str] | str:
    """Compile a pattern between two of PEFT's own, or say why it is not to be tried.

    Backtracking is exponential where a group repeats or many groups have alternatives; otherwise
    it is a polynomial of the name's length, of the degree of the number of repeats.
    """
    try:
        re.compile(pattern)
        whole = re.compile(f"{before}{pattern}{after}")
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression here: {error}"
    groups, bars = pattern.count("("), pattern.count("|")
    if re.search(r"\)(?:[*+]|\{)", pattern):
        why = "repeats a group"
    elif len(re.findall(r"(?<!\\)(?:[*+{]|(?<![(*+}])\?)", pattern)) > _REPEATS:
        why = f"repeats in more than {_REPEATS} places"
    elif groups > 1 and groups * math.log((bars + groups) / groups) > math.log(_CHOICES):
        why = "has too many groups of alternatives"
    else:
        return whole
    return f"{why}; matching it could take for ever. Write the names out"


def compiled(pattern: str, call: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """Compile a pattern of a configuration; refuse a broken or a slow one."""
    made = _compile(pattern, before, after)
    if isinstance(made, str):
        raise ValueError(f"`{call}`: the pattern {pattern[:80]!r} {made}.")
    return made


def ends_with(name: str, entries: Collection[str]) -> bool:
    """Whether an entry is the name or its last components: "q_proj", "self_attn.q_proj"."""
    starts = (0, *(k + 1 for k, letter in enumerate(name) if letter == "."))
    return any(name[k:] in entries for k in starts)


def first_match(patterns: Mapping[str, T], name: str, default: T, call: str) -> T:
    """Return the value of the first key that matches the name's last components."""
    for key, value in patterns.items():
        if compiled(key, call, r"(.*\.)?(", ")$").match(name):
            return value
    return default


def holds(entries: Sequence[str], module: str, call: str) -> bool:
    """Whether an entry of `modules_to_save` is the module, or a module around it."""
    return any(compiled(e, call, r"(^|.*\.)", r"($|\..*)").match(module) for e in entries)


def excluded(config: Any, module: str, call: str) -> bool:
    """Whether `exclude_modules`, a whole regular expression or last components, has the module."""
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        return compiled(exclude, call).fullmatch(module) is not None
    return bool(exclude) and ends_with(module, exclude)


def targeted(config: Any, module: str, call: str) -> bool:
    """Whether PEFT would give this module a LoRA layer.

    What is excluded or saved whole comes first; a string must match whole; an entry of a list must
    be the last components, and then the layer's index counts, except where it is the whole name.
    """
    target = config.target_modules
    if excluded(config, module, call):
        return False
    if holds(config.modules_to_save, module, call) or target is None:
        return False
    if isinstance(target, str):
        return compiled(target, call).fullmatch(module) is not None
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
    if patterns:
        around = (r"(?:^|.*?\.)", r"\.(?P<index>\d+)\.")
        found = [compiled(pattern, call, *around).match(module) for pattern in patterns]
    else:
        found = [re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)]
    match = next((m for m in found if m), None)
    return int(match["index"]) if match else None
