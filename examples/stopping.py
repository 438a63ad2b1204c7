"""SIGINT (Ctrl-C) and SIGTERM: the first ends the run in order, the second at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """What was asked. The first signal raises KeyboardInterrupt, or is only noted in `noting()`."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.quiet = False

    @property
    def asked(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status: 130 after Ctrl-C; 0 after SIGTERM, as schedulers expect.

        It is 0 as well if another process of the run was asked.
        """
        return 130 if self.signal == signal.SIGINT else 0

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Let the block look at `asked` where it can stop: a step donates its inputs."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    def first(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the system ends the process, even inside XLA
        if not self.quiet:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[Stopping]:
    """Handle both signals within the block."""
    stopping = Stopping()
    before = {each: signal.signal(each, stopping.first) for each in SIGNALS}
    try:
        yield stopping
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
