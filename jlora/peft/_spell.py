"""Normalize keys not written by `save_pretrained`, such as those of a raw `state_dict`.

base_model.model._orig_mod.m.q_proj.lora_A.weight    torch.compile's; "module." is that of DDP
base_model.model.m.q_proj.lora_A.default.weight      with the adapter's name left in
"""

import re
from collections.abc import Collection, Iterable

from jlora.peft._tensors import MAGNITUDE

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_WRAPPERS = (PREFIX, "base_model.", _COMPILED, "module.")
_PARTS = r"lora_(embedding_)?[AB]|lora_E|vera_([AB]|lambda_[bd])|trainable_tokens_delta"
_PART = rf"{_PARTS}|{MAGNITUDE}"
_NAMED = re.compile(rf"(?P<part>(?:^|.*\.)(?:{_PART}))\.(?P<adapter>[^.]+)(?P<end>\.\w+)?")
_ENDS = ("weight", "bias")


def names_of(keys: Iterable[str], known: Collection[str], call: str) -> dict[str, str]:
    """Return each key's name without prefixes of wrappers (unless `known`) and adapter name."""
    wrappers = [w for w in _WRAPPERS if not any(name.startswith(w) for name in known)]
    compiled = any(f".{_COMPILED}" in name for name in known)
    names, adapters = {}, set()
    for key in keys:
        name = key.removeprefix(PREFIX)
        while wrapper := next((w for w in wrappers if name.startswith(w)), None):
            name = name.removeprefix(wrapper)
        name = name if compiled else name.replace(f".{_COMPILED}", ".")
        named = _NAMED.fullmatch(name)
        if named and named["adapter"] not in _ENDS:
            adapters.add(named["adapter"])
            name = named["part"] + (named["end"] or "")
        names[key] = name
    if len(adapters) > 1:
        raise ValueError(
            f"`{call}`: the keys hold the names of several adapters, {sorted(adapters)}. Save each "
            "alone, `model.save_pretrained(folder, selected_adapters=[...])`."
        )
    for adapter in adapters:
        names = _without_copies(names, adapter)
    first: dict[str, str] = {}
    for key, name in names.items():
        if first.setdefault(name, key) != key:
            raise ValueError(
                f'`{call}`: the keys "{first[name]}" and "{key}" both mean "{name}". Take one out.'
            )
    return names


def _without_copies(names: dict[str, str], adapter: str) -> dict[str, str]:
    """Remove the adapter's name from modules to save unless the result is already taken."""
    taken, stripped = set(names.values()), {}
    for key, name in names.items():
        left = name.replace(f".modules_to_save.{adapter}.", ".")
        stripped[key] = name if left in taken else left
    return stripped


def strange_prefix(names: Collection[str], modules: Collection[str]) -> str:
    """Return the common prefix of all names before a known module, or an empty string."""
    first, *_ = (*names, "")
    parts = first.split(".")
    for k in range(1, len(parts)):
        prefix = ".".join(parts[:k]) + "."
        if not all(name.startswith(prefix) for name in names):
            return ""
        left = first.removeprefix(prefix)
        if any(left.startswith(f"{module}.") for module in modules):
            return prefix
    return ""
