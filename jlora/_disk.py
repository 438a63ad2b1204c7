"""Write files and directories atomically, and verify what is read with checksums.

This file does not know about adapters.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

try:
    import fcntl
except ImportError:  # Windows: directories of killed processes are not removed
    fcntl = None

_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def replacing(target: Path) -> Generator[Path]:
    """Yield a new directory, which replaces `target` if nothing is raised.

    Until then it is in a locked, hidden directory next to `target`. The old `target` is moved into
    the hidden directory during the exchange. Hidden directories left by killed processes are
    removed at the end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden, lock = _hidden(target)
    try:
        new = hidden / _NEW  # has default permissions; `hidden` is accessible to its owner only
        new.mkdir()
        yield new
        _exchange(new, target)
        _clear(target, hidden)
    finally:
        if not (hidden / _OLD).exists():  # otherwise it is the only copy
            shutil.rmtree(hidden, ignore_errors=True)
        _unlock(lock)


@contextlib.contextmanager
def replacing_files(folder: Path, last: str | None = None) -> Generator[Path]:
    """Yield a new directory, whose files replace those of their names in `folder`.

    If something is raised, none is replaced. The file `last`, which describes the others, is
    removed before they are replaced and comes after them, so it never describes other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".jlora-", dir=folder) as new:
        yield Path(new)
        if last is not None:
            (folder / last).unlink(missing_ok=True)
        for file in sorted(Path(new).iterdir(), key=lambda file: file.name == last):
            file.replace(folder / file.name)


def _hidden(target: Path) -> tuple[Path, int | None]:
    """Make and lock a hidden directory; another one if the first is removed before it is locked."""
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}-saving-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            lock = _locked(hidden, wait=True)
            if hidden.exists():
                return hidden, lock
            _unlock(lock)


def _exchange(new: Path, target: Path) -> None:
    """Rename `new` to `target`; restore the old `target` if that fails."""
    old = new.parent / _OLD
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)  # if this fails too, the old directory remains in `hidden`
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear(target: Path, own: Path) -> None:
    """Remove this target's hidden directories that are not in use, left by killed processes."""
    name = re.compile(rf"\.{re.escape(target.name)}-saving-\w+")
    for folder in target.parent.iterdir():
        if folder == own or not name.fullmatch(folder.name) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            lock = _locked(folder, wait=False)
            if lock is not None and {p.name for p in folder.iterdir()} <= {_NEW, _OLD}:
                shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _locked(folder: Path, wait: bool) -> int | None:
    """Lock a directory until this process ends; None if another process holds the lock."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # in use, or the file system has no locks
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def digest(x: ArrayLike) -> str | None:
    """Return the SHA-256 of an array's dtype, shape and bytes.

    None for an array that is sharded over several processes: no process has all of its bytes.
    """
    if not getattr(x, "is_fully_addressable", True):
        return None
    x = np.asarray(x)
    code = hashlib.sha256(f"{x.dtype.name}{list(x.shape)}".encode())
    code.update(np.ascontiguousarray(x).tobytes())
    return code.hexdigest()


def seal(content: Mapping[str, Any]) -> str:
    """Return JSON that contains its own SHA-256."""
    return json.dumps({**content, "sha256": _sum(content)}, indent=2)


def unseal(text: str) -> dict[str, Any]:
    """Parse what `seal` returned, or raise ValueError; without a checksum nothing is verified."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    found = content.pop("sha256", None)
    if found is not None and found != _sum(content):
        raise ValueError("its checksum differs")
    return content


def _sum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
