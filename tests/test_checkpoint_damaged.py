"""What a disk may do to a checkpoint: flipped bytes, killed saves, and files written earlier."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import _disk, checkpoint


def base():
    return {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6)), "c": jnp.ones(5)}


def adapted():
    spec = jlora.LoraSpec(2, init=jlora.initializers.uniform, dora=True)
    return jlora.attach(base(), {"a|b": spec, "c": "full"}, key=jax.random.key(0))


def numbers(params):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def outcome(folder, want):
    """Whether the folder restores to the same numbers; False where that is refused."""
    try:
        got = checkpoint.restore(folder, base())
    except ValueError as error:
        assert "jlora.checkpoint.restore" in str(error)
        return False
    assert numbers(got) == want, "other numbers, in silence"
    return True


@pytest.mark.sample(2)
# Orbax leaves its own threads to fail when a read does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", ["jlora.json", "arrays"])
def test_a_flipped_byte_never_gives_other_numbers(part, tmp_path):
    """JLORA_EVERY_BYTE=1 tries all of them."""
    checkpoint.save(tmp_path / "x", adapted())
    want, refused = numbers(adapted()), 0
    files = [p for p in (tmp_path / "x").rglob("*") if p.is_file() and part in str(p)]
    places = [(file, k) for file in files for k in range(file.stat().st_size)]
    assert len(places) > 1000
    if "JLORA_EVERY_BYTE" not in os.environ:
        places = random.Random(0).sample(places, 150)
    for file, k in places:
        whole = file.read_bytes()
        file.write_bytes(whole[:k] + bytes([whole[k] ^ (1 << k % 8)]) + whole[k + 1 :])
        refused += not outcome(tmp_path / "x", want)
        file.write_bytes(whole)
    assert refused > 20 and outcome(tmp_path / "x", want)


def test_a_changed_value_is_named(tmp_path):
    checkpoint.save(tmp_path / "x", adapted())
    other = adapted()
    other["b"] = jax.tree.map(lambda x: x + 1, other["b"])
    checkpoint.save(tmp_path / "y", other)
    shutil.rmtree(tmp_path / "x" / "arrays")
    shutil.copytree(tmp_path / "y" / "arrays", tmp_path / "x" / "arrays")
    with pytest.raises(ValueError, match=r'lora_a of "b" is not what was saved: its checksum'):
        checkpoint.restore(tmp_path / "x", base())


def test_arrays_of_other_shapes_are_refused_before_they_are_made(tmp_path):
    checkpoint.save(tmp_path / "x", adapted())
    large = {"a": jnp.ones((400, 6)), "b": jnp.ones((4, 6)), "c": jnp.ones(5)}
    large = jlora.attach(large, {"a|b": jlora.LoraSpec(2), "c": "full"}, key=jax.random.key(0))
    checkpoint.save(tmp_path / "y", large)
    shutil.rmtree(tmp_path / "x" / "arrays")
    shutil.copytree(tmp_path / "y" / "arrays", tmp_path / "x" / "arrays")
    with pytest.raises(ValueError, match=r"shapes and dtypes differ from those in jlora\.json"):
        checkpoint.restore(tmp_path / "x", base())


def test_an_index_that_was_edited(tmp_path):
    checkpoint.save(tmp_path / "x", adapted())
    index = tmp_path / "x" / "jlora.json"
    content = json.loads(index.read_text())
    leaves = content["leaves"]
    leaves["a"]["leaf"], leaves["b"]["leaf"] = leaves["b"]["leaf"], leaves["a"]["leaf"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its checksum differs"):
        checkpoint.restore(tmp_path / "x", base())
    index.write_text("[]")
    with pytest.raises(ValueError, match="it is not a JSON object"):
        checkpoint.restore(tmp_path / "x", base())


def test_a_checkpoint_without_checksums_still_restores(tmp_path):
    """As they were written before there were any."""
    checkpoint.save(tmp_path / "x", adapted())
    index = tmp_path / "x" / "jlora.json"
    content = json.loads(index.read_text())
    assert {"sha256", "arrays"} < set(content)
    index.write_text(json.dumps({k: content[k] for k in ("version", "leaves")}, indent=2))
    assert outcome(tmp_path / "x", numbers(adapted()))


KILLED = """
import os, pathlib, signal
import jax, jax.numpy as jnp
import jlora
from jlora import checkpoint
params = jlora.attach({"w": jnp.ones((4, 6))}, {"w": jlora.LoraSpec(2)}, key=jax.random.key(0))
checkpoint.save("x/run", params)
rename, left = pathlib.Path.rename, [%d]
def kill(self, target):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = kill
checkpoint.save("x/run", params)
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("renames", [0, 1])
def test_the_next_save_removes_what_a_killed_one_left(renames, tmp_path):
    (tmp_path / "x").mkdir()
    program = [sys.executable, "-c", textwrap.dedent(KILLED % renames)]
    env = {**os.environ, "PYTHONPATH": str(Path(jlora.__file__).parents[1])}
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [p.name for p in (tmp_path / "x").iterdir() if p.name != "run"]
    assert len(left) == 1 and left[0].startswith(".run-saving-")
    assert (tmp_path / "x" / "run").exists() == (renames == 0)
    mine = tmp_path / "x" / ".run-notebook"  # a folder of somebody's
    mine.mkdir()
    (mine / "new").mkdir()
    (tmp_path / "x" / ".run-saving-begun").mkdir()  # killed as soon as it was made
    (tmp_path / "x" / ".run-saving-energy").mkdir()
    (tmp_path / "x" / ".run-saving-energy" / "thesis").mkdir()
    checkpoint.save(tmp_path / "x" / "run", adapted())
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"run", mine.name, ".run-saving-energy"}
    assert outcome(tmp_path / "x" / "run", numbers(adapted()))


def test_a_directory_that_another_save_removes_is_made_again(tmp_path, monkeypatch):
    """Before it is locked it is empty, as one that a killed process left."""
    make, made = tempfile.mkdtemp, []

    def removed_once(**given):
        made.append(Path(make(**given)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", removed_once)
    checkpoint.save(tmp_path / "run", adapted())
    assert len(made) > 1 and [p.name for p in tmp_path.iterdir()] == ["run"]
    assert outcome(tmp_path / "run", numbers(adapted()))


def test_what_another_save_is_writing_stays(tmp_path):
    with _disk.replacing(tmp_path / "run") as slow:
        (slow / "arrays").write_text("in the middle")
        checkpoint.save(tmp_path / "run", adapted())
        assert outcome(tmp_path / "run", numbers(adapted())) and slow.is_dir()
        shutil.copy(tmp_path / "run" / "jlora.json", slow)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "arrays").read_text() == "in the middle"
