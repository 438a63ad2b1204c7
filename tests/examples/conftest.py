"""A tiny model on disk and in memory, and data for it."""

import json
from pathlib import Path
from typing import Any

import llama
import pytest
import weights
from tiny_llama import TINY, write_model


@pytest.fixture
def tiny_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", TINY)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[llama.Config, Any]:
    """(config, params) of the tiny model."""
    return weights.load(str(write_model(tmp_path_factory.mktemp("tiny"), TINY)))[:2]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty additions."""
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
