"""Adapters of any format as modules; the format is found by the files."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora._arrays import FullArray, LoraArray
from jlora._modules import Module
from jlora.cli._adapter import Adapter, check_finite, open_adapter
from jlora.cli._checkpoint import CONFIG, read_json
from jlora.cli._folder import Tree, tree_of
from jlora.cli._safetensors import header
from jlora.peft._config import CONFIG as ENTRIES
from jlora.peft._config import TENSORS
from jlora.peft._spell import PREFIX

_MLX, _DIFFUSERS = "adapters.safetensors", "pytorch_lora_weights.safetensors"
_LAYOUTS = {"io": "embedding", "oi": "linear"}


class Source(NamedTuple):
    """What was read."""

    format: str
    modules: list[Module]
    said: dict[str, Any]  # entries of PEFT's configuration


def open_source(path: Path, base: Path | None, call: str) -> Source:
    """Read an adapter."""
    found = format_of(path, call)
    if found == "peft":
        adapter = open_adapter(path, call)
        return Source(found, _of_peft(adapter, "", call), dict(adapter.said))
    if found == "peft, a folder for each model":
        modules = [
            module
            for folder in _components(path)
            for module in _of_peft(open_adapter(folder, call), f"{folder.name}.", call)
        ]
        return Source(found, modules, {})
    read = bridge(found, call).load
    modules = read(path, config_of(base, call)) if found == "gguf" else read(path)
    check_finite({f"{m.name}, {x}": getattr(m, x) for m in modules for x in "ab"}, path, call)
    return Source(found, modules, {})


def format_of(path: Path, call: str) -> str:
    """Tell the format of a folder or file."""
    if path.is_dir():
        if (path / _MLX).is_file():
            return "mlx"
        if (path / _DIFFUSERS).is_file():
            return "diffusers"
        if not (path / ENTRIES).is_file() and not (path / TENSORS).is_file() and _components(path):
            return "peft, a folder for each model"
        return "peft"
    if not path.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {path}.")
    begins = _begins(path)
    if begins[:4] == b"GGUF":
        return "gguf"
    if begins == b"\x89HDF\r\n\x1a\n":
        raise ValueError(
            f"`{call}`: {path.name} is a file of Keras, which numbers the layers of its model and "
            "does not name them. Read it in Python, with the model: `jlora.keras.load`."
        )
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`{call}`: {path.name} is neither .safetensors nor GGUF. Give a folder of PEFT, "
            "MLX-LM or diffusers, a .gguf file, or a .safetensors file of kohya or diffusers."
        )
    names = header(path, call)[0]
    if any(name.startswith(PREFIX) for name in names):
        raise ValueError(
            f"`{call}`: {path} is a file of PEFT, and its alpha is in {ENTRIES}. Pass the folder, "
            f"{path.parent}."
        )
    kohya = any(".lora_down." in name or name.startswith("lora_") for name in names)
    return "kohya" if kohya else "diffusers"


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _components(path: Path) -> list[Path]:
    """Return the sub-folders that are PEFT's."""
    return [f for f in sorted(path.iterdir()) if (f / ENTRIES).is_file()]


def _of_peft(adapter: Adapter, prefix: str, call: str) -> list[Module]:
    tree, _ = tree_of(adapter, call)
    for name, node in tree.items():
        if isinstance(node, FullArray):
            raise ValueError(
                f'`{call}`: "{name}" is saved whole, for which the format has no place. Merge the '
                "adapter, `jlora merge BASE ADAPTER OUT`, and convert the result."
            )
    dtypes = {x.dtype for x in adapter.tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 and adapter.config.form == "lora" else np.float32
    return [_module(prefix + name, node, dtype) for name, node in tree.items()]


def _module(name: str, node: LoraArray, dtype: Any) -> Module:
    a, b = np.asarray(node.lora_a).astype(dtype), np.asarray(node.lora_b).astype(dtype)
    kind, s = _LAYOUTS.get(node.layout, "conv"), float(node.scaling)
    m = node.extra.get("magnitude")
    m = None if m is None else np.asarray(m).astype(dtype).reshape(-1)
    if kind == "conv":
        a, b = np.moveaxis(a, -1, 0), b.T.reshape(-1, len(b), *[1] * (a.ndim - 2))
        return Module(name.removesuffix(".weight"), a, b, s, kind, m)
    return Module(name.removesuffix(".weight"), a.T, b.T, s, kind, m)


def tree_from(modules: Sequence[Module]) -> tuple[Tree, dict[str, str]]:
    """Return modules as nodes, and the kinds of those that are not linear layers."""
    tree: Tree = {}
    kinds: dict[str, str] = {}
    for module in modules:
        a, b = jnp.asarray(module.a), jnp.asarray(module.b).reshape(len(module.b), -1)
        layout = "io" if module.kind == "embedding" else "o" + "i" * (a.ndim - 1)
        m = {} if module.magnitude is None else {"magnitude": jnp.asarray(module.magnitude)}
        a, s = jnp.moveaxis(a, 0, -1), jnp.float32(module.scaling)
        name = f"{module.name}.weight"
        tree[name] = LoraArray(None, a, b.T, s, layout, extra=m)
        kinds |= {} if module.kind == "linear" else {name: module.kind}
    return tree, kinds


def bridge(name: str, call: str) -> Any:
    """Import a bridge, or tell what it needs."""
    try:
        return import_module(f"jlora.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(f"`{call}` needs {error.name}: `pip install {error.name}`.") from None


def config_of(base: Path | None, call: str) -> dict[str, Any]:
    """Read the base's config.json, or the metadata of a GGUF model."""
    if base is None:
        raise ValueError(f"`{call}` needs `--base`, the folder with the model's config.json.")
    file = base / CONFIG if base.is_dir() else base
    if not file.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {file}.")
    if _begins(file)[:4] == b"GGUF":
        return bridge("gguf._entries", call).model_config(file, call)
    return read_json(file, call)
