"""Write a folder beside its place and rename it; show the progress; print what was done."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora._disk import replacing
from jlora.cli._safetensors import Target, encoded, syncing, write

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Declare what every verb takes that writes a PEFT folder."""
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it has files")
    parser.add_argument("--dry-run", action="store_true", help="compute, write nothing")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def bytes_of(text: str) -> int:
    """Parse a size: "5GB", "500MB", "1000"."""
    upper = text.strip().upper()
    unit = next((u for u in ("TB", "GB", "MB", "KB", "B") if upper.endswith(u)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"a size is a number with B, KB, MB, GB or TB, as 5GB; got {text!r}")
    return size


def shown(size: float | int) -> str:
    """Print a number of bytes."""
    unit = next(u for u in ("TB", "GB", "MB", "KB", "B") if size >= _UNITS[u] or u == "B")
    return f"{size / _UNITS[unit]:.3g} {unit}"


class Progress:
    """A line on a terminal that tells how many bytes are written."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begun, self._shown = total, 0, time.monotonic(), 0.0
        self._on = sys.stderr.isatty()

    def __call__(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if self._on and (now - self._shown > 0.2 or self._done == self._total):
            self._shown = now
            rate = self._done / max(now - self._begun, 1e-9)
            part = self._done / max(self._total, 1)
            end = "\n" if self._done == self._total else ""
            text = f"\r{part:4.0%}  {shown(self._done)} of {shown(self._total)}, {shown(rate)}/s"
            print(f"{text}  ", end=end, file=sys.stderr, flush=True)


def check_target(out: Path, inputs: list[Path], overwrite: bool, call: str) -> None:
    """Refuse to write over an input, or over anything without being told to."""
    for path in inputs:
        own, other = out.resolve(), path.resolve()
        if own == other or own in other.parents or (other.is_dir() and other in own.parents):
            raise ValueError(
                f"`{call}`: OUT, {out}, is or contains {path}, or is in it. Give another folder."
            )
    if out.exists() and not out.is_dir():
        raise ValueError(f"`{call}`: OUT, {out}, is a file. Give a folder.")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(
            f"`{call}`: OUT, {out}, has files. Give another folder, or `--overwrite` to replace "
            "all of it."
        )


def check_space(out: Path, size: int, call: str) -> None:
    """Refuse to write more than the disk has free."""
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OSError(
            f"`{call}`: {shown(size)} are to be written, and {parent} has {shown(free)} free. "
            "Nothing was written. Give a folder on another disk."
        )


def write_folder(
    out: Path,
    files: Mapping[str, tuple[Mapping[str, Target], Mapping[str, str]]],
    texts: Mapping[str, str],
    copies: list[Path],
    call: str,
) -> None:
    """Write safetensors files, texts and copies; only a complete folder has the name `out`."""
    sizes = [
        len(encoded(targets, metadata)) + sum(t.size for t in targets.values())
        for targets, metadata in files.values()
    ]
    total = sum(sizes) + sum(f.stat().st_size for f in copies)
    check_space(out, total, call)
    progress = Progress(sum(t.size for targets, _ in files.values() for t in targets.values()))
    with replacing(out) as new, syncing() as sync:
        for name, (targets, metadata) in files.items():
            write(new / name, targets, metadata, progress, sync)
        for file in copies:
            shutil.copyfile(file, new / file.name)
            sync(new / file.name)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
            sync(new / name)


def report(said: Mapping[str, Any], as_json: bool, dry: bool = False) -> None:
    """Print what was done, as a table or as JSON."""
    said = {**said, "written": "nothing (--dry-run)"} if dry else said
    if as_json:
        print(json.dumps(said, indent=2))
        return
    for key, value in said.items():
        if isinstance(value, Mapping):
            print(f"{key}:")
            wide = max(map(len, value), default=0)
            for name, x in value.items():
                print(f"  {name:<{wide}}  {x}")
        elif isinstance(value, list):
            print(f"{key}: {', '.join(map(str, value)) or 'none'}")
        else:
            print(f"{key}: {value}")
