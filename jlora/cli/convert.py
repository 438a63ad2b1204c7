"""`jlora convert ADAPTER OUT --to peft|gguf|mlx|kohya|diffusers|vllm`: another program's format.

The format of ADAPTER is found by its files. A pipeline of diffusers becomes a PEFT folder for each
of its models.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._disk import replacing
from jlora._modules import Module
from jlora.cli._folder import write_adapter
from jlora.cli._output import check_space, check_target, report
from jlora.cli._source import Source, bridge, config_of, open_source, tree_from

HELP = "convert an adapter from and to peft, gguf (llama.cpp), mlx, kohya, diffusers; to vllm"
_FILES = ("gguf", "kohya")  # the others are folders
_UNET = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", type=Path, help="a folder or file of any of these formats")
    parser.add_argument("out", type=Path, help="gguf, kohya: the new file; others: the new folder")
    parser.add_argument("--to", choices=[*FORMATS], required=True)
    parser.add_argument(
        "--base", type=Path, help="gguf, mlx: the folder with its config.json, or a .gguf"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="by default that of ADAPTER"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(args: argparse.Namespace) -> None:
    """Convert."""
    call = f"jlora convert ADAPTER OUT --to {args.to}"
    source = open_source(args.adapter, args.base, call)
    source = source._replace(modules=_cast(source.modules, args.dtype, call))
    inputs = [args.adapter, *([args.base] if args.base is not None else [])]
    if args.to in _FILES:
        if args.out.exists() and (args.out.is_dir() or not args.overwrite):
            raise ValueError(f"`{call}`: {args.out} exists. Give another file, or `--overwrite`.")
    else:
        check_target(args.out, inputs, args.overwrite, call)
    check_space(args.out, sum(m.a.nbytes + m.b.nbytes for m in source.modules), call)
    write = FORMATS[args.to]
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / args.out.name, source, args, call)
    elif args.to in _FILES:
        write(args.out, source, args, call)
    else:
        with replacing(args.out) as new:
            write(new, source, args, call)
    said = {
        "adapter": str(args.adapter),
        "out": str(args.out),
        "weights": len(source.modules),
        "ranks": sorted({module.rank for module in source.modules}),
        "from": source.format,
        "format": args.to,
    }
    report(said, args.json, args.dry_run)


def _cast(modules: list[Module], dtype: str | None, call: str) -> list[Module]:
    if dtype is None:
        return modules
    cast = []
    for module in modules:
        parts: dict[str, Any] = {"a": module.a, "b": module.b, "magnitude": module.magnitude}
        given = {k: x for k, x in parts.items() if x is not None}
        with np.errstate(over="ignore"):
            new: dict[str, Any] = {k: x.astype(jnp.dtype(dtype)) for k, x in given.items()}
        if not all(np.isfinite(x.astype(np.float32)).all() for x in new.values()):
            raise ValueError(
                f'`{call}`: "{module.name}" has values that are not finite in {dtype}. Pass '
                "`--dtype bfloat16`, which has float32's range."
            )
        cast.append(dataclasses.replace(module, **new))
    return cast


def _peft(out: Path, source: Source, args: Any, call: str) -> None:
    """Write one folder, or one for each model of a pipeline."""
    by_model: dict[str, list[Module]] = {}
    for module in source.modules:
        component, _, inside = module.name.partition(".")
        single = source.format in ("peft", "gguf", "mlx") or module.name.startswith(_UNET)
        named = module if single else dataclasses.replace(module, name=inside)
        by_model.setdefault("" if single else component, []).append(named)
    for component, modules in by_model.items():
        tree, kinds = tree_from(modules)
        write_adapter(out / component, tree, kinds, source.said)


def _gguf(out: Path, source: Source, args: Any, call: str) -> None:
    bridge("gguf", call).save(out, source.modules, config_of(args.base, call), args.dtype)


def _mlx(out: Path, source: Source, args: Any, call: str) -> None:
    layers = config_of(args.base, call).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ValueError(f"`{call}`: config.json has no num_hidden_layers. Is it the base's?")
    name = source.said.get("base_model_name_or_path") or str(args.base)
    bridge("mlx", call).save(out, source.modules, layers, name, args.dtype)


def _kohya(out: Path, source: Source, args: Any, call: str) -> None:
    bridge("kohya", call).save(out, _of_pipeline(source.modules))


def _diffusers(out: Path, source: Source, args: Any, call: str) -> None:
    bridge("diffusers", call).save(out, _of_pipeline(source.modules))


def _of_pipeline(modules: list[Module]) -> list[Module]:
    """Put the component first in the names of one model's modules."""

    def named(name: str) -> str:
        if name.startswith("text_model."):
            return f"text_encoder.{name}"
        return f"unet.{name}" if name.startswith(_UNET) else name

    return [dataclasses.replace(module, name=named(module.name)) for module in modules]


def _vllm(out: Path, source: Source, args: Any, call: str) -> None:
    """Write one rank and alpha: s in B, smaller ranks padded with zeros."""
    rank = max(module.rank for module in source.modules)
    padded = []
    for module in source.modules:
        if module.magnitude is not None:
            raise ValueError(
                f'`{call}`: "{module.name}" has a magnitude (DoRA), for which vLLM has no form. '
                "Merge the adapter, `jlora merge BASE ADAPTER OUT`, and serve the result."
            )
        rest = rank - module.rank
        a = np.pad(module.a, [(0, rest), *[(0, 0)] * (module.a.ndim - 1)])
        b = module.b.astype(np.float32) * np.float32(module.scaling)
        b = np.pad(b, [(0, 0), (0, rest), *[(0, 0)] * (b.ndim - 2)])
        padded.append(dataclasses.replace(module, a=a.astype(np.float32), b=b, scaling=1.0))
    tree, kinds = tree_from(padded)
    write_adapter(out, tree, kinds, source.said, args.dtype)


FORMATS = {
    "peft": _peft,
    "gguf": _gguf,
    "mlx": _mlx,
    "kohya": _kohya,
    "diffusers": _diffusers,
    "vllm": _vllm,
}
