"""PEFT's folders by the names in the files: what they change in the tensors of a checkpoint.

The tensors of a checkpoint take the place of a model's parameters, in PyTorch's orientation, so the
checks of `jlora.peft.load` hold here too: every key of the file is used, or an error lists it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import forms
from jlora._arrays import LoraArray
from jlora._paths import quoted
from jlora._tensor_file import read
from jlora.cli._changes import Change, Gain, Product, seen
from jlora.cli._checkpoint import Checkpoint, read_json
from jlora.cli._conv1d import Conv1D
from jlora.cli._experts import Experts, check_single
from jlora.cli._renames import renaming
from jlora.cli._safetensors import WEIGHTS
from jlora.peft._assign import Assignment, Plan, assign
from jlora.peft._config import CONFIG, PICKLE, TENSORS, Config, check_init, parse
from jlora.peft._initial import REPEATED
from jlora.peft._keys import BIAS, TOKENS, Found
from jlora.peft._match import is_saved
from jlora.peft._methods import Read, as_lora, with_extra
from jlora.peft._names import Place
from jlora.peft._spell import names_of
from jlora.peft._tensors import MAGNITUDE, PARTS, from_torch

_HEADS = ("classifier", "score")  # saved by PEFT for classification tasks without being listed
_ENDINGS = [e for parts in PARTS.values() for e in parts.values()] + [MAGNITUDE, BIAS, TOKENS]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One folder: its configuration, as checked and as written, and its tensors."""

    folder: Path
    config: Config
    said: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]


def open_adapter(folder: Path, call: str) -> Adapter:
    """Read a folder's two files; refuse what would compute something else."""
    if folder.is_file():
        raise ValueError(
            f"`{call}`: {folder} is a file. Pass its folder, {folder.parent}, which has {CONFIG}."
        )
    if not (folder / TENSORS).is_file():
        hint = f" {PICKLE} is a pickle, which is never loaded." * (folder / PICKLE).is_file()
        raise FileNotFoundError(f"`{call}`: there is no {folder / TENSORS}.{hint}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"`{call}`: there is no {folder / CONFIG}, so alpha is not known. Copy it too."
        )
    said = read_json(folder / CONFIG, call)
    config = parse(said, call)
    check_init(config, call)
    if str(config.init_lora_weights).lower() in REPEATED:
        raise ValueError(
            f"`{call}`: {folder.name} began with init_lora_weights="
            f"{config.init_lora_weights!r}, whose base is not the model's weights but what they "
            "leave. Convert it to LoRA: `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)` of PEFT, or "
            "`jlora.arithmetic.residual_to_lora`."
        )
    tensors = read(folder / TENSORS, call)
    check_finite(tensors, folder, call)
    return Adapter(folder, config, said, tensors)


def check_finite(tensors: Mapping[str, np.ndarray], path: Path, call: str) -> None:
    """Refuse NaNs and infinities: what is made of them is no model."""
    for name, x in tensors.items():
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x).all():
            raise ValueError(
                f"`{call}`: {quoted(name)} in {path.name} has values that are not finite (NaN or "
                "infinity): its training diverged, or the file is damaged. Use an earlier adapter."
            )


def all_weighted(texts: Sequence[str], call: str) -> list[tuple[Path, float]]:
    """Split every "folder=0.3"; refuse one folder twice."""
    given = [weighted(text) for text in texts]
    seen = set()
    for path, _ in given:
        if path.resolve() in seen:
            raise ValueError(
                f"`{call}`: {path} is given twice. Give it once, with the sum of its weights."
            )
        seen.add(path.resolve())
    return given


def weighted(text: str) -> tuple[Path, float]:
    """Split "folder=0.3"; a folder whose name has "=" is found first."""
    folder, equals, number = text.rpartition("=")
    if Path(text).exists() or not equals:
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not np.isfinite(weight):
        raise ValueError(
            f"`jlora`: {text!r} is neither a folder nor a folder with a weight, as math=0.3."
        )
    return Path(folder), weight


