"""How a comparison is made, and counted for the line at the end of the run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Compare = Callable[..., None]


@pytest.fixture
def compare(record_property: Any) -> Compare:
    """Hold an array to PyTorch's: the norm of the difference over the norm, and count it."""

    def hold(got: Any, want: Any, what: str, most: float = 1e-5) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, what
        size = np.linalg.norm(want)
        error = float(np.linalg.norm(got - want) / size) if size else float(np.abs(got).max())
        if most <= 1e-5:  # not what is only a statistic, or of bfloat16
            record_property("parity", error)
        assert error <= most, f"{what}: {error}"

    return hold
