"""Compute blocks in several threads and give them in order, in memory that is used again.

NumPy releases Python's lock in arithmetic and in reading, so some blocks are computed while others
are written. Where every block takes new memory, the system's clearing of it costs more than the
arithmetic.
"""

import collections
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

_MOST = 4  # threads; a disk is not faster than these


class Memory:
    """Arrays by name, to overwrite."""

    def __init__(self) -> None:
        self._found: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return the array of this name, a larger one if it is too small."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._found or len(self._found[name]) < size:
            self._found[name] = np.empty(size, np.uint8)
        return self._found[name][:size].view(dtype).reshape(shape)


def in_order(jobs: Iterable[Callable[[Memory], memoryview]]) -> Iterator[memoryview]:
    """Yield what the jobs return, in their order, some computed ahead; valid until the next."""
    workers = min(_MOST, os.cpu_count() or 1)
    waiting: collections.deque[tuple[Future[memoryview], Memory]] = collections.deque()
    free: list[Memory] = []
    with ThreadPoolExecutor(workers) as pool:
        for job in jobs:
            if len(waiting) > workers:
                future, memory = waiting.popleft()
                yield future.result()
                free.append(memory)
            memory = free.pop() if free else Memory()
            waiting.append((pool.submit(job, memory), memory))
        for future, memory in waiting:
            yield future.result()
            free.append(memory)
