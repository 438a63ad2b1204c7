"""Merge methods against PEFT's `add_weighted_adapter`, live: where it merges the updates."""

import numpy as np
import pytest
import torch
from live import adapt, distance, quiet, randomize, through_files
from peft.utils import merge_utils
from twins import linear

from jlora.arithmetic import add, compress, magnitude, ties

WEIGHTS = [0.7, 1.5]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A module with two adapters, and those here."""
    model = adapt(linear)
    quiet(model.add_adapter, "other", model.peft_config["default"])
    quiet(model.base_model.set_adapter, ["default", "other"])
    randomize(model)
    folder = tmp_path_factory.mktemp("both")
    return model, [through_files(linear, model, folder, adapter=n) for n in ("default", "other")]


def theirs(model, kind, **more):
    """What the combined adapter of PEFT adds to the weight, in our orientation."""
    names = ["default", "other"]
    quiet(model.add_weighted_adapter, names, WEIGHTS, "sum", combination_type=kind, **more)
    with torch.no_grad():
        delta = model.base_model.model.layer.get_delta_weight("sum").numpy().T
    model.delete_adapter("sum")
    return delta


def update(adapter):
    node = adapter["layer"]["kernel"]
    return np.float64(node.scaling) * np.float64(node.lora_a) @ np.float64(node.lora_b)


@pytest.mark.parametrize(
    ("kind", "run", "more"),
    [
        ("cat", lambda xs: add(xs, WEIGHTS), {}),
        ("svd", lambda xs: compress(add(xs, WEIGHTS), rank=4)[0], {"svd_rank": 4}),
        (
            "ties_svd",
            lambda xs: ties(xs, WEIGHTS, density=0.4, rank=4),
            {"svd_rank": 4, "density": 0.4},
        ),
        (
            "magnitude_prune_svd",
            lambda xs: magnitude(xs, WEIGHTS, density=0.4, rank=4),
            {"svd_rank": 4, "density": 0.4},
        ),
    ],
)
def test_on_the_updates_the_results_are_equal(both, compare, kind, run, more):
    model, adapters = both
    compare(update(run(adapters)), theirs(model, kind, **more), kind)


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "linear"])
def test_of_a_and_b_by_themselves_they_are_not(both, kind):
    """PEFT's own function of the updates is what ours equals, and far from PEFT's of A and B."""
    model, adapters = both
    more = {} if kind == "linear" else {"density": 0.4}
    deltas = [torch.tensor(update(x)) for x in adapters]
    fn = {"ties": merge_utils.ties, "magnitude_prune": merge_utils.magnitude_prune}.get(kind)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    meant = fn(deltas, weights, 0.4).numpy() if fn else update(add(adapters, WEIGHTS))
    ours = {"ties": ties, "magnitude_prune": magnitude}.get(kind)
    if ours is not None:
        full = update(ours(adapters, WEIGHTS, density=0.4, rank=7))
        assert distance(full, meant) < 1e-5
    assert distance(theirs(model, kind, **more), meant) > 0.2
