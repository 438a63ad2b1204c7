"""`benchmarks/aot.py`: steps on GPUs and TPUs that are not here, planned by their compilers.

The compilers are packages of JAX's version, which are put in a folder of their own.
"""

import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "aot.py"
GIB = 2**30


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A function that plans a target in some modes and returns the rows by mode."""
    folder = tmp_path_factory.mktemp("compilers")
    (libtpu,) = (found[0] for x in requires("jax") if (found := re.match(r"libtpu==[\d.*]+", x)))
    cuda = [f"jax-cuda12-{name}=={version('jax')}" for name in ("plugin", "pjrt")]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    subprocess.run([*command, *cuda, "nvidia-cuda-nvcc-cu12", libtpu], check=True)
    path = os.pathsep.join([str(folder), str(SCRIPT.parents[1])])

    @functools.cache
    def planned(target, *modes):
        out = folder / "rows.json"
        command = [sys.executable, SCRIPT, "--only", target, "--modes", *modes, "--json", out]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}, check=True)
        return {row["mode"]: row for row in json.loads(out.read_text())["rows"]}

    return planned


@pytest.mark.parametrize(
    ("target", "most"),
    [("8B, 8 x H100", 1.13), ("70B, 16 x H100", 1.15), ("175B, 64 x H100", 1.03)],
)
def test_peak_on_gpus(plans, target, most):
    """Of LoRA over the limit's; no weight is copied, and no activation reduced, more often."""
    rows = plans(target, "limit", "lora", "full")
    limit, lora, full = (rows[mode]["peak"] for mode in ("limit", "lora", "full"))
    assert 1 < lora / limit <= most
    assert full >= 3.3 * lora
    assert not rows["lora"]["more_copies"] and rows["lora"]["more_sums"] == 0


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_over_a_stored_base(plans, format):
    rows = plans("8B, 8 x H100", "limit", format)
    assert rows[format]["peak"] < 0.8 * rows["limit"]["peak"]
    assert not rows[format]["more_copies"]


def test_peak_on_eight_small_tpus(plans):
    """LoRA of 8B fits where full fine-tuning does not."""
    rows = plans("8B, v5e 2x4", "limit", "lora", "full")
    assert rows["lora"]["peak"] <= 5 * GIB
    assert "RESOURCE_EXHAUSTED" in rows["full"]["error"]


def test_peak_of_175_billion_parameters_on_tpus(plans):
    rows = plans("175B, v5p, split stream", "limit", "lora")
    assert rows["limit"]["peak"] < rows["lora"]["peak"] <= 8 * GIB
    assert not rows["lora"]["more_copies"]
