"""`jlora convert ADAPTER OUT --to gguf|mlx|vllm`: write an adapter in another program's format."""

import argparse
import dataclasses
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._arrays import FullArray, LoraArray
from jlora._disk import replacing
from jlora._modules import Module
from jlora.cli._adapter import Adapter, open_adapter
from jlora.cli._checkpoint import CONFIG, read_json
from jlora.cli._folder import Tree, tree_of, write_adapter
from jlora.cli._output import check_target, report

HELP = "convert an adapter: gguf (llama.cpp), mlx (MLX-LM), vllm (one rank and alpha)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", type=Path, help="a PEFT folder")
    parser.add_argument("out", type=Path, help="gguf: the new file; mlx, vllm: the new folder")
    parser.add_argument("--to", choices=[*FORMATS], required=True)
    parser.add_argument("--base", type=Path, help="gguf, mlx: the folder with its config.json")
    parser.add_argument("--dtype", choices=["float32", "float16"], help="gguf: of A and B")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(args: argparse.Namespace) -> None:
    """Convert."""
    call = f"jlora convert ADAPTER OUT --to {args.to}"
    adapter = open_adapter(args.adapter, call)
    tree, kinds = tree_of(adapter, call)
    for name, node in tree.items():
        if isinstance(node, FullArray):
            raise ValueError(
                f'`{call}`: "{name}" is saved whole, for which the format has no place. Merge the '
                "adapter, `jlora merge BASE ADAPTER OUT`, and convert the result."
            )
    if args.dtype is not None and args.to != "gguf":
        raise ValueError(f"`{call}` does not use `--dtype`.")
    FORMATS[args.to](args, adapter, tree, kinds, call)
    ranks = sorted({node.rank for node in tree.values()})
    said = {"adapter": str(args.adapter), "out": str(args.out), "weights": len(tree)}
    report(said | {"ranks": ranks, "format": args.to}, args.json)


def _gguf(args: Any, adapter: Adapter, tree: Tree, kinds: Any, call: str) -> None:
    gguf = _bridge("gguf", call)
    config = _config(args.base, call)
    if args.out.exists() and (args.out.is_dir() or not args.overwrite):
        raise ValueError(f"`{call}`: {args.out} exists. Give another file, or `--overwrite`.")
    parent = args.out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".jlora-", dir=parent) as folder:
        gguf.save(Path(folder) / args.out.name, modules_of(tree), config, args.dtype or "float32")
        (Path(folder) / args.out.name).replace(args.out)


def _mlx(args: Any, adapter: Adapter, tree: Tree, kinds: Any, call: str) -> None:
    mlx = _bridge("mlx", call)
    config = _config(args.base, call)
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ValueError(f"`{call}`: config.json has no num_hidden_layers. Is it the base's?")
    check_target(args.out, [args.adapter, args.base], args.overwrite, call)
    with replacing(args.out) as new:
        name = adapter.said.get("base_model_name_or_path") or str(args.base)
        mlx.save(new, modules_of(tree), layers, name)


def _vllm(args: Any, adapter: Adapter, tree: Tree, kinds: Any, call: str) -> None:
    """Write one rank and alpha: s in B, smaller ranks padded with zeros."""
    check_target(args.out, [args.adapter], args.overwrite, call)
    rank = max(node.rank for node in tree.values())
    for name, node in tree.items():
        if node.extra:
            raise ValueError(
                f'`{call}`: "{name}" has a magnitude (DoRA), for which vLLM has no form. Merge the '
                "adapter, `jlora merge BASE ADAPTER OUT`, and serve the result."
            )
    write_adapter(args.out, {k: _padded(x, rank) for k, x in tree.items()}, kinds, adapter.said)


FORMATS = {"gguf": _gguf, "mlx": _mlx, "vllm": _vllm}


def _padded(node: LoraArray, rank: int) -> LoraArray:
    """Return a node of this rank whose scaling is 1."""
    less = rank - node.rank
    a = jnp.pad(node.lora_a, [*[(0, 0)] * (node.lora_a.ndim - 1), (0, less)])
    b = jnp.pad(node.lora_b * node.scaling, [(0, less), *[(0, 0)] * (node.lora_b.ndim - 1)])
    return dataclasses.replace(node, lora_a=a, lora_b=b, scaling=jnp.float32(1))


def _bridge(name: str, call: str) -> Any:
    try:
        return import_module(f"jlora.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(f"`{call}` needs {error.name}: `pip install {error.name}`.") from None


def _config(base: Path | None, call: str) -> dict[str, Any]:
    if base is None:
        raise ValueError(f"`{call}` needs `--base`, the folder with the model's config.json.")
    file = base / CONFIG if base.is_dir() else base
    if not file.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {file}.")
    return read_json(file, call)


def modules_of(tree: Tree) -> list[Module]:
    """Return an adapter in the vocabulary of files."""
    modules = []
    for name, node in tree.items():
        a, b = np.asarray(node.lora_a), np.asarray(node.lora_b)
        kind = {"io": "embedding", "oi": "linear"}.get(node.layout, "conv")
        m = node.extra.get("magnitude")
        m = None if m is None else np.asarray(m).reshape(-1)
        s = float(node.scaling)
        modules.append(Module(name.removesuffix(".weight"), np.moveaxis(a, -1, 0), b.T, s, kind, m))
    return modules
