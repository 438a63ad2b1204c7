"""Which weights to adapt and how: `LoraSpec`, and rules from regular expressions to specs."""

import dataclasses
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jlora import forms
from jlora._check_values import check_dtype
from jlora._paths import brief, describe, is_doubtful, near_misses, quoted
from jlora.forms._initial import check_initializer

Slices = tuple[tuple[int, int], ...] | None
Class = TypeVar("Class", bound=type)
_DEFAULT_LAYOUTS = {2: "io", 4: "iiio"}

# The entries of PEFT's `LoraConfig` that have another name or another place here.
_PEFT = {
    "r": "`rank=`",
    "lora_alpha": "`alpha=`",
    "use_rslora": '`scaling="rslora"`',
    "use_dora": "`dora=True`",
    "init_lora_weights": "`init=`, a function of `jlora.initializers`",
    "peft_type": "`form=`",
    "fan_in_fan_out": '`layout="io"`',
    "lora_dropout": "`jlora.lora(fn, dropout=..., key=...)`",
    "dropout": "`jlora.lora(fn, dropout=..., key=...)`",
    "key": "`jlora.attach(params, rules, key=...)`",
    "modules_to_save": 'a rule with the value "full"',
    "bias": 'a rule with the value "full"',
    "task_type": "`jlora.peft.save(..., task_type=...)`",
}
_PEFT |= dict.fromkeys(
    ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "targets"),
    'the keys of the rules, `{r".*/(q|v)_proj/kernel": spec}`',
)
_PEFT |= dict.fromkeys(("rank_pattern", "alpha_pattern"), "a spec for each rule")


