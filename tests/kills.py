"""Run the main job in processes that are killed at a chosen point.

    python tests/kills.py SCRIPT

SCRIPT is JSON, {"flags": [...], "folder": DIR, "kills": [...]}. The job writes to out, peft and
merged in DIR/0. Each kill is one run, which continues the one before; when a run ends by itself,
the next goes to DIR/1, and so on. Printed as JSON are a pair for each run, its exit status, which
is the negative signal for a killed process, and where it was killed. Every process is forked from
this one, which has imported all that is needed. A kill is

    {"event": n}     SIGKILL before the n-th operation on files in DIR
    {"bytes": n}     SIGXFSZ by the kernel, in the write that makes a file longer than n bytes
    {"seconds": t}   SIGKILL after t seconds
    null             none
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import finetune
import jax

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "shutil.rmtree"}


# Where a process is, by the first of these functions of the examples that is at work.
PLACES = {"export": "export", "write_state": "save", "save_and_check": "save", "train": "training"}
PLACES |= {"run": "report"}
EXAMPLES = str(Path(finetune.__file__).parent)


def place(event: str) -> str:
    """What this process is about to do, from the event and the stack."""
    kinds = {"os.rename": "rename", "os.remove": "clean-up", "os.rmdir": "clean-up"}
    kinds |= {"shutil.rmtree": "clean-up"}
    if event in kinds:
        return kinds[event]
    frame, names = sys._getframe(1), set()
    while frame is not None:
        if frame.f_code.co_filename.startswith(EXAMPLES):
            names.add(frame.f_code.co_name)
        frame = frame.f_back
    return next((PLACES[name] for name in PLACES if name in names), "start-up")


def arm(kill: dict[str, float] | None, folder: str, told: int) -> None:
    """Let this process be killed as told; where it was is written to the descriptor `told`."""
    ((kind, value),) = (kill or {"none": 0}).items()
    if kind == "bytes":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
    elif kind == "event":
        left = [value]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in EVENTS and args and str(args[0]).startswith(folder):
                left[0] -= 1
                if left[0] < 0:
                    os.write(told, place(event).encode())
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def run(flags: list[str], kill: dict[str, float] | None, folder: Path) -> tuple[int, str]:
    """Run the job once in a forked process; return its exit status and where it was killed."""
    out = folder / "out"
    command = [*flags, "--out", str(out), "--export-peft", str(folder / "peft")]
    command += ["--merge", str(folder / "merged")]
    begun = (out / "lock").exists() or (out / "state").exists()
    command += ["--resume"] if begun else []
    heard, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            arm(kill, str(folder), told)
            status = finetune.main(command)
        finally:
            os._exit(status)
    os.close(told)
    end = time.monotonic() + (kill or {}).get("seconds", float("inf"))
    ended = 0
    while ended == 0:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended == 0 and time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.005)
    where = os.read(heard, 100).decode() or next(iter(kill or {"none": 0}))
    os.close(heard)
    return os.waitstatus_to_exitcode(status), where


def main() -> None:
    path = Path(sys.argv[1])
    script = json.loads(path.read_text())
    jax.config.update("jax_compilation_cache_dir", str(path.parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_num_cpu_devices", 4)  # as the tests have
    number, ends = 0, []
    for kill in script["kills"]:
        folder = Path(script["folder"]) / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        ends.append(run(script["flags"], kill, folder))
        number += ends[-1][0] == 0
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
