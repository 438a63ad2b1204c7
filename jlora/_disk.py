"""Folders that appear at once, and what is read from them is what was written.

Knows nothing of adapters.
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

try:
    import fcntl
except ImportError:  # Windows: folders that a killed process left stay there
    fcntl = None

_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def replacing(target: Path) -> Generator[Path]:
    """Give a new folder to fill, which becomes `target` if nothing is raised.

    Until then it is in a hidden folder next to `target`, which a lock shows to be in use. What was
    in `target` is there as well while the two are exchanged. Hidden folders of processes that were
    killed are removed at the end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}-saving-", dir=target.parent))
    lock = _locked(hidden, wait=True)
    try:
        new = hidden / _NEW  # with the permissions of any new folder; `hidden` is its owner's alone
        new.mkdir()
        yield new
        _exchange(new, target)
        _clear(target, hidden)
    finally:
        if not (hidden / _OLD).exists():  # or it is the only copy
            shutil.rmtree(hidden, ignore_errors=True)
        _unlock(lock)


def _exchange(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; the old one is there until the new one is."""
    old = new.parent / _OLD
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)  # if this fails too, it stays where it is
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear(target: Path, own: Path) -> None:
    """Remove what killed processes left of this target: nothing but such folders, none in use."""
    name = re.compile(rf"\.{re.escape(target.name)}-saving-\w+")
    for folder in target.parent.iterdir():
        if folder == own or not name.fullmatch(folder.name) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            lock = _locked(folder, wait=False)
            # An empty one may be about to be locked.
            if lock is not None and {p.name for p in folder.iterdir()} in (
                {_NEW},
                {_OLD},
                {_NEW, _OLD},
            ):
                shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _locked(folder: Path, wait: bool) -> int | None:
    """Lock a folder for as long as this process lives; None where another has it."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # in use, or a file system without locks
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def digest(x: Any) -> str | None:
    """Return the SHA-256 of an array's dtype, shape and bytes; None where they are elsewhere too.

    An array over several processes has no one place where all its bytes are.
    """
    if not getattr(x, "is_fully_addressable", True):
        return None
    x = np.asarray(x)
    code = hashlib.sha256(f"{x.dtype.name}{list(x.shape)}".encode())
    code.update(np.ascontiguousarray(x).tobytes())
    return code.hexdigest()


def seal(content: Mapping[str, Any]) -> str:
    """Write JSON that holds its own SHA-256."""
    return json.dumps({**content, "sha256": _sum(content)}, indent=2)


def unseal(text: str) -> dict[str, Any]:
    """Read what `seal` wrote; a ValueError if it is not that. Without a sum nothing is checked."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    found = content.pop("sha256", None)
    if found is not None and found != _sum(content):
        raise ValueError("its checksum differs")
    return content


def _sum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
