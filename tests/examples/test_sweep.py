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


@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
def test_every_rate_trains_as_in_a_run_of_its_own(
    tiny_dir: Path, pairs: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--model", str(tiny_dir), "--data", str(pairs)]
    job = finetune.prepare(finetune.parse([*flags, "--smoke", "--steps", "4"]))
    history, held_out = sweep.sweep(job, RATES)
    loss = training.make_loss(jlora.lora(make_apply(job.config)))
    for n, rate in enumerate(RATES):
        tx = training.make_optimizer(rate, 4)
        # Copies, because the step donates.
        trainable, frozen = jlora.partition(jax.tree.map(lambda x: x.copy(), job.params))
        state = training.State(trainable, tx.init(trainable), [], [])
        state = training.fit(training.make_step(loss, tx), state, frozen, job.batches)
        np.testing.assert_allclose(history[:, n], state.losses, rtol=1e-5)
        params = jlora.combine(state.trainable, frozen)
        weights = [batch["weight"].sum() for batch in job.held_out]
        losses = [float(loss(params, batch)) for batch in job.held_out]
        np.testing.assert_allclose(held_out[n], np.average(losses, weights=weights), rtol=1e-5)
    assert history[-1, 0] != pytest.approx(history[-1, 1], rel=1e-3)

    rates = [str(rate) for rate in RATES]
    sweep.main([*flags, "--rates", *rates, "--steps", "4", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("held-out loss") == 2
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    np.testing.assert_allclose(written["held_out"], held_out)
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
