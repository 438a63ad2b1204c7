"""Map leaves to PyTorch parameters: fill in names, unroll stacks, and parse names.

Independent of the file format and the configuration.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jlora._arrays import Geometry
from jlora._paths import brief, describe, near_misses, tells

# A PyTorch parameter name; a name with a "{}" per unrolled leading dimension; or one name per index
# of the leading dimension, if they do not share a pattern.
Name = str | Sequence[Any]
KINDS = ("linear", "Conv1D", "embedding", "conv", "grouped", "parameter")
Names = Mapping[str, Name | None] | Callable[[str], Name | None]


@dataclasses.dataclass(frozen=True)
class Place:
    """One PyTorch parameter, and its leaf and index along the leaf's leading dimensions."""

    path: str
    index: tuple[int, ...]
    name: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The module that owns the parameter: "model.layers.3.self_attn.q_proj"."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The parameter's own name: "weight"."""
        return self.name.rpartition(".")[2]


def places(leaves: Sequence[tuple[str, Any]], names: Names, call: str) -> dict[str, Place]:
    """Return every PyTorch parameter in `names`, by name, in tree order."""
    found: dict[str, Place] = {}
    _check_type(names, "names", call)
    for path, leaf in leaves:
        name = names.get(path) if isinstance(names, Mapping) else names(path)
        if name is None:
            continue
        if not hasattr(leaf, "shape"):
            raise TypeError(
                f"`{call}`: `names` gives {brief(name)} to {describe(path, leaf)}, which is not an "
                "array. Give its path None."
            )
        for index, full in _unroll(name, path, leaf, tuple(leaf.shape), call):
            if full in found:
                raise ValueError(
                    f'`{call}`: `names` gives "{full}" to both "{found[full].path}" and "{path}". '
                    "A PyTorch parameter is one leaf; for tied weights give None to the other."
                )
            found[full] = Place(path, index, full, tuple(leaf.shape[len(index) :]))
    depths: dict[str, int] = {}
    for place in found.values():
        if depths.setdefault(place.path, len(place.index)) != len(place.index):
            raise ValueError(
                f'`{call}`: the names of "{place.path}" unroll another number of dimensions: '
                f"{name_of(names, place.path)!r}. Give each the same number of {{}}."
            )
    return found


def name_of(names: Names, path: str) -> Name | None:
    """Return the entry of `names` for one path."""
    return names.get(path) if isinstance(names, Mapping) else names(path)


def _check_type(by_path: object, argument: str, call: str) -> None:
    """Raise for anything but a mapping; `names` may be a function."""
    function = argument == "names" and callable(by_path)
    if not (function or isinstance(by_path, Mapping)):
        what = "a mapping from path to name, or a function" if argument == "names" else "a mapping"
        raise TypeError(f"`{call}`: `{argument}` is {brief(by_path)}. Give {what}.")


def check_keys(by_path: object, paths: Sequence[str], argument: str, call: str) -> None:
    """Raise if a mapping has a path that is not in the tree."""
    if by_path is not None:
        _check_type(by_path, argument, call)
    if isinstance(by_path, Mapping):
        known = set(paths)
        for path in by_path:
            if path not in known:
                raise KeyError(
                    f'`{call}`: `{argument}` has "{path}", which is no parameter. '
                    f"{near_misses(path, paths)}"
                )


def check_kinds(kinds: Mapping[str, str], call: str) -> None:
    """Raise for an unknown kind."""
    for path, kind in kinds.items():
        if kind not in KINDS:
            raise ValueError(
                f'`{call}`: the kind of "{path}" is {brief(kind)}; give one of {KINDS}.'
            )


