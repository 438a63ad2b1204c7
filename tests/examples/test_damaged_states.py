"""What a disk may do to the state that a run resumes from: the one before it is used, or a word."""

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune
import jax.numpy as jnp
import numpy as np
import pytest
import states
import training


def state(step: int) -> training.State:
    numbers = np.random.default_rng(step)
    trainable = {"a": jnp.asarray(numbers.normal(size=(4, 3)), jnp.float32), "b": None}
    opt_state = (jnp.array(step), {"mu": jnp.full((4, 3), step, jnp.bfloat16)})
    losses, evals = [1.0 / (k + 1) for k in range(step)], ({"step": 0, "loss": 2.0},)
    best = {"a": -trainable["a"], "b": None} if step > 3 else None
    return training.State(trainable, opt_state, losses, [0.5] * step, evals, best)


def save(folder: Path, *steps: int) -> Path:
    for step in steps:
        with states.Saver(folder, {"settings": {"seed": step}}, 1) as saver:
            saver.save(state(step))
            saver.wait()
    return folder


def is_state(found: Any, step: int) -> bool:
    """Whether what was loaded is the state of a step, bit for bit."""
    want = state(step)
    pairs = [
        (found.trainable["a"], want.trainable["a"]),
        (found.opt_state[0], want.opt_state[0]),
        (found.opt_state[1]["mu"], want.opt_state[1]["mu"]),
    ]
    if (found.best is None) != (want.best is None):
        return False
    if want.best is not None:
        pairs.append((found.best["a"], want.best["a"]))
    same = all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)
    return same and found.losses == want.losses and found.evals == want.evals


def file(folder: Path, step: int) -> Path:
    return folder / f"{step}.safetensors"


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-40]),
    "cut in the header": lambda f: f.write_bytes(f.read_bytes()[:40]),
    "empty": lambda f: f.write_bytes(b""),
    "other notes": lambda f: f.write_bytes(f.read_bytes().replace(b"settings", b"settinks")),
    "another loss": lambda f: f.write_bytes(f.read_bytes().replace(b"0.25", b"0.35")),
    "nested": lambda f: f.write_text("[" * 100_000),
    "zeros": lambda f: f.write_bytes(bytes(len(f.read_bytes()))),
    "that of another step": lambda f: shutil.copy(file(f.parent, 3), f),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "state", 3, 6)


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "state"))


def test_the_last_two_are_kept(copied: Path) -> None:
    (copied / "7.safetensors.part").write_text("left by a killed process")
    assert states.saved_steps(save(copied, 8)) == [8, 6]
    assert sorted(path.name for path in copied.iterdir()) == ["6.safetensors", "8.safetensors"]
    assert is_state(states.load_state(copied, state(1)), 8)
    notes = states.load_notes(copied)
    assert notes is not None and notes["settings"] == {"seed": 8}
    assert states.load_state(copied / "elsewhere", state(1)) is None


@pytest.mark.parametrize("how", DAMAGE)
def test_the_state_before_is_used(copied: Path, how: str, capsys: Any) -> None:
    DAMAGE[how](file(copied, 6))
    notes = states.load_notes(copied)
    assert notes is not None and notes["settings"]["seed"] in (3, 6)
    assert is_state(states.load_state(copied, state(1)), 3)
    said = capsys.readouterr().out
    assert said.startswith("the state of step 6 is damaged (") and said.count("\n") == 1
    assert said.endswith("); using that of step 3\n") and len(said) < 300
    save(copied, 5)  # as training does from there
    assert is_state(states.load_state(copied, state(1)), 5)


def test_files_that_are_no_states(copied: Path, capsys: Any) -> None:
    for name in ("junk", "12.part", "0012.safetensors", "-7.safetensors", "8.safetensors"):
        (copied / name).mkdir()
    assert is_state(states.load_state(copied, state(1)), 6)
    file(copied, 99).write_text("a thesis")
    assert is_state(states.load_state(copied, state(1)), 6)
    assert "the state of step 99 is damaged" in capsys.readouterr().out


def test_flipped_bytes_never_give_other_numbers(copied: Path) -> None:
    path, fallen = file(copied, 6), 0
    whole = path.read_bytes()
    for k in random.Random(0).sample(range(len(whole)), 60):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ (1 << k % 8)]) + whole[k + 1 :])
        found = states.load_state(copied, state(1))
        assert is_state(found, 6) or is_state(found, 3), k
        fallen += is_state(found, 3)
    path.write_bytes(whole)
    assert fallen > 50 and is_state(states.load_state(copied, state(1)), 6)


def test_a_state_of_another_adapter_is_refused(copied: Path) -> None:
    like = state(1)._replace(trainable={"a": jnp.zeros((4, 2)), "b": None})
    with pytest.raises(ValueError, match="its arrays are not those of this model"):
        states.load_state(copied, like)


def test_nothing_left(copied: Path, capsys: Any) -> None:
    for step in (3, 6):
        file(copied, step).write_bytes(file(copied, step).read_bytes()[:-9])
    match = "no state in .*state can be read; that of step 6 is damaged: .*with --overwrite"
    with pytest.raises(ValueError, match=match):
        states.load_state(copied, state(1))
    for step in (3, 6):
        file(copied, step).write_text("{")
    assert finetune.main(["--resume", "--out", str(copied.parent)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "finetune.py: error: `--resume`: no state in" in error and "Traceback" not in error


def test_a_full_disk_leaves_the_states_before(copied: Path) -> None:
    """A limit on the size of files fails within the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with states.Saver(copied, {"settings": {}}, 1) as saver:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        try:
            saver.save(state(8))
            match = r"step 8 could not be saved in .*state \(.*\). Intact states.*: 6, 3\."
            with pytest.raises(OSError, match=match):
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in copied.iterdir()) == ["3.safetensors", "6.safetensors"]
    assert is_state(states.load_state(copied, state(1)), 6)


def test_when_a_state_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(states.time, "monotonic", lambda: now[0])
    with states.Saver(tmp_path, {}, 2) as steps, states.Saver(tmp_path, {}, 60.0) as seconds:
        assert [steps.due(state(n)) for n in (0, 1, 2, 3)] == [False, False, True, True]
        steps.save(state(2))
        steps.wait()
        assert [steps.due(state(n)) for n in (3, 4)] == [False, True]
        assert not seconds.due(state(9))
        now[0] += 61
        assert seconds.due(state(9))
