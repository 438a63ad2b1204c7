"""Two real processes: what they save is one file, which any number of processes restores."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from two_processes import NAMES, base_on, inputs, mesh_of, started, state_on, trained

import jlora
from jlora import _processes, checkpoint, peft

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder that two processes wrote, of which the first was killed inside a save."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(index), str(port), folder],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        first = processes[0].communicate(timeout=300)[0]
    finally:
        processes[1].kill()  # which waits for the first
        second = processes[1].communicate()[0]
    assert processes[0].returncode == -9 and "saving" in first, f"{first}\n{second}"
    assert "Error" not in second.partition("saving")[0], second
    return folder


def test_one_folder_is_written(saved):
    """The old checkpoint, and the hidden directory of the save that was killed."""
    names = sorted(path.name for path in saved.iterdir())
    assert len(names) == 5 and names[0].startswith(".run-saving-")
    assert names[1:] == ["leaves.npz", "peft", "run", "state"]
    assert sorted(path.name for path in (saved / "run").iterdir()) == ["arrays", "jlora.json"]
    assert sorted(path.name for path in (saved / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("shape", [(2, 4), (1, 1)], ids=str)
def test_it_is_restored_by_one_process(saved, shape, usual_promotion):
    """Bit for bit onto another mesh, and training goes on as it did."""
    mesh = mesh_of(*shape)
    base, want = base_on(mesh), np.load(saved / "leaves.npz")
    params = checkpoint.restore(saved / "run", base)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(saved / "state", state_on(params))
    leaves = jax.tree.leaves((jlora.detach(params)[1], state))
    assert len(leaves) > 10
    for n, x in enumerate(leaves):
        np.testing.assert_array_equal(x, want[f"arr_{n}"])
        assert x.sharding.mesh == mesh
    losses = trained(started(params)[1], params, state, inputs(mesh))[2]
    np.testing.assert_allclose(losses, want["losses"][10:], rtol=1e-5)


def test_pefts_file_has_all_of_each_tensor(saved, tmp_path):
    base = base_on(mesh_of(1, 1))
    params = checkpoint.restore(saved / "run", base)
    peft.save(tmp_path, params, names=NAMES)
    one, two = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, saved / "peft")
    )
    assert one.keys() == two.keys() and len(one) == 5
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_in_one_process_nothing_waits():
    called = []
    _processes.in_first(lambda: called.append(1), "call")
    tree = {"a": jax.numpy.ones(2), "b": None}
    assert called == [1] and _processes.gathered(tree)["a"] is tree["a"]
