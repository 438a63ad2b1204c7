"""Places where a run cannot write, or must not, are refused before it trains."""

from pathlib import Path
from typing import Any

import finetune
import pytest
from flags import parse
from outputs import check_outputs


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--out file/run", "`--out file/run`: it cannot be written (Not a directory)"),
        ("--merge file/merged", "`--merge file/merged`: it cannot be written"),
        ("--export-gguf file/a.gguf", "`--export-gguf file/a.gguf`: it cannot be written"),
        ("--export-peft full", "`--export-peft full`: there are files in it. Name a new directory"),
        ("--export-peft full --resume", "there are files in it"),
        ("--merge runs/finetune", "`--merge runs/finetune`: what is written there would replace"),
        ("--merge runs", "would replace files of --out"),
        ("--out a --merge a/state/b", "would replace files of --out"),
        ("--out a --export-peft a", "would replace files of --out"),
        ("--merge b --export-peft b/c", "would replace files of --export-peft"),
        ("--export-peft {model} --resume", "would replace files of --model"),
    ],
)
def test_places_that_are_refused(
    tiny_path: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, flags: str, match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "base"
    model.symlink_to(tiny_path if "model" not in flags else tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("file", "full/notes"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    command = ["--model", str(model), *flags.format(model=model).split()]
    assert finetune.main(command) == 2
    assert match in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_places_that_are_fine(tiny_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Exports may be within the directory of the run; what an interrupted run wrote is replaced."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny_path), "--out", "a", "--merge", "a/merged"]
    flags += ["--export-peft", "a/peft", "--export-gguf", "new/a.gguf"]
    check_outputs(parse(flags))
    assert not [*tmp_path.iterdir()]
    (tmp_path / "a" / "peft").mkdir(parents=True)
    for name in ("adapter_config.json", ".jlora-left"):
        (tmp_path / "a" / "peft" / name).write_text("{}")
    check_outputs(parse([*flags, "--resume"]))
    with pytest.raises(ValueError, match="`--export-peft a/peft`: there are files in it"):
        check_outputs(parse([*flags, "--overwrite"]))