def _named_as_in_peft(cls: Class) -> Class:
    """Let an unknown keyword of a dataclass end in an error that says what PEFT's is here."""
    init, fields = cls.__init__, [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in fields:
                here = f"It is {_PEFT[name]} here." if name in _PEFT else near_misses(name, fields)
                raise TypeError(f"`{cls.__name__}({name}=...)`: there is no `{name}`. {here}")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@_named_as_in_peft
@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Specify how a group of weights is adapted: `W + s · A B`, `s = α/r` (or `α/√r`).

    Args:
        rank: r, at least 1; a rank above min(in, out) of a weight is wasteful. PEFT's `r`.
        alpha: α, 16 by default, for any rank. PEFT's `lora_alpha`, whose default is 8.
        scaling: "lora" for s = α/r, "rslora" for s = α/√r (PEFT's `use_rslora`).
        init: a function of `jlora.initializers`, `(key, weight, rank, scaling, dtype) -> (A, B)`,
            or `(A, B, residual)` if A B is part of the weight. `None` is the form's default.
        layout: which axes are input (`i`) and which output (`o`), e.g. "io"; see `attach`.
        dtype: the dtype of A, B and m, a floating type; float32 by default, also for a bfloat16
            base. It is stored by name, so equal specs compare and hash equal.
        slices: `(start, stop)` ranges of the first output dimension, each with its own update;
            outputs outside the ranges have none. For the query and value of a fused kernel of width
            3 · 768: `slices=((0, 768), (1536, 2304))`. loralib's `MergedLinear(enable_lora=...)`.
        dora: also train a magnitude m per output (for all outputs, even with slices), in
            `m · (W + s · A B) / ‖W + s · A B‖`. PEFT's `use_dora`.
        form: the variant, by its name in `jlora.forms`. It defines the update and its trainable
            parts; the default `init` is in parentheses.
            "lora": A and B (`kaiming`).
            "lora_fa": B, with a frozen A (`kaiming`).
            "lora_xs": R, r × r and initially zero, in `W + s · A R B`, between frozen singular
            vectors of W (`lora_xs`).
            "vera": two vectors, initially 0.1 and zero, in `W + s · A Λ_d B Λ_b`, with random A
            and B (`vera`). The paper uses s = 1, `alpha=rank`, and the same A and B for all layers:
            `jlora.tie`.
            "adalora": A, B and r singular values, initially zero, in `W + s · A Λ B` (`adalora`).
            `jlora.optim.adalora` prunes the singular values.
            "mica": A, with a frozen B (`mica`).

    A spec is JSON, as long as `init` is `None` (a function has no JSON): write
    `json.dumps(dataclasses.asdict(spec))`, and read it with `LoraSpec(**json.loads(text))`.

    Raises:
        ValueError: rank below 1, alpha not finite, unknown scaling or form, a layout with letters
            other than i and o, slices that are empty, overlap or are not in increasing order, or
            that the form does not support.
        TypeError: rank not an integer, init not callable as an initializer, dtype not
            floating, dora not a bool.

    Example:
        >>> LoraSpec(rank=8, alpha=16).s
        2.0
        >>> LoraSpec(rank=16, alpha=16, scaling="rslora").s
        4.0

    References: Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023,
    arXiv:2312.03732; Liu et al. 2024, arXiv:2402.09353; Zhang et al. 2023, arXiv:2308.03303;
    Bałazy et al. 2024, arXiv:2405.17604; Kopiczko et al. 2023, arXiv:2310.11454, PEFT's `VERA`;
    Zhang et al. 2023, arXiv:2303.10512, PEFT's `ADALORA`.
    """

    rank: int = 8
    alpha: float | int = 16
    scaling: Literal["lora", "rslora"] = "lora"
    init: forms.Initializer | None = None
    layout: str | None = None
    dtype: DTypeLike = "float32"
    slices: Any = None  # pairs; lists, as JSON has them, become tuples
    dora: bool = False
    form: str = "lora"

    def __post_init__(self) -> None:
        if not hasattr(self.rank, "__index__") or isinstance(self.rank, bool):
            raise TypeError(f"`LoraSpec(rank={brief(self.rank)})`: the rank must be an integer.")
        if not hasattr(self.alpha, "__float__") or getattr(self.alpha, "shape", ()) != ():
            raise TypeError(f"`LoraSpec(alpha={brief(self.alpha)})`: alpha must be a number.")
        # Make these hashable: they may be numbers of NumPy or JAX, or lists from JSON.
        object.__setattr__(self, "rank", operator.index(self.rank))
        if not isinstance(self.alpha, int | float):
            object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "slices", _ranges(self.slices))
        if self.rank < 1:
            raise ValueError(
                f"`LoraSpec(rank={self.rank})`: the rank must be at least 1. "
                "To leave a weight unchanged, map its path to None."
            )
        if not math.isfinite(self.alpha):
            raise ValueError(f"`LoraSpec(alpha={self.alpha})`: alpha must be finite.")
        if self.scaling not in ("lora", "rslora"):
            raise ValueError(
                f'`LoraSpec(scaling={brief(self.scaling)})`: give "lora" (alpha/rank) '
                'or "rslora" (alpha/sqrt(rank)).'
            )
        why = forms.named(self.form, f"LoraSpec(form={brief(self.form)})").refusal("slices")
        if self.slices is not None and why is not None:
            raise ValueError(
                f"`LoraSpec(form={brief(self.form)}, slices=...)`: {why}. "
                'Use the form "lora" for slices, or omit them.'
            )
        if self.init is not None:
            check_initializer(self.init, f"LoraSpec(init={brief(self.init)})")
        if not isinstance(self.dora, bool):
            raise TypeError(f"`LoraSpec(dora={brief(self.dora)})`: give True or False.")
        if self.layout is not None:
            check_layout(self.layout, f"LoraSpec(layout={brief(self.layout)})")
        check_dtype(self.dtype, "LoraSpec(dtype=...)")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)

    @property
    def s(self) -> float:
        """The scaling s: α/r, or α/√r for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


def _ranges(slices: Any) -> Slices:
    """Convert slices to pairs of integers; refuse pairs that overlap or do not increase."""
    if slices is None:
        return None
    try:
        pairs = tuple((operator.index(start), operator.index(stop)) for start, stop in slices)
    except (TypeError, ValueError):
        pairs = ()
    bounds = [n for pair in pairs for n in pair]
    rising = all(start < stop for start, stop in pairs)
    if not bounds or bounds[0] < 0 or not rising or bounds != sorted(bounds):
        raise ValueError(
            f"`LoraSpec(slices={brief(slices)})`: give (start, stop) ranges in increasing "
            "order that do not overlap, e.g. `slices=((0, 768), (1536, 2304))`, or None."
        )
    return pairs


def check_layout(layout: str, call: str) -> None:
    """Refuse a layout that has letters other than i and o, or lacks one of them."""
    if not isinstance(layout, str) or set(layout) != {"i", "o"}:
        raise ValueError(
            f'`{call}`: a layout has one letter per dimension, "i" for input and "o" for output, '
            'and at least one of each: "io" for a Dense kernel, "iiio" for an HWIO convolution, '
            '"ioo" for an attention query. Stack dimensions come first and have no letter.'
        )


def layout_of(path: str, leaf: PyTree, given: str | None, call: str, instead: str) -> str:
    """Return the layout of a weight: the one given for it, or else that of Flax's kernels.

    `instead` is what an error tells to write, apart from `layouts=`.
    """
    default = None if is_doubtful(path) else _DEFAULT_LAYOUTS.get(len(leaf.shape))
    layout = given or default
    if layout is None:
        why = (
            "Equinox and PyTorch store weights of this name (out, in). "
            if is_doubtful(path)
            else ""
        )
        raise ValueError(
            f"`{call}`: it is not known which axes of {describe(path, leaf)} are input and which "
            f"output. {why}Pass `layouts=jlora.layouts(fn, params, x)`, which reads it from the "
            f"model, or {instead}; leading stack dimensions have no letter."
        )
    check_layout(layout, f"{call}: layout {layout!r} of {path!r}")
    if len(layout) > len(leaf.shape):
        raise ValueError(
            f"`{call}`: the layout {layout!r} has {len(layout)} letters, but "
            f"{describe(path, leaf)} has {len(leaf.shape)} dimensions. Give one letter per "
            "dimension."
        )
    return layout


def resolve(rules: Mapping[str, Any], paths: Sequence[str], call: str) -> dict[str, Any]:
    """Return the value of the first matching rule per path; refuse a rule that decides none."""
    check_rules(rules, call, "specs", 'r".*/kernel": jlora.LoraSpec(rank=8)')
    for key, value in rules.items():
        if not (value is None or value == "full" or isinstance(value, LoraSpec)):
            raise TypeError(
                f"`{call}`: the rule {quoted(key)} has the value {brief(value)}; "
                'give a `LoraSpec`, "full" (train it in full) or None (leave it unchanged).'
            )
    return decided(rules, paths, call)


def check_rules(rules: object, call: str, values: str, example: str) -> None:
    """Refuse rules that are no mapping."""
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"`{call}`: pass a mapping from regular expressions to {values}, e.g. "
            f"`{{{example}}}`; got {brief(rules)}."
        )


def decided(rules: Mapping[str, Any], paths: Sequence[str], call: str) -> dict[str, Any]:
    """Return the value of the first rule that matches each path; refuse a rule without a path."""
    compiled = {key: _compile(key, call) for key in rules}
    chosen: dict[str, Any] = {}
    used: set[str] = set()
    first = _first_match(compiled)
    for path in paths:
        key = first(path)
        if key is not None:
            chosen[path] = rules[key]
            used.add(key)
    for key, pattern in compiled.items():
        if key in used:
            continue
        if any(pattern.fullmatch(path) for path in paths):
            raise ValueError(
                f"`{call}`: the rule {quoted(key)} never applies: an earlier rule matches each of "
                "its parameters, and the first match wins. Move it up, or remove it."
            )
        raise ValueError(
            f"`{call}`: the rule {quoted(key)} matches no parameter. Rules are regular expressions "
            f'that must match the full path, e.g. r".*/kernel". {near_misses(key, paths)}'
        )
    return chosen


def _first_match(compiled: Mapping[str, re.Pattern[str]]) -> Callable[[str], str | None]:
    """Return the function from a path to the first key that matches it.

    Keys that are literal paths, such as those of `jlora.peft.rules`, one per leaf, are looked up
    in a dictionary; only the others are tried one by one.
    """
    literal: dict[str, tuple[int, str]] = {}
    tried: list[tuple[int, str]] = []
    for k, key in enumerate(compiled):
        path = re.sub(r"\\(\W)", r"\1", key)
        if re.escape(path) == key or not re.search(r"[^\w/ -]", key):
            literal.setdefault(path, (k, key))
        else:
            tried.append((k, key))

    def first(path: str) -> str | None:
        known = literal.get(path, (len(compiled), None))
        earlier = itertools.takewhile(lambda pair: pair[0] < known[0], tried)
        return next((key for _, key in earlier if compiled[key].fullmatch(path)), known[1])

    return first


def _compile(key: str, call: str) -> re.Pattern[str]:
    try:
        return re.compile(key, re.DOTALL)  # "." matches every character that a key may have
    except re.error as error:
        raise ValueError(
            f"`{call}`: the rule {quoted(key)} is not a regular expression: {error}. "
            'To match such characters themselves use `re.escape`; for a glob\'s "*" write ".*".'
        ) from None
