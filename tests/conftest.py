"""Every test runs with strict dtype promotion and no silent broadcasting."""

import os
from typing import Any

import jax
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up: every model is on disk or built here

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many numbers were held to PyTorch's, and how far the furthest was off."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    errors = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "parity"
    ]
    if errors:
        terminalreporter.write_line(
            f"cases compared: {len(errors)}, worst relative error: {max(errors):.1e}"
        )
