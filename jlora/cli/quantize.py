"""`jlora quantize BASE OUT --format nf4|int8|q4_1`: store linear layers in 4 or 8 bits.

nf4 and int8: a Hugging Face folder as transformers and bitsandbytes read it. q4_1: a GGUF model as
llama.cpp reads it, from such a folder or from a GGUF file in F32, F16 or BF16. One tensor is in
memory at a time.
"""

import argparse
import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import bitsandbytes, quant
from jlora._paths import near_misses
from jlora.cli._changes import plain
from jlora.cli._checkpoint import CONFIG, EMBEDDINGS, HEADS, INDEX, Checkpoint, open_checkpoint
from jlora.cli._output import Progress, check_space, check_target, report, shown, write_folder
from jlora.cli._safetensors import DTYPES, WEIGHTS, Entry, Target, as_bytes
from jlora.cli._source import bridge
from jlora.quant._quantize import quantize

HELP = "store a model in nf4 or int8 (for transformers) or q4_1 (for llama.cpp)"
_CONV1D = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")
_STATE = 512  # bytes of a quant_state, filled up with spaces
_BLOCK = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("base", type=Path, help="a checkpoint; q4_1: or a .gguf file")
    parser.add_argument("out", type=Path, help="nf4, int8: the new folder; q4_1: the new file")
    parser.add_argument("--format", choices=["nf4", "int8", "q4_1"], required=True)
    parser.add_argument(
        "--targets",
        help="nf4, int8: a regular expression that matches full names; by default all matrices but "
        "those of embeddings and output heads",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(args: argparse.Namespace) -> None:
    """Quantize."""
    call = f"jlora quantize BASE OUT --format {args.format}"
    said = _gguf(args, call) if args.format == "q4_1" else _folder(args, call)
    said = {"base": str(args.base), "out": str(args.out), "format": args.format, **said}
    report(said, args.json, args.dry_run)


def _gguf(args: argparse.Namespace, call: str) -> dict[str, Any]:
    if args.targets is not None:
        raise ValueError(f"`{call}` does not use `--targets`.")
    if args.out.exists() and (args.out.is_dir() or not args.overwrite):
        raise ValueError(f"`{call}`: {args.out} exists. Give another file, or `--overwrite`.")
    if args.base.is_dir():
        return _gguf_of_folder(args, call)
    if not args.base.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {args.base}.")
    if args.base.suffix == ".safetensors":
        raise ValueError(
            f"`{call}`: {args.base} has the weights alone. Pass its folder, {args.base.parent}, "
            "with config.json and tokenizer.json."
        )
    if args.out.resolve() == args.base.resolve():
        raise ValueError(f"`{call}`: OUT, {args.out}, is BASE. Give another file.")
    made = bridge("gguf._requantize", call)
    plan = made.plan_q4_1(args.base, call)
    check_space(args.out, plan.size, call)
    progress = Progress(sum(x[-1] for x in plan.tensors))
    _write_file(args, lambda new: made.write_q4_1(args.base, new, plan, progress))
    kept = len(plan.tensors) - len(plan.chosen)
    return _said(len(plan.chosen), kept, args.base.stat().st_size, plan.size)


def _gguf_of_folder(args: argparse.Namespace, call: str) -> dict[str, Any]:
    checkpoint = open_checkpoint(args.base, call)
    _check_original(checkpoint, call)
    made = bridge("gguf._convert", call)
    parts, chosen = made.plan_folder(checkpoint.config, checkpoint.entries, call)
    header = made.header_of(args.base, checkpoint.config, parts, call)
    size = len(header) + sum(part.size for part in parts)
    check_space(args.out, size, call)
    _write_file(args, lambda new: made.write_model(new, header, parts, Progress(size)))
    old = sum(entry.size for entry in checkpoint.entries.values())
    return _said(len(chosen), len(parts) - len(chosen), old, size)


def _write_file(args: argparse.Namespace, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and rename it."""
    if args.dry_run:
        return
    parent = args.out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".jlora-", dir=parent) as folder:
        new = Path(folder) / args.out.name
        write(new)
        new.replace(args.out)


def _said(chosen: int, kept: int, old: int, new: int) -> dict[str, Any]:
    size = f"{shown(old)} -> {shown(new)}"
    return {"quantized": chosen, "unchanged": kept, "size": size}


def _folder(args: argparse.Namespace, call: str) -> dict[str, Any]:
    check_target(args.out, [args.base], args.overwrite, call)
    checkpoint = open_checkpoint(args.base, call)
    chosen, left = _chosen(checkpoint, args, call)
    parts = _nf4_targets if args.format == "nf4" else _int8_targets
    files: dict[str, Any] = {}
    for file, names in checkpoint.files.items():
        targets: dict[str, Target] = {}
        for name in names:
            entry = checkpoint.entries[name]
            if name in chosen:
                targets |= parts(name, entry)
            else:
                targets[name] = Target(entry.dtype, entry.shape, plain(name, entry, entry.dtype))
        files[file] = (targets, checkpoint.metadata[file])
    dtypes = {DTYPES[checkpoint.entries[name].dtype].name for name in chosen}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    texts = _texts(checkpoint, files, args.format, left, dtype)
    copies = [f for f in checkpoint.carried if f.name not in texts]
    sizes = [sum(e.size for e in checkpoint.entries.values())]
    sizes.append(sum(t.size for targets, _ in files.values() for t in targets.values()))
    if not args.dry_run:
        write_folder(args.out, files, texts, copies, call)
    return {
        "quantized": len(chosen),
        "unchanged": len(checkpoint.entries) - len(chosen),
        "matrices left": left,
        "size": " -> ".join(map(shown, sizes)),
    }


def _check_original(checkpoint: Checkpoint, call: str) -> None:
    if "quantization_config" in checkpoint.config:
        raise ValueError(f"`{call}`: BASE is quantized already. Start from the original weights.")


def _chosen(
    checkpoint: Checkpoint, args: argparse.Namespace, call: str
) -> tuple[set[str], list[str]]:
    """Return the matrices to store in fewer bits, and those that stay as they are."""
    kind = checkpoint.config.get("model_type")
    _check_original(checkpoint, call)
    if not checkpoint.config or kind in _CONV1D:
        why = f"of model_type {kind!r}, whose layers are no `nn.Linear`"
        raise ValueError(f"`{call}`: BASE is {why if kind else 'without a config.json'}.")
    matrices = [
        name
        for name, entry in checkpoint.entries.items()
        if len(entry.shape) == 2 and entry.dtype in WEIGHTS and name.endswith(".weight")
    ]
    try:
        pattern = None if args.targets is None else re.compile(args.targets)
    except re.error as error:
        raise ValueError(
            f"`{call}`: --targets {args.targets!r} is no regular expression: {error}."
        ) from None
    others = {*EMBEDDINGS, *HEADS}
    wanted = [
        name
        for name in matrices
        if (pattern.fullmatch(name) if pattern else not others & set(name.split(".")))
    ]
    step = _BLOCK if args.format == "nf4" else 1
    chosen = {name for name in wanted if checkpoint.entries[name].shape[1] % step == 0}
    if not chosen:
        what = f"matrix of {', '.join(WEIGHTS)}"
        what += f" whose number of columns is a multiple of {step}" * bool(wanted)
        raise ValueError(
            f"`{call}`: there is no {what} to quantize. {near_misses(args.targets or '', matrices)}"
        )
    return chosen, [name for name in matrices if name not in chosen]


@functools.lru_cache(maxsize=1)
def _nf4(name: str, entry: Entry) -> dict[str, np.ndarray]:
    w = jnp.asarray(entry.read().reshape(entry.shape))
    stored = quantize({"w": w}, {"w": quant.NF4(_BLOCK)}, layouts={"w": "oi"})["w"]
    made = bitsandbytes.to_tensors(stored, name)
    state = next(key for key in made if "quant_state" in key)
    made[state] = np.frombuffer(made[state].tobytes().ljust(_STATE), np.uint8)
    return made


def _nf4_targets(name: str, entry: Entry) -> dict[str, Target]:
    blocks = math.prod(entry.shape) // _BLOCK
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("U8", (math.prod(entry.shape) // 2, 1)),
        f"{name}.absmax": ("U8", (blocks,)),
        f"{name}.nested_absmax": ("F32", (-(-blocks // 256),)),
        f"{name}.nested_quant_map": ("F32", (256,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", (_STATE,)),
    }
    return _targets(shapes, lambda: _nf4(name, entry))


@functools.lru_cache(maxsize=1)
def _int8(name: str, entry: Entry) -> dict[str, np.ndarray]:
    w = jnp.asarray(entry.read().reshape(entry.shape)).astype(jnp.float32)
    stored = quantize({"w": w}, {"w": "int8"}, layouts={"w": "oi"})["w"]
    module = name.removesuffix(".weight")
    return {
        name: np.asarray(stored.parts["codes"]),
        f"{module}.SCB": np.asarray(jnp.abs(w).max(-1)),
        f"{module}.weight_format": np.zeros((), np.uint8),  # rows
    }


def _int8_targets(name: str, entry: Entry) -> dict[str, Target]:
    module = name.removesuffix(".weight")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("I8", entry.shape),
        f"{module}.SCB": ("F32", entry.shape[:1]),
        f"{module}.weight_format": ("U8", ()),
    }
    return _targets(shapes, lambda: _int8(name, entry))


def _targets(
    shapes: dict[str, tuple[str, tuple[int, ...]]], made: Callable[[], dict[str, np.ndarray]]
) -> dict[str, Target]:
    """Return tensors that are computed together, when the first of them is written."""

    def pieces(key: str) -> Callable[[], Iterator[memoryview]]:
        return lambda: iter([as_bytes(made()[key])])

    return {key: Target(dtype, shape, pieces(key)) for key, (dtype, shape) in shapes.items()}


def _texts(
    checkpoint: Checkpoint, files: dict[str, Any], format: str, left: list[str], dtype: str
) -> dict[str, str]:
    """Return config.json with what transformers asks for, and the index.

    Products are computed in `dtype`, that of the weights before.
    """
    said: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        f"load_in_{4 if format == 'nf4' else 8}bit": True,
    }
    if format == "nf4":
        said |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        said |= {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8"}
    others = [name.removesuffix(".weight") for name in left]
    said["llm_int8_skip_modules"] = sorted({*others, "lm_head"})
    texts = {
        CONFIG: json.dumps({**checkpoint.config, "quantization_config": said}, indent=2) + "\n"
    }
    if len(files) > 1 or (checkpoint.folder / INDEX).is_file():
        total = sum(t.size for targets, _ in files.values() for t in targets.values())
        weights = {name: file for file, (targets, _) in files.items() for name in targets}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return texts
