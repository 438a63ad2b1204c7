"""What a run leaves for people: metrics.jsonl, the plot, report.json."""

import argparse
import contextlib
import hashlib
import itertools
import json
import platform
import re
import statistics
from collections.abc import Callable, Iterable
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from data import Dataset
from matplotlib.figure import Figure
from states import load_notes, write_beside
from training import State, best
from watch import utilization

import jlora

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")
SAMPLE = 1 << 20


def record(schedule: Any, flops: float, state: State, step: int) -> dict[str, Any]:
    """The line of a training step, counted from 1, in metrics.jsonl; `flops` are of a token."""
    seconds = state.seconds[step - 1]
    speed = state.tokens[step - 1] / seconds
    return {
        "step": step,
        "loss": state.losses[step - 1],
        "learning_rate": float(schedule(step - 1)),
        "tokens_per_second": speed,
        "seconds": seconds,
        **utilization(flops, speed),
    }


def evaluation(score: dict[str, Any]) -> dict[str, Any]:
    """The line of an evaluation in metrics.jsonl."""
    rate = {} if score["rate"] is None else {"phoneme_error_rate": score["rate"]}
    measured = {f"held_out_{name}": value for name, value in score.get("measured", {}).items()}
    return {"step": score["step"], "held_out_loss": score["loss"], **rate, **measured}


def records(state: State, record: Callable[[State, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of all steps and evaluations so far, in order."""
    found = [record(state, step) for step in range(1, state.step + 1)]
    return sorted([*found, *map(evaluation, state.evals)], key=lambda line: line["step"])


def lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def plot(path: Path, state: State) -> None:
    """Draw the training loss of each step and the held-out loss of each evaluation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, state.step + 1), state.losses, lw=1, label="training")
    steps, losses = zip(*((e["step"], e["loss"]) for e in state.evals), strict=True)
    axes.plot(steps, losses, "o-", label="held out")
    unit = "DPO loss" if "measured" in state.evals[0] else "loss (nats per token)"
    axes.set(xlabel="step", ylabel=unit, ylim=(0, None))
    axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_beside(path, drawn.getvalue())


def tokens_fingerprint(dataset: Dataset) -> str:
    """The SHA-256 of all examples as tokens: of the data, the tokenizer and the split."""
    if not isinstance(dataset.train, list):
        return dataset.train.sha256
    code = hashlib.sha256()
    for e in itertools.chain(dataset.train, dataset.held_out):
        code.update(np.asarray([len(e.tokens), e.start, *e.tokens], np.int32).tobytes())
    return code.hexdigest()


def counts(dataset: Dataset) -> dict[str, int]:
    """How many examples there are and, of files, how long they are."""
    if not isinstance(dataset.train, list):
        return dataset.train.counts._asdict()
    held_out = len(dataset.held_out)
    return {"examples": len(dataset.train) + held_out, "held_out": held_out}


def files_fingerprint(path: Path) -> str:
    """The SHA-256 of the names, the sizes, and the first and last MiB of a model's files."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files += [path / "config.json", path / "tokenizer.json"] if path.is_dir() else []
    code = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        code.update(f"{file.name} {size} ".encode())
        with file.open("rb") as f:
            code.update(f.read(SAMPLE))
            f.seek(max(0, size - SAMPLE))
            code.update(f.read(SAMPLE))
    return code.hexdigest()


def peak_memory() -> int | None:
    """The most memory that the process has had at once, in bytes; None but on Linux."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return None if found is None else 1024 * int(found[1])


def every_flag(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag of the run, also those that results do not depend on."""
    plain = str | int | float | list | dict | None
    return {k: x if isinstance(x, plain) else str(x) for k, x in vars(args).items()}


def notes_of(out: Path) -> dict[str, Any]:
    """The settings and fingerprints of the run in a directory, as far as they can be read."""
    with contextlib.suppress(ValueError):
        if (notes := load_notes(out / "state")) is not None:
            return notes
    with contextlib.suppress(OSError, ValueError):
        return json.loads((out / "sweep.json").read_text())
    return {}


def versions() -> dict[str, str]:
    """Of Python and the packages that a run depends on."""
    found = {"python": platform.python_version(), "jlora": jlora.__version__}
    return found | {name: metadata.version(name) for name in PACKAGES}


def results(state: State) -> dict[str, Any]:
    """The numbers of a run: "before" is its first evaluation, "after" that of the adapter."""
    before = state.evals[0]
    after = state.evals[-1] if state.best is None else best(state)
    measured = {
        f"{name}_{when}": value
        for when, score in (("before", before), ("after", after))
        for name, value in score.get("measured", {}).items()
    }
    return {
        **measured,
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "phoneme_error_rate_before": before["rate"],
        "phoneme_error_rate_after": after["rate"],
        "steps": state.step,
        "step_of_adapter": after["step"],
        "seconds_per_step": statistics.median(state.seconds),
        "device": jax.devices()[0].device_kind,
    }
