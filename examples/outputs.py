"""Where a run writes: what could fail at its end is found before its first step."""

import argparse
import contextlib
import tempfile
from pathlib import Path

import placing
import weights
from begin import WRITTEN
from card import CARD
from merged import check_source

EXPORTS = ("--export-peft", "--export-gguf", "--merge")
PEFT = {"adapter_config.json", "adapter_model.safetensors", CARD}


def check_outputs(args: argparse.Namespace) -> None:
    """Raise if something cannot be written, or would replace what is there already."""
    paths = (args.out, args.export_peft, args.export_gguf, args.merge)
    given = {f: p for f, p in zip(("--out", *EXPORTS), paths, strict=True) if p is not None}
    for flag, path in given.items():
        if flag != "--export-gguf" and path.exists() and not path.is_dir():
            raise ValueError(f"`{flag} {path}`: this is a file. Name a directory.")
    file, folder = args.export_gguf, args.export_peft
    if file is not None and (file.is_dir() or (file.exists() and not args.resume)):
        raise ValueError(f"`--export-gguf {file}`: it exists. Name a new file.")
    if args.merge is not None:
        check_source(weights.path_of(args.model), args.merge, args.resume)
    found = {x.name for x in folder.iterdir()} if folder is not None and folder.is_dir() else set()
    if found and not (args.resume and {x for x in found if x[0] != "."} <= PEFT):
        raise ValueError(f"`--export-peft {folder}`: there are files in it. Name a new directory.")
    check_apart(given, args.model)
    for flag, path in given.items() if placing.is_first() else ():
        check_writable(flag, path)


def check_apart(given: dict[str, Path], model: str | None) -> None:
    """Raise if an export would replace another one, the run or the model."""
    places = {flag: path.resolve() for flag, path in given.items()}
    exports = [flag for flag in EXPORTS if flag in given]
    places |= {"--model": weights.path_of(model).resolve()} if exports else {}
    for flag in exports:
        path = places[flag]
        # A merged model replaces its directory, with all that is in it.
        clash = [
            other
            for other, at in places.items()
            if other != flag and (at == path or (flag == "--merge" and at.is_relative_to(path)))
        ]
        own = [places["--out"] / name for name in WRITTEN]
        clash += ["--out" for at in own if path.is_relative_to(at)]
        if clash:
            raise ValueError(
                f"`{flag} {given[flag]}`: what is written there would replace files of {clash[0]}. "
                "Name another place."
            )


def check_writable(flag: str, path: Path) -> None:
    """Raise if nothing can be written there; directories that this needs are removed again."""
    folder = path.parent if flag == "--export-gguf" else path
    try:
        created = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for each in created:
                with contextlib.suppress(OSError):  # it was not created
                    each.rmdir()
    except OSError as error:
        raise ValueError(
            f"`{flag} {path}`: it cannot be written ({error.strerror}). Name another place, where "
            "files can be created."
        ) from error
