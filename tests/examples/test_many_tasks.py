"""Serving many tasks on a tiny model: mixed batches give the answers of each adapter alone."""

from pathlib import Path
from typing import Any

import jax
import many_tasks
import numpy as np
import pytest


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that change what a model with random weights says."""
    make = many_tasks.make_adapters

    def louder(base: Any, count: int) -> list[Any]:
        return [jax.tree.map(lambda x: x * 20.0, one) for one in make(base, count, 2)]

    monkeypatch.setattr(many_tasks, "make_adapters", louder)


@pytest.mark.nightly
@pytest.mark.usefixtures("loud")
def test_mixed_batches_answer_as_each_adapter_alone(tiny: Any, capsys: Any) -> None:
    config, base = tiny
    draw = np.random.default_rng(0)
    requests = [(n % 3, draw.integers(0, 256, 3 + n % 2).tolist()) for n in (0, 1, 1, 2, 0, 2, 1)]
    found = many_tasks.compare(config, base, 256, requests, slots=2, steps=4)
    answers = {name: said for name, (said, _) in found.items()}
    assert answers["mixed"] == answers["switching"] != answers["base"]
    assert [len(said) for said in answers.values()] == [7, 7, 7]
    assert "adapters were put into slots" in capsys.readouterr().out


def test_an_adapter_that_a_batch_needs_is_not_replaced(tiny: Any) -> None:
    slots = many_tasks.Slots(many_tasks.make_adapters(tiny[1], 4, 1), 2)
    found = [slots.of(tasks)[1].tolist() for tasks in ([1, 0], [2, 1], [3, 2], [3, 3], [0, 3])]
    assert found == [[1, 0], [0, 1], [1, 0], [1, 1], [0, 1]]
    assert slots.replaced == 3 and slots.resident == [0, 3]


def test_the_command_line(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls = []

    def compare(*args: Any) -> Any:
        calls.append(args)
        said = [[65, 66], [67, 256], [68, 69]]
        return {name: (said, 0.5) for name in ("mixed", "base", "switching")}

    monkeypatch.setattr(many_tasks, "compare", compare)
    flags = ["--requests", "3", "--adapters", "2", "--slots", "2", "--tokens", "2"]
    many_tasks.main(["--model", str(tiny_dir), *flags])
    (_, _, stop, requests, slots, steps), out = calls[0], capsys.readouterr().out
    assert (stop, len(requests), slots, steps) == (256, 3, 2, 2)
    # The mark that ends a text is not counted.
    assert out.count("10.0 tokens/s (5 tokens in 0.50 s)") == 3 and "answers: True" in out
