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

from jlora.arithmetic import add, breadcrumbs, dare, della, magnitude, sce, slerp, ties

pytestmark = pytest.mark.live

SHAPE = (12, 10)
WEIGHTS, EVEN, KEY = [1.0, 0.5, 2.0], [1.0] * 3, jax.random.key(7)
# mergekit spreads DELLA's probabilities from density - ε to density + ε, jlora from
# density - ε/2 + ε/n to density + ε/2, as the paper: these settings give the same ones.
N, EPSILON, DENSITY = SHAPE[0], 0.2, 0.6
OURS = {"density": DENSITY - EPSILON / (N - 1), "epsilon": 2 * EPSILON * N / (N - 1), "key": KEY}
CHILD = """
import sys
import numpy as np
import torch
from mergekit.merge_methods import merge_tensors
from mergekit.sparsify import magnitude

given = np.load(sys.argv[1])
deltas = [torch.tensor(x.T.copy(), dtype=torch.float32) for x in given["deltas"]]  # (out, in)
base = torch.zeros_like(deltas[0])
weights, even = [1.0, 0.5, 2.0], [1.0, 1.0, 1.0]


def draws(name):  # what jlora keeps, divided by the probability, which mergekit leaves out
    masks = iter(torch.tensor(np.swapaxes(given[name], 1, 2).copy()))
    torch.bernoulli = lambda p: next(masks) / p


def merged(method, tensors=deltas, **given):
    return merge_tensors([base, *tensors], method, parameters=given, base_index=0)


some, della = {"density": 0.6, "rescale": False}, {"density": 0.6, "epsilon": 0.2, "rescale": False}
cases = (
    ("add", "task_arithmetic", None, {"weight": weights}),
    ("ties", "ties", None, {"weight": even, "density": 0.3}),
    ("ties_half", "ties", None, {"weight": [0.5] * 3, "density": 0.3, "lambda": 0.5}),
    ("breadcrumbs", "breadcrumbs", None, {"weight": weights, "density": 0.6, "gamma": 0.1}),
    ("breadcrumbs_ties", "breadcrumbs_ties", None,
     {"weight": even, "density": 0.6, "gamma": 0.1, "normalize": True}),
    ("dare_linear", "dare_linear", "dare", {"weight": weights, **some}),
    ("dare_ties", "dare_ties", "dare", {"weight": even, "normalize": True, **some}),
    ("della_linear", "della_linear", "della", {"weight": weights, "normalize": False, **della}),
    ("della", "della", "della", {"weight": even, "normalize": True, **della}),
    ("sce", "sce", None, {"select_topk": 0.4}),
    ("sce_all", "sce", None, {"select_topk": 1.0}),
)
found = {}
for name, method, masks, parameters in cases:
    if masks:
        draws(masks)
    found[name] = merged(method, **parameters).numpy().T
large = [magnitude(x, 0.3) for x in deltas]
found["magnitude"] = merged("task_arithmetic", large, weight=weights).numpy().T
found["slerp"] = merge_tensors(
    deltas[:2], "slerp", parameters={"t": 0.3}, base_index=0
).numpy().T
np.savez(sys.argv[2], **found)
"""
METHODS = {
    "add": lambda xs: add(xs, WEIGHTS),
    "ties": lambda xs: ties(xs, EVEN, density=0.3),
    "ties_half": lambda xs: ties(xs, [0.5] * 3, density=0.3),
    "magnitude": lambda xs: magnitude(xs, WEIGHTS, density=0.3),
    "breadcrumbs": lambda xs: breadcrumbs(xs, WEIGHTS, density=0.6, outliers=0.1),
    "breadcrumbs_ties": lambda xs: breadcrumbs(xs, EVEN, density=0.6, outliers=0.1, elect=True),
    "dare_linear": lambda xs: dare(xs, WEIGHTS, density=DENSITY, key=KEY),
    "dare_ties": lambda xs: dare(xs, EVEN, density=DENSITY, key=KEY, elect=True),
    "della_linear": lambda xs: della(xs, WEIGHTS, elect=False, **OURS),
    "della": lambda xs: della(xs, EVEN, **OURS),
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


def value(adapter):
    node = adapter["w"]
    return dense(node, SHAPE) if hasattr(node, "lora_a") else np.float64(node.value)


def kept(method, adapters):
    """What a random method keeps of each update: its result where the others weigh nothing."""
    alone = [value(method(adapters, np.eye(3)[n].tolist())) for n in range(3)]
    return np.float32(np.stack(alone) != 0)


def test_methods(tmp_path):
    adapters, deltas = updates()
    masks = {
        "dare": kept(lambda xs, ws: dare(xs, ws, density=DENSITY, key=KEY), adapters),
        "della": kept(lambda xs, ws: della(xs, ws, elect=False, **OURS), adapters),
    }
    assert all(0.4 < x.mean() < 0.8 for x in masks.values())
    np.savez(tmp_path / "given.npz", deltas=deltas, **masks)
    words = [sys.executable, "-c", CHILD, tmp_path / "given.npz", tmp_path / "out.npz"]
    subprocess.run(list(map(str, words)), check=True, timeout=300)
    theirs = np.load(tmp_path / "out.npz")
    errors = {name: far(value(of(adapters)), theirs[name]) for name, of in METHODS.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert set(errors) == set(theirs) and max(errors.values()) < 1e-5
    # The sum of the largest parts is not mergekit's TIES: the comparison tells them apart.
    summed = value(magnitude(adapters, EVEN, density=0.3))
    assert far(summed, theirs["ties"]) > 0.1
