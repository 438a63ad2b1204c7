"""pod.py prints the same losses on one device, on eight, and in two processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pod
import pytest

import jlora
from jlora import checkpoint

SCRIPT = Path(pod.__file__)


def test_on_a_mesh(tmp_path, capsys, usual_promotion):
    pod.main(pod.PARSER.parse_args(["--tp", "2", "--steps", "10", "--out", f"{tmp_path}/a"]))
    assert re.fullmatch(r"step 10  loss 2\.\d{4}\n", capsys.readouterr().out)
    base = {name: jax.numpy.zeros(shape) for name, shape in pod.SHAPES.items()}
    shown = jlora.summary(checkpoint.restore(tmp_path / "a", base))
    assert shown.startswith("trainable params: 20,480")


def run(out, devices, *arguments):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, SCRIPT, "--out", out, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.nightly
def test_on_any_number_of_devices_and_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    two = ("--processes", "2", "--port", port, "--steps", "10")
    runs = {
        "one": [run(tmp_path / "a", 1, "--steps", "10")],
        "eight": [run(tmp_path / "b", 8, "--tp", "2", "--steps", "10")],
        "two": [run(tmp_path / "c", 4, *two, "--index", str(n)) for n in (0, 1)],
    }
    losses = {}
    for name, processes in runs.items():
        for n, process in enumerate(processes):
            out = process.communicate(timeout=400)[0]
            assert process.returncode == 0
            losses[name, n] = [float(x) for x in re.findall(r"loss (\S+)", out)]
    assert len(losses["one", 0]) == 1 and not losses["two", 1]
    for name in ("eight", "two"):
        np.testing.assert_allclose(losses[name, 0], losses["one", 0], atol=2e-4)
