"""The merge methods against mergekit 0.1.5, on the same dense updates.

    pip install '.[test,live]'
    python -m pytest -m live tests/live/test_mergekit.py

mergekit runs in a process of its own: it sets PyTorch and its warnings up as a program.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from updates import dense, far, node_of

from jlora.arithmetic import add, breadcrumbs, magnitude, sce, slerp, ties

pytestmark = pytest.mark.live

SHAPE = (12, 10)
CHILD = """
import sys
import numpy as np
import torch
from mergekit.merge_methods import merge_tensors

deltas = [torch.tensor(x, dtype=torch.float32) for x in np.load(sys.argv[1])]
base = torch.zeros_like(deltas[0])
weights = [1.0, 0.5, 2.0]
even, found = [1.0, 1.0, 1.0], {}
part = {"density": 0.3}
for name, method, given in (
    ("add", "task_arithmetic", {"weight": weights}),
    ("ties", "ties", {"weight": even, **part}),
    ("breadcrumbs", "breadcrumbs", {"weight": weights, "density": 0.6, "gamma": 0.1}),
    ("sce", "sce", {"select_topk": 0.4}),
    ("sce_all", "sce", {"select_topk": 1.0}),
):
    found[name] = merge_tensors([base, *deltas], method, parameters=given, base_index=0).numpy()
found["slerp"] = merge_tensors(
    deltas[:2], "slerp", parameters={"t": 0.3}, base_index=0
).numpy()
np.savez(sys.argv[2], **found)
"""
WEIGHTS = [1.0, 0.5, 2.0]
METHODS = {
    "add": lambda xs: add(xs, WEIGHTS),
    "ties": lambda xs: ties(xs, [1.0] * 3, density=0.3),
    "breadcrumbs": lambda xs: breadcrumbs(xs, WEIGHTS, density=0.6, outliers=0.1),
    "sce": lambda xs: sce(xs, density=0.4),
    "sce_all": lambda xs: sce(xs),
    "slerp": lambda xs: slerp(xs[:2], 0.3),
}


def updates():
    """Three adapters over a base of zeros, and their updates."""
    nodes = [node_of(SHAPE, "io", None, 3, seed=n, scalar=True) for n in range(3)]
    based = [
        dataclasses.replace(jax.tree.map(jnp.asarray, node), base=jnp.zeros(SHAPE))
        for node in nodes
    ]
    return [{"w": node} for node in based], np.stack([dense(node, SHAPE) for node in nodes])


def test_methods(tmp_path):
    adapters, deltas = updates()
    np.save(tmp_path / "deltas.npy", deltas)
    words = [sys.executable, "-c", CHILD, tmp_path / "deltas.npy", tmp_path / "out.npz"]
    subprocess.run(list(map(str, words)), check=True, timeout=300)
    theirs = np.load(tmp_path / "out.npz")
    errors = {}
    for name, method in METHODS.items():
        node = method(adapters)["w"]
        ours = dense(node, SHAPE) if hasattr(node, "lora_a") else np.float64(node.value)
        errors[name] = far(ours, theirs[name])
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5
    # The sum of the largest parts is not mergekit's TIES: the comparison tells them apart.
    summed = magnitude(adapters, [1.0] * 3, density=0.3)["w"]
    assert far(np.float64(summed.value), theirs["ties"]) > 0.1
