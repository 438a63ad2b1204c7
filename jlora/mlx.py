"""Write adapters for MLX-LM: `mlx_lm.generate --model MODEL --adapter-path FOLDER`.

    <module>.lora_a  (in, r)      <module>.lora_b  (r, out)      y += scale · (x a) b

One rank and one scale hold for all modules, so s is multiplied into `lora_b`, the scale is 1, and
smaller ranks are padded with zeros.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from jlora._modules import Module

__all__ = ["save"]

_BLOCK = re.compile(r"(?P<block>.*\blayers\.\d+)\.(?P<inside>.+)")


def __dir__() -> list[str]:
    return __all__


def save(
    directory: str | os.PathLike[str], modules: Sequence[Module], layers: int, model: str = ""
) -> None:
    """Write a LoRA or DoRA as MLX-LM's adapters.safetensors and adapter_config.json.

    Args:
        directory: the folder; it is made if it does not exist.
        modules: the updates, with Hugging Face's names.
        layers: the number of the model's blocks, `num_hidden_layers` of its config.json.
        model: the name of the base, for the configuration.

    Raises:
        ValueError: a module is outside of the blocks, or a convolution; magnitudes in only some
            modules.

    Example:
        >>> import tempfile
        >>> a, b = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
        >>> module = Module("model.layers.0.mlp.up_proj", a, b, 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, [module], layers=1)
        ...     tensors = safetensors.numpy.load_file(f"{folder}/adapters.safetensors")
        >>> {name: x.shape for name, x in sorted(tensors.items())}
        {'model.layers.0.mlp.up_proj.lora_a': (4, 2), 'model.layers.0.mlp.up_proj.lora_b': (2, 6)}

    Reference: mlx-lm's `tuner/lora.py`, `tuner/dora.py` and `tuner/utils.py`.
    """
    call = f"jlora.mlx.save({os.fspath(directory)!r}, modules, layers)"
    inside = {_inside(module, call) for module in modules}
    dora = [module.magnitude is not None for module in modules]
    if any(dora) and not all(dora):
        without = modules[dora.index(False)].name
        raise ValueError(
            f'`{call}`: "{without}" has no magnitude and others have one. MLX-LM has DoRA in all '
            "modules or in none. Merge the adapter, `jlora merge`."
        )
    rank = max(module.rank for module in modules)
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        less = rank - module.rank
        a, b = module.a.astype(np.float32), module.b.astype(np.float32) * np.float32(module.scaling)
        tensors[f"{module.name}.lora_a"] = np.ascontiguousarray(np.pad(a, ((0, less), (0, 0))).T)
        tensors[f"{module.name}.lora_b"] = np.ascontiguousarray(np.pad(b, ((0, 0), (0, less))).T)
        if module.magnitude is not None:
            tensors[f"{module.name}.m"] = module.magnitude.astype(np.float32)
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if any(dora) else "lora",
        "lora_parameters": {"dropout": 0.0, "keys": sorted(inside), "rank": rank, "scale": 1.0},
        "model": model,
        "num_layers": layers,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "adapters.safetensors")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


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
