"""One process of the main job: `python job_process.py FOLDER SIGNAL STEP FLAGS...`.

It sends itself the signal within a step, if that is not 0, and prints as JSON the operations on
files in FOLDER that change something.
"""

import json
import os
import signal
import sys
from typing import Any

import finetune
import training

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main(folder: str, number: str, step: str, *flags: str) -> int:
    advance, changed = training.advance, []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if args and str(args[0]).startswith(folder):
            if event in EVENTS or (event == "open" and args[2] & WRITING):
                changed.append([event, str(args[0])])

    def signaled(function: Any, state: Any, *rest: Any) -> Any:
        if state.step + 1 == int(step):
            os.kill(os.getpid(), signal.Signals[number])
        return advance(function, state, *rest)

    training.advance = signaled
    sys.addaudithook(hook)
    status = finetune.main(flags)
    print(json.dumps(changed))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
