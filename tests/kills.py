"""Run the main job in processes that are killed at a chosen point.

    python tests/kills.py SCRIPT

SCRIPT is JSON, {"flags": [...], "folder": DIR, "kills": [...]}. The job writes to DIR/0/out and
exports to DIR/0/peft. Each kill is one run, which continues the one before; when a run ends by
itself, the next goes to DIR/1, and so on. The exit statuses are printed as JSON; that of a killed
process is the negative signal. Every process is forked from this one, which has imported all that
is needed. A kill is

    {"event": n}     SIGKILL before the n-th operation on files in DIR
    {"bytes": n}     by the kernel, within the write that makes a file longer than n bytes
    {"seconds": t}   SIGALRM after t seconds, which ends the process as well
    null             none
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import finetune
import jax

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "shutil.rmtree"}


def arm(kill: dict[str, float] | None, folder: str) -> None:
    """Let the system kill this process as told."""
    ((kind, value),) = (kill or {"none": 0}).items()
    if kind == "seconds":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, value)
    elif kind == "bytes":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
    elif kind == "event":
        left = [value]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in EVENTS and args and str(args[0]).startswith(folder):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def run(flags: list[str], kill: dict[str, float] | None, folder: Path) -> int:
    """Run the job once in a forked process; return its exit status."""
    out = folder / "out"
    command = [*flags, "--out", str(out), "--export-peft", str(folder / "peft")]
    begun = (out / "lock").exists() or (out / "state").exists()
    command += ["--resume"] if begun else []
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            arm(kill, str(folder))
            status = finetune.main(command)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    path = Path(sys.argv[1])
    script = json.loads(path.read_text())
    jax.config.update("jax_compilation_cache_dir", str(path.parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_num_cpu_devices", 4)  # as the tests have
    number, statuses = 0, []
    for kill in script["kills"]:
        folder = Path(script["folder"]) / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        statuses.append(run(script["flags"], kill, folder))
        number += statuses[-1] == 0
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
