"""What a disk may do to the state that a run resumes from: the one before it is used, or a word."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune
import jax.numpy as jnp
import numpy as np
import pytest
import training


def state(step: int) -> training.State:
    numbers = np.random.default_rng(step)
    trainable = {"a": jnp.asarray(numbers.normal(size=(4, 3)), jnp.float32), "b": None}
    opt_state = (jnp.array(step), {"mu": jnp.full((4, 3), step, jnp.bfloat16)})
    return training.State(trainable, opt_state, [1.0 / (k + 1) for k in range(step)], [0.5] * step)


def save(folder: Path, *steps: int) -> Path:
    for step in steps:
        training.save_state(folder, state(step), {"settings": {"seed": step}, "before": None})
    return folder


def is_state(found: Any, step: int) -> bool:
    """Whether what was loaded is the state of a step, bit for bit."""
    (trainable, opt_state, losses, _), notes = found
    want = state(step)
    arrays = [(trainable["a"], want.trainable["a"]), (opt_state[1]["mu"], want.opt_state[1]["mu"])]
    same = all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in arrays)
    seed = notes["settings"]["seed"]
    return same and seed == step == int(opt_state[0]) and losses == want.losses


def notes(folder: Path) -> Path:
    return folder / "notes" / "metadata"


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut notes": lambda f: notes(f).write_text(notes(f).read_text()[:40]),
    "no notes": lambda f: notes(f).unlink(),
    "a list for notes": lambda f: notes(f).write_text("[]"),
    "other notes": lambda f: notes(f).write_text("{}"),
    "another loss": lambda f: notes(f).write_text(notes(f).read_text().replace("0.25", "0.35")),
    "nested": lambda f: notes(f).write_text("[" * 100_000),
    "no arrays": lambda f: shutil.rmtree(f / "arrays"),
    "empty": lambda f: [shutil.rmtree(x) for x in f.iterdir() if x.is_dir()],
    "arrays of another": lambda f: (
        shutil.rmtree(f / "arrays"),
        shutil.copytree(f.parent / "3" / "arrays", f / "arrays"),
    ),
    "a file": lambda f: (shutil.rmtree(f), f.write_text("x")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "state", 3, 6)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "state"))


def test_the_last_two_are_kept(copied: Path) -> None:
    assert training.saved_steps(save(copied, 8)) == [8, 6]
    assert is_state(training.load_state(copied, state(1)), 8)
    assert training.load_notes(copied)["settings"] == {"seed": 8}
    assert training.load_state(copied / "elsewhere", state(1)) is None


# Orbax leaves its own threads to fail when a read does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", DAMAGE)
def test_the_state_before_is_used(copied: Path, how: str, capsys: Any) -> None:
    DAMAGE[how](copied / "6")
    assert training.load_notes(copied)["settings"]["seed"] in (3, 6)
    assert is_state(training.load_state(copied, state(1)), 3)
    said = capsys.readouterr().out
    assert said.startswith("the state of step 6 is damaged (") and said.count("\n") == 1
    assert said.endswith("); using that of step 3\n") and len(said) < 300
    save(copied, 5)  # as training does from there
    assert is_state(training.load_state(copied, state(1)), 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_folders_that_are_no_states(copied: Path, capsys: Any) -> None:
    for name in ("junk", "12.tmp", "0012", "-7"):
        (copied / name).mkdir()
    assert is_state(training.load_state(copied, state(1)), 6)
    (copied / "99").mkdir()
    (copied / "99" / "thesis.txt").write_text("x")
    assert is_state(training.load_state(copied, state(1)), 6)
    assert "the state of step 99 is damaged" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bytes_never_give_other_numbers(copied: Path) -> None:
    files = [p for p in (copied / "6").rglob("*") if p.is_file()]
    places = [(file, k) for file in files for k in range(file.stat().st_size)]
    fallen = 0
    for file, k in random.Random(0).sample(places, 40):
        whole = file.read_bytes()
        file.write_bytes(whole[:k] + bytes([whole[k] ^ (1 << k % 8)]) + whole[k + 1 :])
        found = training.load_state(copied, state(1))
        assert is_state(found, 6) or is_state(found, 3), (file, k)
        fallen += is_state(found, 3)
        file.write_bytes(whole)
    assert 5 < fallen and is_state(training.load_state(copied, state(1)), 6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_left(copied: Path, capsys: Any) -> None:
    for step in ("3", "6"):
        shutil.rmtree(copied / step / "arrays")
    match = "no state in .*state can be read; that of step 6 is damaged: .*without --resume"
    with pytest.raises(ValueError, match=match):
        training.load_state(copied, state(1))
    for step in ("3", "6"):
        notes(copied / step).write_text("{")
    assert finetune.main(["--resume", "--out", str(copied.parent)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "finetune.py: error: `--resume`: no state in" in error and "Traceback" not in error
