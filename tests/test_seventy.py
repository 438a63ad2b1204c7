"""Llama-3 70B on 16 devices, planned by the compiler from shapes: no device has room for much."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import seventy

SCRIPT = Path(seventy.__file__)
TWO_LAYERS = 2 * 4 * seventy.D * seventy.HIDDEN / 2**30  # float32, of the largest weight
DECOMPOSED = ("pissa", "randomized", "milora", "olora", "lora_ga", "lora_xs", "mica", "loftq")
FROM_MOMENTS = ("corda", "eva")


@functools.cache
def plans():
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    # Compiled as for users, without the flags of this suite.
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    names = ["merge", "attach", "orthogonal", *DECOMPOSED, *FROM_MOMENTS]
    out = subprocess.run([sys.executable, SCRIPT, *names], env=env, stdout=subprocess.PIPE)
    assert out.returncode == 0
    found = {}
    for line in out.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["merge", "attach", "orthogonal"])
def test_at_most_one_gib_over_the_base(name):
    """Of which the adapter is 0.43, in a program that the base is donated to."""
    assert 0 < plans()[name]["more"] <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*DECOMPOSED, *FROM_MOMENTS])
def test_an_initializer_needs_two_layers(name):
    """A, B and all that it computes, over the base, donated, and the data: two layers' float32."""
    assert 0 < plans()[name]["more"] <= TWO_LAYERS
