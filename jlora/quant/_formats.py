"""The table of formats by name, and what a rule's value means."""

from collections.abc import Mapping
from typing import Any

from jlora._paths import brief, near_misses, quoted
from jlora.quant._format import Format
from jlora.quant.ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from jlora.quant.ggml_k import Q4_K, Q5_K, Q6_K
from jlora.quant.int4 import Int4
from jlora.quant.int8 import Int8
from jlora.quant.nf4 import NF4

GGML = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)
FORMATS: dict[str, Format] = {x.name: x for x in (Int8(), Int4(), NF4(), *GGML)}


def format_of(key: str, value: Any, call: str) -> Format | None:
    """Return the format that a rule's value means: a format, its name, or None."""
    if value is None:
        return None
    if isinstance(value, str):
        if value not in FORMATS:
            raise ValueError(
                f"`{call}`: the rule {quoted(key)} has the value {quoted(value)}, which is no "
                f"format. {near_misses(value, FORMATS)}"
            )
        return FORMATS[value]
    if isinstance(value, type) or not isinstance(value, Format):
        raise TypeError(
            f"`{call}`: the rule {quoted(key)} has the value {brief(value)}; give a format, such "
            'as `jlora.quant.NF4(block=64)`, its name, such as "nf4", or None (leave it dense).'
        )
    return value


def read_format(name: str, settings: Mapping[str, Any]) -> Format:
    """Return the format of a name with these settings, as a file keeps them."""
    if name not in FORMATS:
        raise ValueError(
            f"`jlora.quant`: there is no format {quoted(name)}. {near_misses(name, FORMATS)} Read "
            "the file with the version of jlora that wrote it."
        )
    return type(FORMATS[name])(**settings) if settings else FORMATS[name]
