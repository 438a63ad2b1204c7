"""Runs that are stopped, killed, started twice or out of space: nothing is lost, bit for bit."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import finetune
import kills
import numpy as np
import pytest
import states
import stopping
import training
from safetensors import safe_open
from tiny_llama import TINY, write_model

ROOT = Path(kills.__file__).parents[1]
FILES = ["adapter", "loss.png", "metrics.jsonl", "report.json", "state"]


def raise_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send a signal while a step runs."""
    advance = training.advance

    def signaled(function: Any, state: Any, *rest: Any) -> Any:
        if state.step + 1 == step:
            signal.raise_signal(number)
            # The next one ends the process at once.
            assert {signal.getsignal(each) for each in stopping.SIGNALS} == {signal.SIG_DFL}
        return advance(function, state, *rest)

    monkeypatch.setattr(training, "advance", signaled)


def same_run(a: Path, b: Path) -> None:
    """Assert that two runs ended with the same losses, evaluations, adapter and optimizer."""
    assert sorted(path.name for path in b.iterdir()) == FILES
    assert states.saved_steps(b / "state")[0] == 6 and len(list((b / "state").iterdir())) <= 2
    arrays = [read(out / "state" / "6.safetensors") for out in (a, b)]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name])
    notes = [states.load_notes(out / "state") for out in (a, b)]
    assert all(notes[0][name] == notes[1][name] for name in ("losses", "evals", "best"))
    lines = [metrics(out) for out in (a, b)]
    timeless = [[{**x, "seconds": 0, "tokens_per_second": 0} for x in run] for run in lines]
    assert timeless[0] == timeless[1]
    digests = [json.loads((out / "adapter" / "jlora.json").read_text())["arrays"] for out in (a, b)]
    assert digests[0] == digests[1]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def read(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in list(file.keys())}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_the_run_continues(
    job: Any, finished: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, number: int, status: int
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        raise_at(patch, 3, number)
        assert job(tmp_path, "--eval-every", "2") == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert "stopped after step 3 of 6" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "state"]
    assert job(tmp_path, "--eval-every", "2", "--resume", "--seed", "1") == 2
    assert "started with seed=0 (now 1)" in capsys.readouterr().err
    assert job(tmp_path, "--eval-every", "2", "--resume") == 0
    same_run(finished.out, tmp_path)


