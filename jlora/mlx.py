"""Read and write adapters of MLX-LM: `mlx_lm.generate --model MODEL --adapter-path FOLDER`.

    <module>.lora_a  (in, r)      <module>.lora_b  (r, out)      y += scale · (x a) b

One rank and one scale hold for all modules. Where those of the modules differ, s is multiplied into
`lora_b`, the scale is 1, and smaller ranks are padded with zeros.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import _tensor_file
from jlora._disk import replacing_files
from jlora._modules import Module, check_pair, scaled, uses_dora
from jlora._paths import brief, quoted

__all__ = ["load", "save"]

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
_PARTS = ("lora_a", "lora_b", "m")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")

_BLOCK = re.compile(r"(?P<block>.*\blayers\.\d+)\.(?P<inside>.+)")


def __dir__() -> list[str]:
    return __all__


def load(directory: str | os.PathLike[str]) -> list[Module]:
    """Read a LoRA or DoRA of MLX-LM.

    Args:
        directory: a folder with adapters.safetensors and adapter_config.json.

    Returns:
        The updates, by the names in the file; A and B have its dtype.

    Raises:
        ValueError: the files are damaged; fully trained weights; no scale; A or B is missing or has
            another rank; experts, `SwitchLinear`.
        FileNotFoundError: a file is missing.

    Example:
        See `save`.

    Reference: mlx-lm's `tuner/lora.py`, `tuner/dora.py` and `tuner/utils.py`.
    """
    folder = Path(directory)
    call = f"jlora.mlx.load({os.fspath(directory)!r})"
    for file in (folder / TENSORS, folder / CONFIG):
        if not file.is_file():
            raise FileNotFoundError(f"`{call}`: there is no {file}.")
    scale = _scale(folder / CONFIG, call)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, x in _tensor_file.read(folder / TENSORS, call).items():
        name, _, part = key.rpartition(".")
        if part not in _PARTS or not name:
            raise ValueError(
                f"`{call}`: {quoted(key)} is none of <module>.{', '.join(_PARTS)}. Fully trained "
                "weights belong to the model: `mlx_lm.fuse`."
            )
        found.setdefault(name, {})[part] = x
    if not found:
        raise ValueError(f"`{call}`: the file has no tensors.")
    return [_module(name, parts, scale, call) for name, parts in found.items()]


def _scale(file: Path, call: str) -> float:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("fine_tune_type", "lora")
        scale = float(config["lora_parameters"]["scale"]) if kind != "full" else 1.0
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, OverflowError):
        kind, scale = "lora", float("nan")
    if not np.isfinite(scale):
        raise ValueError(
            f'`{call}`: {file.name} is not a JSON object with "lora_parameters" and a finite '
            '"scale" in it. Copy it again.'
        )
    if kind not in ("lora", "dora"):
        raise ValueError(
            f"`{call}`: its fine_tune_type is {brief(kind)}; only lora and dora are adapters. Fuse "
            "the weights into the model: `mlx_lm.fuse`."
        )
    return scale


def _module(name: str, parts: dict[str, np.ndarray], scale: float, call: str) -> Module:
    a, b, m = (parts.get(part) for part in _PARTS)
    if any(x is not None and x.ndim != 2 for x in (a, b)):
        raise ValueError(
            f'`{call}`: "{name}" is a stack of experts, {brief(a if a is not None else b)}. Fuse '
            "it into the model: `mlx_lm.fuse`."
        )
    a, b = (None if x is None else x.T for x in (a, b))
    check_pair(a, b, name, call)
    assert a is not None and b is not None
    if m is not None and m.shape != (len(b),):
        raise ValueError(f'`{call}`: "{name}" has {brief(m)} as m, not ({len(b)},).')
    kind = "embedding" if name.rpartition(".")[2] in _EMBEDDINGS else "linear"
    return Module(name, a, b, scale, kind, m)


def save(
    directory: str | os.PathLike[str],
    modules: Sequence[Module],
    layers: int,
    model: str = "",
    dtype: str | None = None,
) -> None:
    """Write a LoRA or DoRA as MLX-LM's adapters.safetensors and adapter_config.json.

    Args:
        directory: the folder; it is made if it does not exist.
        modules: the updates, with Hugging Face's names.
        layers: the number of the model's blocks, `num_hidden_layers` of its config.json.
        model: the name of the base, for the configuration.
        dtype: "float32", "float16" or "bfloat16"; by default that of the modules, and float32 where
            s is multiplied into B.

    Raises:
        ValueError: a module is outside of the blocks, or a convolution; magnitudes in only some
            modules.

    Example:
        >>> import tempfile
        >>> a, b = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
        >>> module = Module("model.layers.0.mlp.up_proj", a, b, 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, [module], layers=1)
        ...     (module,) = load(folder)
        >>> module.name, module.a.shape, module.b.shape, module.scaling
        ('model.layers.0.mlp.up_proj', (2, 4), (6, 2), 0.5)

    Reference: mlx-lm's `tuner/lora.py`, `tuner/dora.py` and `tuner/utils.py`.
    """
    call = f"jlora.mlx.save({os.fspath(directory)!r}, modules, layers)"
    inside = {_inside(module, call) for module in modules}
    dora = uses_dora(modules, "MLX-LM", call)
    rank, scale = max(module.rank for module in modules), scaled(modules, "scaling")
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        less = rank - module.rank
        a, b = module.a, module.b
        if scale is None:
            a, b = a.astype(np.float32), b.astype(np.float32) * np.float32(module.scaling)
        tensors[f"{module.name}.lora_a"] = np.pad(a, ((0, less), (0, 0))).T
        tensors[f"{module.name}.lora_b"] = np.pad(b, ((0, 0), (0, less))).T
        if module.magnitude is not None:
            tensors[f"{module.name}.m"] = module.magnitude
    if dtype is not None:
        tensors = {key: x.astype(jnp.dtype(dtype)) for key, x in tensors.items()}
    scale = 1.0 if scale is None else scale
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"dropout": 0.0, "keys": sorted(inside), "rank": rank, "scale": scale},
        "model": model,
        "num_layers": layers,
    }
    text = json.dumps(config, indent=2) + "\n"
    with replacing_files(Path(directory), last=CONFIG) as new:
        _tensor_file.write(new / TENSORS, tensors, {"format": "mlx"})
        (new / CONFIG).write_text(text, encoding="utf-8")


def _inside(module: Module, call: str) -> str:
    """Return a module's name within its block."""
    found = _BLOCK.fullmatch(module.name)
    if module.kind != "linear" or found is None:
        where = "is no linear layer" if module.kind != "linear" else "is outside of the blocks"
        raise ValueError(
            f'`{call}`: "{module.name}" {where}, and MLX-LM adapts the linear layers of blocks, '
            "model.layers.<n>. Merge the adapter, `jlora merge`, and convert the result."
        )
    return found["inside"]
