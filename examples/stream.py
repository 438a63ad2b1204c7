"""Training data from files: scanned once, then streamed, shuffled by a window, and packed.

At any time one window of examples is in memory. The rows of a window are a pure function of the
files, the seed, and where the window begins, so a `Position` is all that a resumed run needs to
continue with the same batches.
"""

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from data import Example, batches, cut, fill, joined, learned, packed_rows, row_length
from records import Place, Reader
from tqdm import tqdm

HELD_OUT = 2000  # at most, and a tenth of the examples


class Position(NamedTuple):
    """The next row: the epoch, where its window begins, and how many rows are before it there."""

    epoch: int
    place: Place
    row: int = 0


class Counts(NamedTuple):
    """What a scan found, with tokens and targets after truncation."""

    examples: int
    held_out: int
    tokens: int
    targets: int
    longest: int
    most_targets: int
    truncated: int
    dropped: int

    def __str__(self) -> str:
        text = (
            f"data: {self.examples:,} examples with {self.tokens:,} tokens, {self.targets:,} of "
            f"them learned; {self.held_out:,} examples are held out; the longest has "
            f"{self.longest:,} tokens"
        )
        if self.truncated or self.dropped:
            text += (
                f"; {self.truncated:,} are truncated and {self.dropped:,} dropped, since nothing "
                "that is learned is left"
            )
        return text


class Stream:
    """The examples of some files. `length` truncates; `window` of them are shuffled at a time."""

    def __init__(self, reader: Reader, length: int | None, window: int) -> None:
        self.reader, self.limit, self.window = reader, length, window
        self.held_out, self.excluded, self.counts, self.sha256 = self.scan()
        self.length = length or row_length(self.counts.longest)

    def scan(self) -> tuple[list[Example], set[int], Counts, str]:
        """Read everything once: errors, held-out examples, counts and a fingerprint."""
        code, chosen = hashlib.sha256(), []
        n = tokens = targets = longest = most = truncated = dropped = 0
        with tqdm(total=sum(self.reader.sizes), unit="B", unit_scale=True, desc="scan data") as bar:
            for index, example in self.examples(bar):
                kept = self.fit(example)
                if kept is None:
                    dropped += 1
                    continue
                truncated += len(kept.tokens) < len(example.tokens)
                fingerprint(code, kept)
                many = int(learned(kept).sum())
                n, tokens, targets = n + 1, tokens + len(kept.tokens), targets + many
                longest, most = max(longest, len(kept.tokens)), max(most, many)
                # Those of the lowest hashes of their numbers are held out, whatever the seed.
                entry = (-hashed(index), index, kept)
                if len(chosen) < HELD_OUT:
                    heapq.heappush(chosen, entry)
                elif entry > chosen[0]:
                    heapq.heapreplace(chosen, entry)
        if n < 2:
            if self.limit is not None and dropped:
                raise ValueError(
                    f"`--length {self.limit}`: no example is left to train or to hold out. Give a "
                    "larger one."
                )
            names = " ".join(map(str, self.reader.paths))
            raise ValueError(
                f"`--data {names}`: two examples are needed, one of them to hold out. Give more."
            )
        held = sorted(chosen, reverse=True)[: min(HELD_OUT, max(1, n // 10))]
        counts = Counts(n, len(held), tokens, targets, longest, most, truncated, dropped)
        return [e for *_, e in held], {i for _, i, _ in held}, counts, code.hexdigest()

    def examples(self, bar: Any) -> Iterator[tuple[int, Example]]:
        """All examples in order, with their numbers. Raises if a file has none."""
        at, empty = self.reader.begin(), set(self.reader.paths)
        for path, size in zip(self.reader.paths, self.reader.sizes, strict=True):
            if size == 0:
                raise ValueError(f"`--data {path}`: the file is empty.")
        while not self.reader.ended(at):
            found, after = self.reader.read(at, 1)
            if found:
                moved = zip(self.reader.paths, at.offsets, after.offsets, strict=True)
                empty -= {path for path, a, b in moved if a != b}
            yield from enumerate(found, at.index)
            bar.update(sum(after.offsets) - sum(at.offsets))
            at = after
        if empty:
            raise ValueError(
                f"`--data {min(empty)}`: the file is empty, or there is nothing to learn in it."
            )

    def fit(self, example: Example) -> Example | None:
        """The example within the length; None if nothing that is learned is left."""
        return example if self.limit is None else cut(example, self.limit)

    def rows(self, at: Position, seed: int) -> Iterator[tuple[list[Example], Position]]:
        """Packed rows from a position on, forever, each with the position after it."""
        while True:
            found, place = self.reader.read(at.place, self.window)
            numbers = range(at.place.index, place.index)
            trained = [e for n, e in zip(numbers, found, strict=True) if n not in self.excluded]
            kept = [e for e in map(self.fit, trained) if e is not None]
            # The seed of a window: no other one of the run has the same.
            random = np.random.default_rng([seed, at.epoch, at.place.index])
            order = (kept[i] for i in random.permutation(len(kept)))
            ended = self.reader.ended(place)
            after = Position(at.epoch + ended, self.reader.begin() if ended else place)
            rows = packed_rows(order, self.length, self.most)
            last = None
            for n, row in enumerate(itertools.chain(rows, (None,))):
                if last is not None and n > at.row:
                    yield last, after if row is None else at._replace(row=n)
                last = row
            at = after

    @property
    def most(self) -> int:
        """The targets that a row may have: few more than on average, so that shapes are small."""
        share = self.counts.targets / self.counts.tokens
        return min(self.length, max(self.counts.most_targets, int(1.25 * share * self.length) + 1))


class Streamed(Sequence):
    """The batches of a run, as a sequence that is fast to read in order.

    `position` is that of the batch after the one that was read last; `seek` goes to one.
    """

    def __init__(self, stream: Stream, steps: int, rows: int, parts: int, seed: int) -> None:
        self.stream, self.steps, self.size, self.parts = stream, steps, rows // parts, parts
        self.seed = seed
        self.seek(0, None)
        self.first = self.read()  # what a program is compiled for, wherever the run continues
        self.seek(0, None)

    def seek(self, step: int, position: Any) -> None:
        """Continue with a step, at its position; None is the start."""
        self.next, self.last = step, None
        self.at = Position(0, self.stream.reader.begin())
        if position is not None:
            epoch, (offsets, lines, index), row = position
            self.at = Position(epoch, Place(tuple(offsets), tuple(lines), index), row)
        self.rows = self.stream.rows(self.at, self.seed)

    @property
    def position(self) -> Any:
        return self.at

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        if step == 0 and self.next > 1:
            return self.first
        if step < self.next - (self.last is not None):
            self.seek(0, None)
        while self.last is None or self.next <= step:
            self.last = self.read()
            self.next += 1
        return self.last

    def read(self) -> dict[str, np.ndarray]:
        """The next batch."""
        taken = list(itertools.islice(self.rows, self.size * self.parts))
        self.at = taken[-1][1]
        packed = fill([row for row, _ in taken], self.stream.length)
        found = batches(packed, self.size, most=self.size * self.stream.most)
        return joined(found, self.parts)[0] if self.parts > 1 else found[0]


def hashed(index: int) -> int:
    return int.from_bytes(hashlib.blake2b(index.to_bytes(8), digest_size=8).digest())


def fingerprint(code: Any, example: Example) -> None:
    """Add an example as tokens to a hash."""
    sizes = [len(example.tokens), example.start]
    code.update(np.asarray([*sizes, *example.tokens], np.int32).tobytes() + (example.mask or b""))