def _unroll(
    name: Any, path: str, leaf: Any, shape: tuple[int, ...], call: str
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield (index, filled name) for every element of the leading dimensions a name unrolls."""
    if isinstance(name, str):
        pieces = name.split("{}")
        if len(pieces) - 1 > len(shape):
            raise ValueError(
                f'`{call}`: the name "{name}" unrolls {len(pieces) - 1} dimensions, but '
                f"{describe(path, leaf)} has not that many left."
            )
        for index in itertools.product(*map(range, shape[: len(pieces) - 1])):
            filled = [f"{k}{piece}" for k, piece in zip(index, pieces[1:], strict=True)]
            yield index, "".join([pieces[0], *filled])
    elif isinstance(name, Sequence):
        if not shape or len(name) != shape[0]:
            raise ValueError(
                f"`{call}`: {describe(path, leaf)} has {len(name)} names; give one for each index "
                "of its leading dimension."
            )
        for k, part in enumerate(name):
            for index, full in _unroll(part, path, leaf, shape[1:], call):
                yield (k, *index), full
    else:
        raise TypeError(
            f'`{call}`: `names` gives {brief(name)} for "{path}"; give the PyTorch parameter\'s '
            'name, such as "model.layers.3.self_attn.q_proj.weight", or None.'
        )


def kind_of(place: Place, layout: str | None, kinds: Mapping[str, str]) -> str:
    """Infer what a parameter is in PyTorch from its leaf's name and layout."""
    leaf = place.path.rpartition("/")[2]
    if place.path in kinds:
        return kinds[place.path]
    if "embedding" in leaf:
        return "embedding"
    dims = len(layout) if layout else len(place.shape)
    is_window = layout is None or layout.strip("i") == "o"
    return "conv" if dims in (4, 5) and is_window else "linear"


def geometry_of(place: Place, layout: str | None, kind: str, call: str) -> Geometry:
    """Split the shape of one PyTorch parameter into experts, inputs and outputs."""
    dims = len(place.shape)
    default = None
    if kind in ("conv", "grouped"):
        default = "i" * (dims - 1) + "o"
    elif dims == 2 or (dims == 3 and place.parameter != "weight"):
        default = "io"
    if layout is None and default and not tells(place.path) and _fits_both_ways(place, kind):
        ask_orientation(place, kind, call)
    layout = layout or default
    if layout is None:
        raise ValueError(
            f'`{call}`: which axes of {list(place.shape)} of "{place.path}" are input and which '
            f'output, for "{place.name}"? Give `layouts=jlora.layouts(fn, params, x)`, or '
            f'`layouts={{"{place.path}": "ioo"}}`.'
        )
    window = "i" * (dims - 1)
    if kind in ("conv", "grouped") and layout not in (window + "o", "o" + window):
        raise ValueError(
            f'`{call}`: "{place.path}" is a convolution\'s kernel {list(place.shape)} with the '
            f'layout {brief(layout)}; give "iiio" for HWIO or "oiii" for OIHW. Each stack '
            'dimension needs its {} in the name. If it is no convolution, its `kinds` is "linear".'
        )
    if not 0 <= dims - len(layout) <= 1:
        raise ValueError(
            f'`{call}`: the name "{place.name}" leaves the shape {list(place.shape)} of '
            f'"{place.path}", and the layout {brief(layout)} has {len(layout)} letters. Each stack '
            "dimension needs its {} in the name, but for one of experts in one parameter."
        )
    return Geometry.of(place.shape, layout)


def _fits_both_ways(place: Place, kind: str) -> bool:
    """Whether the shape is the same with outputs first, as in PyTorch and Equinox."""
    shape = place.shape
    if kind in ("conv", "grouped"):
        return shape == (*shape[2:], shape[1], shape[0])
    return kind != "embedding" and shape[-1] == shape[-2]


def ask_orientation(place: Place, kind: str, call: str) -> NoReturn:
    """Raise because neither the leaf's name nor its shape tells which axes are inputs."""
    n = len(place.shape) - 1
    first, last = ("i" * n + "o", "o" + "i" * n) if kind in ("conv", "grouped") else ("io", "oi")
    raise ValueError(
        f'`{call}`: which axes of "{place.path}" {list(place.shape)} are input and which output, '
        f'for "{place.name}"? It may be stored either way round. Give '
        f'`layouts=jlora.layouts(fn, params, x)`, or `layouts={{"{place.path}": "{first}"}}` where '
        f'inputs come first, as in Flax, and "{last}" where outputs do, as in Equinox and PyTorch. '
        f'For an embedding give `kinds={{"{place.path}": "embedding"}}`.'
    )


def is_parameter(place: Place, geometry: Geometry) -> bool:
    """Whether PEFT adapts this through `target_parameters`, not as the weight of a module."""
    return bool(geometry.stack) or place.parameter not in ("weight", "in_proj_weight")


def bias_of(place: Place, found: Mapping[str, Place], call: str) -> Place:
    """Return the bias of the layer with this weight, to which a bias of lora_B is added."""
    name = f"{place.module}.bias"
    if name not in found:
        raise ValueError(
            f'`{call}`: under lora_bias=True lora_B of "{place.module}" has a bias, which is added '
            f'to that of the layer, and `names` names no "{name}". Add it; if the layer has none, '
            "PEFT cannot merge such an adapter either."
        )
    return found[name]


def refuse_variants(
    place: Place, parameter: bool, kind: str, dora: bool, bias: bool, call: str
) -> None:
    """Raise for what PEFT does not support: DoRA or a bias of lora_B outside layers."""
    if dora and bias:
        raise ValueError(f"`{call}`: PEFT has no lora_bias=True together with use_dora=True.")
    if parameter or place.parameter == "in_proj_weight":
        what = "MultiheadAttention" if place.parameter == "in_proj_weight" else "a parameter"
    elif bias and kind == "embedding":
        what = "an embedding"
    else:
        return
    for has, on in (
        ("has no DoRA (use_dora=True)", dora),
        ("trains no bias of lora_B (lora_bias=True)", bias),
    ):
        if on:
            raise ValueError(f'`{call}`: PEFT {has} for {what}, such as "{place.name}".')
