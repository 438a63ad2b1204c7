"""The sweep on a tiny model: every rate trains as in a run of its own."""

import json
from pathlib import Path
from typing import Any

import finetune
import jax
import numpy as np
import pytest
import sweep
import training
from evaluation import make_apply

import jlora

RATES = (1e-3, 3e-2)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
def test_every_rate_trains_as_in_a_run_of_its_own(
    tiny_dir: Path, pairs: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--model", str(tiny_dir), "--data", str(pairs), "--steps", "3"]
    rates = [str(rate) for rate in RATES]
    sweep.main([*flags, "--rates", *rates, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("held-out loss") == 2
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    history = np.array(found["losses"])
    assert history.shape == (3, 2) and found["rates"] == [*RATES]
    assert history[-1, 0] != pytest.approx(history[-1, 1], rel=1e-3)

    job = finetune.prepare(finetune.parse([*flags, "--smoke"]))
    loss = training.make_loss(jlora.lora(make_apply(job.config)))
    tx = training.make_optimizer(RATES[1], 3)
    trainable, frozen = jlora.partition(job.params)
    state = training.State(trainable, tx.init(trainable), [], [])
    state = training.fit(training.make_step(loss, tx), state, frozen, job.batches)
    np.testing.assert_allclose(history[:, 1], state.losses, rtol=1e-5)
    params = jlora.combine(state.trainable, frozen)
    evaluate = jax.jit(loss)
    losses = [float(evaluate(params, batch)) for batch in job.held_out]
    weights = [batch["weight"].sum() for batch in job.held_out]
    np.testing.assert_allclose(found["held_out"][1], np.average(losses, weights=weights), rtol=1e-5)
