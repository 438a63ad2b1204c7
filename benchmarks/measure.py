"""Shared by the benchmarks: interleaved timing, and a record of the machine and the versions."""

import datetime
import importlib.metadata
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "qwix", "quax", "torch", "peft")


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return each run's seconds, one per round. Interleaved, so that the machine's drift cancels.

    The order is shuffled in every round, because what ran before affects caches and memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shuffled = random.Random(0)
    for n in range(rounds + 1):
        for name, run in shuffled.sample(list(runs.items()), len(runs)):
            start = time.perf_counter()
            run()
            if n:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ones: list[float], others: list[float]) -> float:
    """The median over the rounds of one/other."""
    return statistics.median(a / b for a, b in zip(ones, others, strict=True))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def surroundings() -> dict[str, Any]:
    """The date, the machine and the versions: a figure means little without them."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        # Load from other processes: above a few tenths, do not trust absolute times.
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")
