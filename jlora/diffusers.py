"""Read and write the LoRA files of diffusers' pipelines, pytorch_lora_weights.safetensors.

    unet.<module>.lora_A.weight  (r, in)        unet.<module>.lora_B.weight  (out, r)

The metadata hold PEFT's configuration of each component: `{"unet.r": 4, "unet.lora_alpha": 8}`.
Without them, and without alphas in the file, s is 1. A file of one model has no component.
"""

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora import _tensor_file
from jlora._disk import replacing_files
from jlora._modules import Module, check_pair, uses_dora
from jlora._paths import brief, quoted

__all__ = ["load", "save"]

NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_COMPONENTS = r"unet|transformer(_\d)?|text_encoder(_\d)?|prior|decoder|controlnet"
# Three spellings, of which the last two are those of releases before PEFT's.
_KEY = re.compile(
    r"(?P<module>.+?)(?P<old>\.to_(?:q|k|v|out)_lora)?"
    r"\.(?:(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"|(?:lora\.|lora_linear_layer\.)?(?P<side>down|up)|(?P<alpha>alpha))(?:\.weight)?"
)
_PART = {"down": "a", "up": "b", "lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}
_PART |= {"lora_embedding_A": "a", "lora_embedding_B": "b"}


def __dir__() -> list[str]:
    return __all__


def load(path: str | os.PathLike[str]) -> list[Module]:
    """Read a LoRA or DoRA of a pipeline or of one model.

    Args:
        path: a .safetensors file, or a folder with pytorch_lora_weights.safetensors.

    Returns:
        The updates by the names in the file, in PEFT's spelling; A and B have the file's dtype.

    Raises:
        ValueError: the file is damaged; a key of another kind, such as a bias; A or B is missing
            or has another rank; metadata whose alpha is no number.
        FileNotFoundError: there is no such file.

    Example:
        See `save`.

    Reference: diffusers' `loaders/lora_base.py` and `utils/state_dict_utils.py`.
    """
    call = f"jlora.diffusers.load({os.fspath(path)!r})"
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {file}.")
    tensors, metadata = _tensor_file.read_all(file, call)
    said = _said(metadata, call)
    found: dict[str, dict[str, np.ndarray]] = {}
    embeddings = set()
    for key, x in tensors.items():
        name, part = _parsed(key, call)
        if part in found.setdefault(name, {}):
            raise ValueError(f'`{call}`: {quoted(key)} is a second "{part}" of {quoted(name)}.')
        found[name][part] = x
        embeddings |= {name} if "lora_embedding" in key else set()
    if not found:
        raise ValueError(f"`{call}`: the file has no tensors.")
    return [_module(name, parts, said, name in embeddings, call) for name, parts in found.items()]


def _said(metadata: Mapping[str, str], call: str) -> dict[str, Any]:
    try:
        said = json.loads(metadata.get(_METADATA, "{}"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f'`{call}`: the metadata "{_METADATA}" are not a JSON object.')
    return said


def _parsed(key: str, call: str) -> tuple[str, str]:
    """Return the module of a key, and "a", "b", "m" (magnitude) or "alpha"."""
    found = _KEY.fullmatch(key.replace(".processor.", ".")) if len(key) < 1000 else None
    if found is None:
        raise ValueError(
            f"`{call}`: {quoted(key)} is neither A, B, a magnitude nor an alpha of diffusers. "
            "Biases and other methods have no form here; merge them with diffusers, `fuse_lora`."
        )
    module, old = found["module"], found["old"]
    if old is not None:  # of a processor of attention, before PEFT
        side = old.removesuffix("_lora").removeprefix(".to_")
        own = f"to_{side}.0" if side == "out" else f"to_{side}"
        module += f".{side}_proj" if module.startswith("text_encoder") else f".{own}"
    if found["alpha"]:
        return module, "alpha"
    return module, _PART[found["part"] or found["side"]]


def _module(
    name: str, parts: Mapping[str, np.ndarray], said: Mapping[str, Any], embeds: bool, call: str
) -> Module:
    a, b = parts.get("a"), parts.get("b")
    rank = check_pair(a, b, name, call)
    assert a is not None and b is not None
    m = parts.get("m")
    if m is not None and m.size != len(b):
        raise ValueError(f'`{call}`: "{name}" has {brief(m)} as magnitude, not ({len(b)},).')
    kind = "embedding" if embeds else "conv" if a.ndim > 2 else "linear"
    scaling = _scaling(name, rank, parts.get("alpha"), said, call)
    return Module(name, a, b, scaling, kind, None if m is None else m.reshape(-1))


def _scaling(
    name: str, rank: int, alpha: np.ndarray | None, said: Mapping[str, Any], call: str
) -> float:
    """Return s: of the metadata, else of the alpha in the file, else 1."""
    value: Any = rank if alpha is None else alpha.reshape(-1)[0] if alpha.size == 1 else None
    own, root = _config(name, said)
    if "lora_alpha" in own:
        inside = name.removeprefix(root)
        patterns = own.get("alpha_pattern") or {}
        value = own["lora_alpha"]
        for key, other in patterns.items() if isinstance(patterns, dict) else ():
            if inside == key or inside.endswith(f".{key}"):
                value = other
                break
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(f"`{call}`: the alpha of {quoted(name)} is not one finite number.")
    return value / (rank**0.5 if own.get("use_rslora") is True else rank)


def _config(name: str, said: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the configuration of a module's component, and the component with its dot."""
    component = name.partition(".")[0] + "."
    own = {k.removeprefix(component): v for k, v in said.items() if k.startswith(component)}
    return (own, component) if own else (dict(said), "")


def save(path: str | os.PathLike[str], modules: Sequence[Module]) -> None:
    """Write a LoRA or DoRA as `pipeline.load_lora_weights(path)` reads it.

    Args:
        path: a folder, which is made if it does not exist, or a .safetensors file.
        modules: the updates, by diffusers' names with the component first, as from `load`.

    Raises:
        ValueError: the first part of a name is no component of a pipeline; magnitudes in only some
            modules of a component.

    Example:
        >>> import tempfile
        >>> a, b = np.ones((2, 4), np.float16), np.ones((6, 2), np.float16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, [Module("unet.mid_block.attentions.0.proj_in", a, b, 0.5)])
        ...     (module,) = load(folder)
        >>> module.name, module.scaling
        ('unet.mid_block.attentions.0.proj_in', 0.5)

    Reference: diffusers' `save_lora_weights`.
    """
    call = f"jlora.diffusers.save({os.fspath(path)!r}, modules)"
    tensors: dict[str, np.ndarray] = {}
    by_component: dict[str, list[Module]] = {}
    for module in modules:
        component, _, inside = module.name.partition(".")
        if re.fullmatch(_COMPONENTS, component) is None or not inside:
            raise ValueError(
                f'`{call}`: "{module.name}" does not begin with a component of a pipeline, such as '
                "unet or text_encoder."
            )
        by_component.setdefault(component, []).append(module)
        middle = "lora_embedding_{}" if module.kind == "embedding" else "lora_{}.weight"
        tensors[f"{module.name}.{middle.format('A')}"] = module.a
        tensors[f"{module.name}.{middle.format('B')}"] = module.b
        if module.magnitude is not None:
            shape = (1, -1, 1, 1) if module.kind == "conv" else (-1,)
            tensors[f"{module.name}.lora_magnitude_vector"] = module.magnitude.reshape(shape)
    said = {
        f"{component}.{key}": value
        for component, own in by_component.items()
        for key, value in _describe(component, own, call).items()
    }
    file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / NAME
    text = json.dumps(said, indent=2, sort_keys=True)
    with replacing_files(file.parent) as new:
        _tensor_file.write(new / file.name, tensors, {_METADATA: text})


def _describe(component: str, modules: Sequence[Module], call: str) -> dict[str, Any]:
    """Return PEFT's configuration: the commonest rank and alpha, and patterns for the others."""
    inside = [module.name.removeprefix(f"{component}.") for module in modules]
    rank = statistics.mode(sorted(m.rank for m in modules))
    alpha = statistics.mode(sorted(m.alpha for m in modules))
    dora = uses_dora(modules, "PEFT", call)
    named = list(zip(inside, modules, strict=True))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: m.rank for name, m in named if m.rank != rank},
        "alpha_pattern": {name: m.alpha for name, m in named if m.alpha != alpha},
        "target_modules": sorted(inside),
        "use_dora": dora,
    }
