"""A tiny model on disk and in memory, data for it, and one run of the main job that tests share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import finetune
import jax
import llama
import pytest
import weights
from tiny_llama import TINY, write_model


@pytest.fixture
def tiny_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", TINY)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, for tests that only read it."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny", TINY)


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> tuple[llama.Config, Any]:
    """(config, params) of the tiny model."""
    return weights.load(str(tiny_path))[:2]


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty additions, for tests that only read them."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty additions."""
    return write_pairs(tmp_path / "pairs.jsonl")


def write_pairs(path: Path) -> Path:
    lines = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Run(NamedTuple):
    """A finished run: its command line without --out, and where it wrote."""

    flags: list[str]
    out: Path
    exported: Path
    merged: Path


# What changes neither the programs nor the shapes of a run, with the number of its values.
NEUTRAL = {"--out": 1, "--resume": 0, "--overwrite": 0, "--save-every": 1, "--export-peft": 1}
NEUTRAL |= {
    "--export-gguf": 1,
    "--log": 1,
    "--merge": 1,
    "--eval-every": 1,
    "--patience": 1,
    "--seed": 1,
}


def programs_of(flags: Sequence[str]) -> tuple[str, ...]:
    """The flags that the compiled programs depend on."""
    kept, rest = [], list(flags)
    while rest:
        flag = rest.pop(0)
        if flag in NEUTRAL:
            del rest[: NEUTRAL[flag]]
        else:
            kept.append(flag)
    return tuple(kept)


def job_flags(model: Path, file: Path) -> list[str]:
    common = ["--model", str(model), "--data", str(file), "--rank", "4"]
    return [*common, "--steps", "6", "--lr", "0.02"]


@pytest.fixture(scope="session")
def job(tiny_path: Path, sums: Path) -> Callable[..., int]:
    """Run the main job on the tiny model: `job(out, *flags)`; returns the exit status.

    Runs whose programs are the same share them: compiling takes most of the time of a test.
    """
    compile_all, found = finetune.compile_all, {}

    def run(out: Path, *more: str) -> int:
        key = programs_of(more)

        def once(*args: Any) -> Any:
            if key not in found:
                found[key] = compile_all(*args)
            return found[key]

        # Optax's Adam raises a float to an int32 power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "compile_all", once)
            return finetune.main([*job_flags(tiny_path, sums), "--out", str(out), *more])

    return run


@pytest.fixture(scope="session")
def finished(
    job: Any, tiny_path: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run of six steps that was never interrupted, with evaluations and an export."""
    folder = tmp_path_factory.mktemp("finished")
    out, exported, merged = folder / "out", folder / "peft", folder / "merged"
    flags = ["--eval-every", "2", "--export-peft", str(exported), "--merge", str(merged)]
    flags += ["--export-gguf", str(folder / "adapter.gguf")]
    assert job(out, *flags) == 0
    return Run(job_flags(tiny_path, sums), out, exported, merged)
