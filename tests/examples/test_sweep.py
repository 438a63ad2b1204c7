"""The sweep on a tiny model: every rate trains as in a run of its own."""

import json
import re
from pathlib import Path
from typing import Any

import finetune
import jax
import numpy as np
import pytest
import sweep
import training
import weights
from evaluation import make_apply

import jlora
from jlora import checkpoint

RATES = (1e-3, 3e-2)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
def test_every_rate_trains_as_in_a_run_of_its_own(
    tiny_dir: Path, pairs: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--model", str(tiny_dir), "--data", str(pairs), "--steps", "3"]
    rates = [str(rate) for rate in RATES]
    assert sweep.main([*flags, "--rates", *rates, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("held-out loss") == 3  # of each rate, and of the best
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    history = np.array(found["losses"])
    assert history.shape == (3, 2) and found["rates"] == [*RATES]
    assert found["settings"]["steps"] == 3 and len(found["base_sha256"]) == 64
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


def test_complaints_and_replacing(tiny_path: Path, tmp_path: Path, capsys: Any) -> None:
    """They are those of the main job, and nothing that is there is replaced unasked."""
    assert sweep.main(["--model", "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "`--model nowhere`: there is no such file" in capsys.readouterr().err
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    assert sweep.main(["--model", str(tiny_path), "--out", str(tmp_path / "out")]) == 2
    assert "remove it with --overwrite" in " ".join(capsys.readouterr().err.split())


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
def test_the_main_job_sweeps(tiny_path: Path, sums: Path, tmp_path: Path, capsys: Any) -> None:
    """It says which rate was best and saves that adapter; a rate may diverge."""
    flags = ["--model", str(tiny_path), "--data", str(sums), "--steps", "4", "--rank", "2"]
    flags += ["--sweep", "lr=1e-3,3e-2,1e-2", "--out", str(tmp_path / "out")]
    assert finetune.main(flags) == 0
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    best = int(np.argmin(found["held_out"]))
    assert best > 0 and found["best"] == found["rates"][best] == [1e-3, 3e-2, 1e-2][best]
    said = capsys.readouterr().out
    assert f"best: --lr {found['best']:g}, held-out loss {min(found['held_out']):.3f}" in said
    job = finetune.prepare(finetune.parse(flags))
    params = checkpoint.restore(tmp_path / "out" / "adapter", weights.load(str(tiny_path))[1])
    loss = jax.jit(training.make_loss(jlora.lora(make_apply(job.config))))
    (batch,) = job.held_out
    np.testing.assert_allclose(loss(params, batch), min(found["held_out"]), rtol=1e-5)
    assert finetune.main(flags) == 2  # as with any run that is there
    assert "Continue that run with --resume" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["--sweep", "lr=1e-3"], "is not lr= and two learning rates or more"),
        (["--sweep", "lr=1e-3,0"], "is not lr= and two"),
        (["--sweep", "lr=1e-3,much"], "is not lr= and two"),
        (["--sweep", "rank=4,8"], "is not lr= and two"),
        (["--sweep", "lr=1,2", "--resume"], "--sweep finds a learning rate .* leave --resume out"),
        (["--sweep", "lr=1,2", "--eval-every", "2"], "leave --eval-every out"),
        (["--sweep", "lr=1,2", "--batch", "4", "--accumulate", "2"], "leave --accumulate out"),
    ],
)
def test_sweeps_that_make_no_sense(wrong: list[str], match: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune.main(wrong)
    assert re.search(match, capsys.readouterr().err)
