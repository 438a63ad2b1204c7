"""Match module names as PEFT does: by suffix, by full regular expression, by layer index.

Configurations are untrusted, so patterns that could take exponential time raise an error.
"""

import functools
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_WIDTH, _TRIES = 40, 2e8  # the length of a name, and the most ways of matching it


@functools.lru_cache(maxsize=2**16)
def _compile(pattern: str, before: str, after: str) -> re.Pattern[str] | str:
    """Compile a pattern surrounded by PEFT's, or return why it must not be tried.

    Backtracking is exponential if a group repeats. Otherwise count the ways of matching: each
    repeat of a character multiplies them by the length of a name, and alternatives add up.
    """
    try:
        re.compile(pattern)
        full = re.compile(f"{before}{pattern}{after}")
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression here: {error}"
    try:
        slow = _alternatives(_tokens(pattern)).ways > _TRIES
        why = "has too many repeats and alternatives that multiply" if slow else None
    except (_Refused, RecursionError) as error:
        why = str(error) or "is nested too deep"
    return full if why is None else f"{why}; matching it could take too long. Write the names out"


class _Refused(Exception):
    """The reason why a pattern must not be tried."""


class _Ways(NamedTuple):
    """The number of ways a part of a pattern can match at one position; its texts if literal."""

    ways: float
    texts: frozenset[str] | None = None


_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(\?P=\w+\)|\(\?[aiLmsux-]+\)|\(\?\(\w+\)"
    r"|\((?:\?(?:P<\w+>|<[=!]|[aiLmsux-]*:|[=!>]))?|(?:[*+?]|\{\d*,?\d*\})[?+]?|.",
    re.DOTALL,
)
_QUANTIFIER = re.compile(r"([*+?])[?+]?|\{(\d*)(,?)(\d*)\}[?+]?")


def _tokens(pattern: str) -> list[str]:
    """Split a pattern, the last token first."""
    tokens = _TOKEN.findall(pattern)
    if any(re.match(r"\(\?[aiLmsux-]*x", token) for token in tokens):
        raise _Refused("has the flag x, under which it reads otherwise")
    return tokens[::-1]


def _alternatives(tokens: list[str]) -> _Ways:
    """Count the ways of matching the content of a pair of parentheses.

    Of several literal texts only those with a common prefix match at one position.
    """
    branches = [_sequence(tokens)]
    while tokens and tokens[-1] == "|":
        tokens.pop()
        branches.append(_sequence(tokens))
    if len(branches) == 1:
        return branches[0]
    texts = [(text, branch.ways) for branch in branches for text in branch.texts or ()]
    alike = max((sum(n for t, n in texts if text.startswith(t)) for text, _ in texts), default=0)
    ways = alike + sum(branch.ways for branch in branches if branch.texts is None)
    is_text = all(branch.texts is not None for branch in branches)
    return _Ways(ways, frozenset(text for text, _ in texts) if is_text else None)


def _sequence(tokens: list[str]) -> _Ways:
    """Multiply the ways of consecutive parts, up to a bar, a parenthesis or the end."""
    ways, parts = 1.0, []
    while tokens and tokens[-1] not in ("|", ")"):
        token, one = tokens.pop(), _Ways(1.0)
        is_group = token.startswith("(?(") or (token[0] == "(" and token[-1] != ")")
        if is_group:
            one = _alternatives(tokens)
            tokens.pop()
            one = one if token in ("(", "(?:") else _Ways(one.ways)
        elif re.fullmatch(r"\w|\\\W|[ /-]", token):
            one = _Ways(1.0, frozenset([token[-1].casefold()]))
        if tokens and (quantifier := _QUANTIFIER.fullmatch(tokens[-1])):
            tokens.pop()
            one = _repeated(one, is_group, quantifier)
        ways *= one.ways
        parts.append(one.texts)
    if all(texts is not None and len(texts) == 1 for texts in parts):
        return _Ways(ways, frozenset(["".join(t for texts in parts for t in texts or ())]))
    return _Ways(ways, parts[0] if len(parts) == 1 else None)


def _repeated(one: _Ways, is_group: bool, quantifier: re.Match[str]) -> _Ways:
    """Multiply the ways of one part by those of its quantifier."""
    sign, least, comma, most = quantifier.groups()
    if sign == "?":
        return _Ways(one.ways + 1)
    if sign is None and not (least or comma):
        return _Ways(one.ways)  # "{}" is text
    if is_group and (sign or comma or int(least) > 1):
        raise _Refused("repeats a group")
    if sign is None and not comma:
        return one if least == "1" else _Ways(one.ways)
    return _Ways(one.ways * (min(_WIDTH, int(most) - int(least or 0) + 1) if most else _WIDTH))


