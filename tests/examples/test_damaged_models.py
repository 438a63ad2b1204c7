"""Damaged directories of a model: read right, or refused soon in one paragraph."""

import json
import os
import subprocess
import sys
from pathlib import Path

import damaged_models
import pytest

ROOT = Path(damaged_models.__file__).parents[1]


def read(first: int, count: int) -> list[list]:
    """In a process of its own, whose memory is limited, and which may hang."""
    path = [ROOT, ROOT / "examples", ROOT / "tests"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, damaged_models.__file__, str(first), str(count)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 + count)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    decoder, lines = json.JSONDecoder(), []
    for line in done.stdout.splitlines():
        lines.append([])
        while line := line.strip():
            value, end = decoder.raw_decode(line)
            lines[-1].append(value)
            line = line[end:]
    return lines


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 20), *(pytest.param(k, 204, marks=pytest.mark.nightly) for k in range(20, 1040, 204))],
)
def test_damaged_directories(first: int, count: int) -> None:
    lines = read(first, count)
    assert len(lines) == count
    refused = 0
    for case, *results in lines:
        for said, seconds in results:
            assert said != "other" and not said.startswith("UNEXPECTED"), (case, said)
            assert seconds < damaged_models.SECONDS and "\n" not in said and len(said) < 1000, case
        refused += results[0][0] != "same"
    assert count / 2 < refused < count
