"""The example of a quantized base, on a tiny model."""

import re
from pathlib import Path

import jax
import pytest
import qlora


@pytest.mark.nightly
def test_it_trains_over_stored_weights(
    tiny_dir: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qlora, "FORMATS", {r".*_proj/kernel": "int8", r".*embedding": "int8"})
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam promotes
        qlora.main(["--model", str(tiny_dir), "--data", str(pairs), "--steps", "12"])
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    sizes = [float(x) for x in re.findall(r"([\d.]+) MB of parameters", printed)]
    assert len(sizes) == 4 and sizes[0] <= sizes[1] == sizes[2] <= sizes[3]
    assert "|| stored weights: " in printed