@dataclasses.dataclass(frozen=True)
class Places:
    """The tensors of a checkpoint under the names that an adapter gives them.

    Attributes:
        found: the places and their layouts, as `jlora.peft` reads them.
        added: tensors that the checkpoint lacks: by name, where their values begin, or None.
    """

    found: Found
    added: Mapping[str, str | None]


def places_of(adapter: Adapter, checkpoint: Checkpoint, call: str) -> Places:
    """Name every tensor as the adapter does."""
    names = names_of(adapter.tensors, checkpoint.entries, call)
    modules = {module_of(name): key for key, name in names.items()}
    check_single(modules, checkpoint, call)
    rename = renaming(modules, checkpoint, call)
    stored = {rename(key) for key in checkpoint.entries}
    shapes = {key: entry.shape for key, entry in checkpoint.entries.items()}
    added: dict[str, str | None] = {}
    for name, key in {name: key for key, name in names.items()}.items():
        module = module_of(name)
        full = name if not is_lora(name) else f"{module}.weight"
        if full in checkpoint.entries or full in stored:
            continue
        source = checkpoint.tied_to(full)
        saved = is_saved(adapter.config.modules_to_save, module)
        if source is not None:
            added[full], shapes[full] = source, shapes[source]
        elif not is_lora(name) and (saved or _is_head(adapter, module)):
            added[full], shapes[full] = None, adapter.tensors[key].shape
    found, layouts, kinds = {}, {}, {}
    by_module: dict[str, dict[str, np.ndarray]] = {}
    for key, name in names.items():
        by_module.setdefault(module_of(name), {})[name] = adapter.tensors[key]
    named = {key: key if key in added else rename(key) for key in shapes}
    by_name = {named[key]: shape for key, shape in shapes.items()}
    experts, conv1d = Experts(by_name, by_module, call), Conv1D(by_name, by_module, call)
    for key, shape in shapes.items():
        name = named[key]
        found[name] = Place(key, (), name, tuple(shape))
        layout, kind = _layout(adapter, name, shape, by_module, experts, conv1d)
        layouts |= {key: layout} if layout else {}
        kinds |= {key: kind} if kind else {}
    return Places(Found(found, layouts, kinds), added)


def is_lora(name: str) -> bool:
    return any(name.endswith(f".{ending}") for ending in (*_ENDINGS, f"{MAGNITUDE}.weight")) or (
        name.rpartition(".")[2] in ("lora_A", "lora_B", "lora_E")
        or name.rpartition(".")[2].startswith("vera_")
    )


def module_of(name: str) -> str:
    """Return the module of a key, without the endings of A and B."""
    for ending in (*_ENDINGS, f"{MAGNITUDE}.weight"):
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}").replace(".base_layer", "")
    return name.rpartition(".")[0].replace(".base_layer", "")


def _is_head(adapter: Adapter, module: str) -> bool:
    task = adapter.config.task_type or ""
    return task.endswith("_CLS") and any(part in _HEADS for part in module.split("."))


def _layout(
    adapter: Adapter,
    name: str,
    shape: tuple[int, ...],
    by_module: Mapping[str, Any],
    experts: Experts,
    conv1d: Conv1D,
) -> tuple[str | None, str | None]:
    """Return a tensor's layout and kind: outputs come first but in embeddings and Conv1D."""
    if len(shape) < 2:
        return None, None
    module, _, own = name.rpartition(".")
    tensors = by_module.get(module, {})
    if own not in ("weight", "in_proj_weight"):
        return experts.layout(name), None if len(shape) < 4 else "parameter"
    if f"{module}.lora_embedding_A" in tensors:
        return "io", "embedding"
    a, b = (tensors.get(f"{module}.lora_{x}.weight") for x in "AB")
    if a is None or b is None or len(shape) > 2:
        return "o" + "i" * (len(shape) - 1), None if a is not None else "parameter"
    turned = (b.shape[0], a.shape[-1]) == shape[::-1]
    if turned and shape[0] == shape[1]:
        turned = adapter.said.get("fan_in_fan_out") is True and conv1d.has(module, shape[0])
    return ("io", "Conv1D") if turned else ("oi", None)