def compiled(pattern: str, call: str, before: str = "", after: str = "") -> re.Pattern[str]:
    """Compile a pattern of a configuration; raise if it is invalid or slow."""
    made = _compile(pattern, before, after)
    if isinstance(made, str):
        raise ValueError(f"`{call}`: the pattern {pattern[:80]!r} {made}.")
    return made


def endings(name: str) -> list[str]:
    """Return the name and all its last components: "a.b.c", "b.c", "c"."""
    return [name, *(name[k + 1 :] for k, letter in enumerate(name) if letter == ".")]


def ends_with(name: str, entries: Collection[str]) -> bool:
    """Whether an entry is the name or its last components: "q_proj", "self_attn.q_proj"."""
    return any(ending in entries for ending in endings(name))


class Patterns(dict[str, Any]):
    """Values by pattern; a pattern must match the last components of a name.

    A file may have one for every module, so patterns that are plain names are looked up, not tried.
    Their dots are not escaped and match any character, so the text between dots is looked up.
    """

    @functools.cached_property
    def tried(self) -> dict[str, int]:
        """The keys that are not names, and their positions."""
        return {key: k for k, key in enumerate(self) if not re.fullmatch(r"\^?[\w.-]+", key)}

    @functools.cached_property
    def _named(self) -> dict[tuple[int, ...], dict[tuple[str, ...], tuple[int, str]]]:
        """The keys that are names, by whether they start with ^ and by widths, then by text."""
        named: dict[tuple[int, ...], dict[tuple[str, ...], tuple[int, str]]] = {}
        for k, key in enumerate(self):
            if key not in self.tried:
                pieces = tuple(key.removeprefix("^").split("."))
                widths = (key[0] == "^", *map(len, pieces))
                named.setdefault(widths, {})[pieces] = (k, key)
        return named

    def names(self, name: str) -> list[tuple[int, str]]:
        """Return the keys that are names and match this one, with their positions."""
        hits = []
        for (anchored, *widths), keys in self._named.items():
            start = len(name) - sum(widths) - len(widths) + 1
            if start < 0 or (start > 0 and (anchored or name[start - 1] != ".")):
                continue
            starts = itertools.accumulate((width + 1 for width in widths), initial=start)
            pieces = tuple(name[at : at + n] for at, n in zip(starts, widths, strict=False))
            if pieces in keys:
                hits.append(keys[pieces])
        return hits

    def matching(self, name: str, call: str) -> Iterator[str]:
        """Yield the keys that match a name, in their order."""
        for _, key in sorted([*((k, key) for key, k in self.tried.items()), *self.names(name)]):
            if key not in self.tried or compiled(key, call, r"(.*\.)?(", ")$").match(name):
                yield key


def first_match(patterns: Mapping[str, T], name: str, default: T, call: str) -> T:
    """Return the value of the first key that matches the name's last components."""
    patterns = patterns if isinstance(patterns, Patterns) else Patterns(patterns)
    key = next(patterns.matching(name, call), None)
    return default if key is None else patterns[key]


def parents(module: str) -> list[str]:
    """Return the enclosing modules of a module, and itself."""
    return [*(module[:k] for k, letter in enumerate(module) if letter == "."), module]


def holds(entries: Collection[str], module: str, call: str) -> bool:
    """Whether an entry of `modules_to_save` is the module or encloses it."""
    entries = entries if isinstance(entries, Patterns) else Patterns(dict.fromkeys(entries))
    return any(entries.names(m) for m in parents(module)) or any(
        compiled(e, call, r"(^|.*\.)", r"($|\..*)").match(module) for e in entries.tried
    )


def is_saved(entries: Collection[str], module: str) -> bool:
    """Whether the name of a module or of an enclosing one ends with an entry, as in PEFT."""
    return bool(entries) and any(m[k:] in entries for m in parents(module) for k in range(len(m)))


def excluded(config: Any, module: str, call: str) -> bool:
    """Whether `exclude_modules`, a full regular expression or last components, has the module."""
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        return compiled(exclude, call).fullmatch(module) is not None
    return bool(exclude) and ends_with(module, exclude)


def targeted(config: Any, module: str, call: str) -> bool:
    """Whether PEFT would give this module a LoRA layer.

    Excluded and fully saved modules are never targeted. A string must match in full. An entry of a
    list must be the last components, and the layer's index must be listed unless it is the full
    name.
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
    """Return the index of the layer: the first component below a list's name that is a number."""
    if patterns:
        around = (r"(?:^|.*?\.)", r"\.(?P<index>\d+)\.")
        found = [compiled(pattern, call, *around).match(module) for pattern in patterns]
    else:
        found = [re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)]
    match = next((m for m in found if m), None)
    return int(match["index"]) if match else None
