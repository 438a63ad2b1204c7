"""The states of a run on disk: written in the background, atomic, verified, by one process.

A state is one safetensors file, named after its step. It is written to a temporary file, synced and
renamed, so it is there completely or not at all, whenever the process is killed. Its metadata has
the losses, the settings, and a SHA-256 over all of that and the arrays. The newest two are kept: if
the last one cannot be read, training continues from the one before.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import placing
from safetensors import safe_open
from safetensors.numpy import save
from training import State

try:
    import fcntl
except ImportError:  # Windows, where nothing prevents a second run in the same directory
    fcntl = None

KEPT = 2
PART = ".part"  # what a killed process leaves; removed by the next run


def step_of(path: Path) -> int | None:
    """The step in the name of a state; None for other files."""
    found = re.fullmatch(r"(0|[1-9]\d*)\.safetensors", path.name)
    return int(found[1]) if found and path.is_file() else None


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a file, the last one first."""
    found = [step_of(path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((step for step in found if step is not None), reverse=True)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"{step}.safetensors"


# ------------------------------------------------------------------------------------------ writing


def content(state: State, notes: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a state, copied to the host, and its notes."""
    leaves = jax.tree.leaves((state.trainable, state.opt_state, state.best))
    # A copy: the next step is free to reuse the buffers, which NumPy would otherwise share.
    arrays = {str(i): placing.host(leaf) for i, leaf in enumerate(leaves)}
    lists = {"losses": [*state.losses], "seconds": [*state.seconds], "evals": [*state.evals]}
    lists |= {"tokens": [*state.tokens], "position": state.position}
    return arrays, {**notes, **lists, "best": state.best is not None}


def checksum(notes: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """The SHA-256 of the notes and the arrays of a state."""
    code = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        code.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return code.hexdigest()


def write_state(folder: Path, arrays: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
    """Write one state, and remove those before the newest two and those of later steps."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, len(notes["losses"]))
    metadata = {"notes": json.dumps(notes), "sha256": checksum(notes, arrays)}
    write_beside(path, save(arrays, metadata))
    at = len(notes["losses"])
    # A later step is of a damaged state: training has begun from one before it.
    later = [step for step in saved_steps(folder) if step > at]
    for step in later + [step for step in saved_steps(folder) if step <= at][KEPT:]:
        path_of(folder, step).unlink()


def write_beside(path: Path, data: bytes | str) -> None:
    """Write to a temporary sibling, sync and rename, so that `path` is never half-written.

    Of several processes, the first one writes.
    """
    if not placing.is_first():
        return
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)  # frees the space where the disk is full
        raise


class Saver:
    """Save states in the background, one at a time, when they are due.

    `every` is a number of steps, or of seconds if it is a float. A failure is raised as an OSError
    by the next call, and says which states are intact.
    """

    def __init__(self, folder: Path, notes: dict[str, Any], every: int | float) -> None:
        self.folder, self.notes, self.every = folder, notes, every
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.last: State | None = None
        self.time = time.monotonic()
        for part in folder.glob("*" + PART) if placing.is_first() else ():
            part.unlink()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def due(self, state: State) -> bool:
        """Whether enough steps or seconds have passed, and nothing is being written.

        Of several processes, the first one decides.
        """
        return placing.agreed(placing.is_first() and self.due_here(state))

    def due_here(self, state: State) -> bool:
        if self.pending is not None and not self.pending.done():
            return False
        if isinstance(self.every, int):
            return state.step - (self.last.step if self.last else 0) >= self.every
        return time.monotonic() - self.time >= self.every

    def save(self, state: State) -> None:
        """Begin to write the state, if it is new. Its arrays are copied now, and may be donated."""
        if state is self.last:
            return
        self.wait()
        self.last, self.time = state, time.monotonic()
        found = content(state, self.notes)  # each process has some of it
        if placing.is_first():
            self.pending = self.thread.submit(write_state, self.folder, *found)

    def wait(self) -> None:
        """Wait until everything is written."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            intact = ", ".join(map(str, saved_steps(self.folder))) or "none"
            step = self.last.step if self.last else 0
            raise OSError(
                f"the state of step {step} could not be saved in {self.folder} "
                f"({error.strerror or error}). Intact states, by their step: {intact}."
            ) from error


# ------------------------------------------------------------------------------------------ reading


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of one state; raises if they are not notes."""
    with safe_open(path, framework="flax") as file:
        notes = json.loads(file.metadata()["notes"])
    if not isinstance(notes, dict) or not isinstance(notes.get("settings"), dict):
        raise ValueError("its notes are not those of a state")
    return notes


def load_notes(folder: Path) -> dict[str, Any] | None:
    """The notes of the last state that has readable ones, or None if nothing was saved.

    Raises ValueError if none of the states has.
    """
    steps = saved_steps(folder)
    for step in steps:
        with contextlib.suppress(Exception):
            return read_notes(path_of(folder, step))
    if steps:
        raise ValueError(
            f"`--resume`: no state in {folder} can be read: their notes are damaged. Start again "
            "with --overwrite."
        )
    return None


def load_state(folder: Path, like: State) -> State | None:
    """The last intact state in `folder`, in the structure of `like`; None if nothing was saved.

    Says so if it passes over a damaged state; raises ValueError if all of them are.
    """
    damaged = {}
    for step in saved_steps(folder):
        try:
            state = read_state(path_of(folder, step), like)
        except Exception as error:  # safetensors raises several types for damaged files
            damaged[step] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        for other, why in damaged.items():
            print(f"the state of step {other} is damaged ({why}); using that of step {step}")
        return state
    if damaged:
        step, why = next(iter(damaged.items()))
        raise ValueError(
            f"`--resume`: no state in {folder} can be read; that of step {step} is damaged: {why}. "
            "Start again with --overwrite."
        )
    return None


def read_state(path: Path, like: State) -> State:
    """One state, verified."""
    notes = read_notes(path)
    with safe_open(path, framework="flax") as file:
        arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}
        code = file.metadata()["sha256"]
    if code != checksum(notes, arrays) or len(notes["losses"]) != step_of(path):
        raise ValueError("its checksum differs")
    best = like.trainable if notes["best"] else None
    leaves, treedef = jax.tree.flatten((like.trainable, like.opt_state, best))
    found = [arrays.get(str(i)) for i in range(len(arrays))]
    if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in found]:
        raise ValueError("its arrays are not those of this model, adapter and optimizer")
    parts = jax.tree.unflatten(treedef, list(map(placing.like, found, leaves)))
    trainable, opt_state, best = parts
    return State(
        trainable,
        opt_state,
        notes["losses"],
        notes["seconds"],
        tuple(notes["evals"]),
        best,
        notes["tokens"],
        notes["position"],
    )


# ---------------------------------------------------------------------------------- one run at once


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[bool]:
    """Lock a directory for this process; yields whether a killed run left its lock there.

    The system releases the lock when the process ends, however it ends. Raises OSError with the
    name of the process that holds it. Directories that were created and are empty at the end are
    removed. Of several processes of one run, the first one has the lock.
    """
    if not placing.is_first():
        yield placing.agreed(False)
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    left = path.exists()
    with hold(path):
        try:
            yield placing.agreed(left)
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # one is not empty
                for parent in created:
                    parent.rmdir()


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, which names this process."""
    while True:
        file = path.open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            with file:
                raise BlockingIOError(
                    f"`--out {path.parent}`: {file.read() or 'another process'} is at work in this "
                    "directory. Wait until it ends, stop it, or give another --out."
                ) from None
        except OSError:  # the file system has no locks
            pass
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # its owner has just removed it: lock the file that is there now
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
