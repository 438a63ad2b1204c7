"""Llama-3 70B on 16 devices, planned by the compiler from shapes: no device has room for much."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("seventy.py")


@pytest.mark.nightly
def test_merge_is_in_place():
    """At most 1 GiB over the base, of which 0.43 are the adapter."""
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, SCRIPT], env=env, stdout=subprocess.PIPE)
    assert out.returncode == 0
    plan = json.loads(out.stdout)
    peak = plan["arguments"] + plan["temporary"] + plan["outputs"] - plan["aliased"]
    assert 0 < peak - plan["base"] <= 1