def test_a_signal_within_an_evaluation(
    job: Any, finished: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """It is abandoned, and made when the run continues; before training, nothing is trained."""
    evaluate = finetune.evaluate
    for nth, step in ((1, 0), (2, 2)):
        calls = itertools.count(1)

        def signaled(*args: Any, nth: int = nth, calls: Any = calls) -> Any:
            if next(calls) == nth:
                signal.raise_signal(signal.SIGTERM)
            return evaluate(*args)

        with monkeypatch.context() as patch:
            patch.setattr(finetune, "evaluate", signaled)
            assert job(tmp_path, "--eval-every", "2", *(["--resume"] if step else [])) == 0
        assert f"stopped after step {step} of 6" in capsys.readouterr().out
    assert job(tmp_path, "--eval-every", "2", "--resume") == 0
    same_run(finished.out, tmp_path)


def test_a_signal_outside_training(job: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def interrupted(*_: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "prepare", interrupted)
        assert job(tmp_path / "new") == 130
    assert "stopped before training" in capsys.readouterr().err and not (tmp_path / "new").exists()
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_and_check", interrupted)
        assert job(tmp_path / "out") == 130
    assert "stopped outside training" in capsys.readouterr().err
    assert states.saved_steps(tmp_path / "out" / "state")[0] == 6


def test_a_run_is_never_replaced_unasked(
    job: Any, finished: Any, tmp_path: Path, capsys: Any
) -> None:
    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in finished.out.rglob("*") if p.is_file()}

    before = content()
    assert job(finished.out) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Continue that run with --resume, remove it with --overwrite" in error
    assert content() == before
    save = states.Saver(tmp_path / "state", {"settings": {}}, 1)
    with save:
        save.save(training.State({}, (), [], []))
    assert job(tmp_path, "--overwrite") == 0
    assert states.saved_steps(tmp_path / "state") == [6, 0]


def test_other_files_are_not_those_of_the_run(
    job: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        raise_at(patch, 1, signal.SIGINT)
        assert job(tmp_path) == 130
    for name, flag in (("tokens_fingerprint", "data"), ("files_fingerprint", "model")):
        with monkeypatch.context() as patch:
            patch.setattr(finetune.report, name, lambda _: "other")
            assert job(tmp_path, "--resume") == 2
        assert f"the files of `--{flag} " in " ".join(capsys.readouterr().err.split())


def test_a_loss_that_is_no_number_ends_the_run(
    job: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    advance = training.advance

    def broken(function: Any, state: Any, *rest: Any) -> Any:
        made = lambda *args: (
            (*function(*args)[:2], np.float32("nan")) if state.step == 2 else function(*args)
        )
        return advance(made, state, *rest)

    monkeypatch.setattr(training, "advance", broken)
    assert job(tmp_path, "--save-every", "1") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "the loss of step 3 is nan. Lower the learning rate" in error
    assert states.saved_steps(tmp_path / "state") == [2, 1]


def test_one_run_at_once(job: Any, tmp_path: Path, capsys: Any) -> None:
    with states.only_run(tmp_path) as left:
        assert not left
        assert job(tmp_path) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"process {os.getpid()} on " in error and "is at work in this" in error
    assert list(tmp_path.iterdir()) == []
    with states.only_run(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_handed_over_one_by_one(tmp_path: Path) -> None:
    """Many threads take it as soon as it is free."""
    inside, most, done = [0], [0], []

    def work() -> None:
        while True:
            try:
                with states.only_run(tmp_path / "run"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
                    done.append(1)
                    return
            except OSError:
                continue

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 16 and most[0] == 1 and not list(tmp_path.rglob("lock"))


def test_a_full_disk_ends_with_one_paragraph(
    job: Any, finished: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Files cannot grow beyond a limit from step 4 on: as a full disk, this fails in the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    advance = training.advance

    def limited(function: Any, state: Any, *rest: Any) -> Any:
        if state.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return advance(function, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "advance", limited)
        try:
            assert job(tmp_path, "--eval-every", "2", "--save-every", "1") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.split("finetune.py: error: ")[1]
    assert "the state of step 5 could not be saved" in " ".join(error.split())
    assert "\n\n" not in error.strip() and "Traceback" not in error
    assert states.saved_steps(tmp_path / "state")[0] == 4
    assert not list(tmp_path.rglob("*.part"))
    assert job(tmp_path, "--eval-every", "2", "--resume") == 0
    same_run(finished.out, tmp_path)


# ------------------------------------------------------------------------------------------ SIGKILL


@pytest.fixture
def flags(finished: Any) -> list[str]:
    return [*finished.flags, "--eval-every", "2", "--save-every", "1"]


def run_killed(folder: Path, flags: list[str], kills_: Sequence[Any], timeout: float) -> list[Any]:
    """Run the job once for each kill; return [exit status, where it was killed] of each."""
    path = folder / "script.json"
    runs = {"flags": flags, "folder": str(folder / "runs"), "kills": kills_}
    path.write_text(json.dumps(runs))
    places = [ROOT, ROOT / "examples", ROOT / "tests"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, kills.__file__, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def same_exports(a: Path, b: Path) -> None:
    """Assert that two folders have the same exported and merged weights, and nothing else."""
    assert sorted(path.name for path in b.iterdir()) == ["merged", "out", "peft"]
    for name in ("peft/adapter_model.safetensors", "merged/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.nightly
def test_killed_within_a_save(finished: Any, flags: list[str], tmp_path: Path) -> None:
    """The kernel kills the process in the write of a state; what it left is gone at the end."""
    size = (finished.out / "state" / "6.safetensors").stat().st_size
    killed = [{"bytes": size - 20_000}, None]
    assert run_killed(tmp_path, flags, killed, 300) == [[-signal.SIGXFSZ, "bytes"], [0, "none"]]
    same_run(finished.out, tmp_path / "runs" / "0" / "out")
    same_exports(finished.out.parent, tmp_path / "runs" / "0")


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """How many processes were killed in which way and place, printed at the end (`pytest -s`)."""
    found: Counter[str] = Counter()
    yield found
    print("\nkilled:", ", ".join(f"{n} {how}" for how, n in sorted(found.items())))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(15))
def test_killed_anywhere(sums: Path, tmp_path: Path, tally: Counter[str], seed: int) -> None:
    """Twenty kills: most before an operation on files, the others in a write or at any time."""
    model = write_model(tmp_path / "model", TINY | {"num_hidden_layers": 1})
    flags = ["--model", str(model), "--data", str(sums), "--rank", "2", "--steps", "6"]
    flags += ["--lr", "0.02", "--eval-every", "2", "--save-every", "1"]
    draw, made = random.Random(seed), [None]
    for k in range(20):
        kinds = [
            {"event": draw.randrange(60)},
            {"seconds": draw.uniform(0.0, 4.0)},
            {"event": draw.randrange(90)},
            {"bytes": draw.randrange(30_000)},
            {"event": draw.randrange(120)},
        ]
        made += [kinds[k % 5], *([None] if k % 5 == 4 else [])]
    ends = run_killed(tmp_path, flags, made, 3600)
    statuses = [status for status, _ in ends]
    assert set(statuses) <= {0, -signal.SIGKILL, -signal.SIGXFSZ}
    assert sum(status < 0 for status in statuses) >= 15 and statuses[-1] == 0
    tally.update(f"{signal.Signals(-status).name} {place}" for status, place in ends if status < 0)
    first, *others = (tmp_path / "runs" / str(n) for n in range(statuses.count(0)))
    for folder in others:
        same_run(first / "out", folder / "out")
        same_exports(first, folder)