def changes_of(
    adapter: Adapter, weight: float, checkpoint: Checkpoint, call: str
) -> tuple[dict[str, Change], Places]:
    """Return what an adapter, times a weight, changes, by the checkpoint's names."""
    places = places_of(adapter, checkpoint, call)
    method = as_lora(adapter.tensors, adapter.config, places.found, call)
    plan = assign(method.tensors, adapter.config, places.found, (), call)
    made: dict[str, Change] = {}
    of = lambda path: made.setdefault(path, Change())
    for path, (one,) in plan.lora.items():
        _add_lora(of(path), one, method, weight, adapter, call)
    for path, (one,) in plan.full.items():
        value = one.tensors["value"].reshape(one.place.shape)
        of(path).values.append((weight, value))
        of(path).labels.append("replaced" if weight == 1 else "interpolated")
    for one in plan.biases:
        vector = one.tensors["value"].astype(np.float32) * np.float32(weight * one.scaling)
        of(one.place.path).added.append(vector)
        of(one.place.path).labels.append("biases of lora_B")
    for one in plan.tokens:
        of(one.place.path).rows.append((weight, np.asarray(one.indices), one.rows))
        of(one.place.path).labels.append("rows of tokens")
    _check(made, plan, places, checkpoint, call)
    return made, places


def node_of(one: Assignment, method: Read) -> LoraArray:
    """Return an adapted tensor as a node, without its base."""
    parts = from_torch(one.tensors, one.geometry, one.kind)
    parts = {name: jnp.asarray(x, jnp.float32) for name, x in parts.items()}
    s, layout = jnp.float32(one.scaling), one.geometry.layout
    node = LoraArray(None, None, None, s, layout, one.slices).with_parts(parts)
    return with_extra(node, [one.place], method, jnp.float32)


def _add_lora(
    change: Change, one: Assignment, method: Read, weight: float, adapter: Adapter, call: str
) -> None:
    node = node_of(one, method)
    has_gain = forms.has_gain(node)
    if has_gain and weight != 1:
        raise ValueError(
            f"`{call}`: {adapter.folder.name} uses DoRA, whose update is not A B alone, so it "
            f"cannot be added with the weight {weight:g}. Merge it alone, with the weight 1."
        )
    layout, (stack, _, _) = node.layout, seen(one.place.shape, node.layout)
    a, b = (np.asarray(x, np.float32) for x in forms.factors(node, one.place.shape))
    ranks = a.shape[-1]
    a = a.reshape(stack, -1, ranks)
    b = b.reshape(stack, ranks, -1) * np.float32(one.scaling) * np.float32(weight)
    if layout[0] == "o":
        change.products.append(Product(b.swapaxes(1, 2), a.swapaxes(1, 2)))
    else:
        change.products.append(Product(a, b))
    if has_gain:
        m = np.asarray(node.extra["magnitude"]).reshape(-1)
        change.gain = Gain(m, of_rows=layout[0] == "o")
    change.labels.append("low-rank" + (" with a magnitude (DoRA)" if has_gain else ""))


def _check(
    made: Mapping[str, Change], plan: Plan, places: Places, checkpoint: Checkpoint, call: str
) -> None:
    """Refuse packed weights, and an adapter of other base weights."""
    for path, change in made.items():
        entry = checkpoint.entries.get(places.added.get(path) or path)
        if entry is not None and entry.dtype not in WEIGHTS and not change.is_replaced:
            raise ValueError(
                f'`{call}`: "{path}" is stored as {entry.dtype}, quantized, and an update cannot '
                "be added to codes. Merge into the original weights, and quantize the result."
            )
    for one in plan.base:
        path = one.place.path
        entry = checkpoint.entries[places.added.get(path) or path]
        ours = entry.read().reshape(entry.shape)
        if not np.array_equal(ours, one.tensors["value"].astype(ours.dtype)):
            raise ValueError(
                f"`{call}`: the adapter's file also holds the base weight of "
                f'"{one.place.module}", and it differs from that of "{one.place.path}": the '
                "adapter was trained on other weights."
            )
