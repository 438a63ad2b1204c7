"""Data: the complaints by line, packing, batches, and the score."""

import itertools
import json
import tracemalloc
import types
from pathlib import Path
from typing import Any

import chat
import data
import numpy as np
import pytest
import records
import stream as stream_module
from stream import Position, Stream, Streamed
from tiny_llama import byte_tokenizer

GOOD = '{"prompt": "a", "completion": "b"}'


def load(path: Path, context: int = 96) -> data.Dataset:
    return data.load([str(path)], byte_tokenizer(), 256, context)


def all_of(dataset: data.Dataset) -> list[data.Example]:
    """The training examples of one epoch, and those that are held out."""
    stream = dataset.train
    assert isinstance(stream, Stream)
    rows = stream.rows(Position(0, stream.reader.begin()), 0)
    found: list[data.Example] = []
    for row, after in rows:
        found += row
        if after.epoch:
            break
    return [*found, *dataset.held_out]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([GOOD, "", GOOD], "line 2 is empty"),
        ([GOOD, GOOD, "{oops"], "line 3 is not JSON"),
        ([GOOD, "[1]"], "line 2 lacks a string"),
        ([GOOD, '{"prompt": "a"}'], "line 2 lacks a string"),
        ([GOOD, '{"prompt": 3, "completion": "b"}'], "line 2 lacks a string"),
        (['{"prompt": "a", "completion": ""}'], "line 1 has an empty completion"),
        ([GOOD, json.dumps({"prompt": "x" * 95, "completion": "b"})], "line 2 has 97 tokens.*96"),
        ([GOOD, '{"messages": "hello"}'], "line 2 has `messages` that are not a list"),
        ([GOOD, '{"messages": [{"content": "a"}]}'], "line 2 has `messages` that are not a list"),
        ([GOOD, '{"messages": [{"role": "user"}]}'], "line 2 has no message of the assistant"),
        ([GOOD, '{"messages": [{"role": "assistant"}]}'], "line 2 .* no chat template"),
        ([GOOD, '{"text": ""}'], "line 2 lacks a string"),
        ([GOOD, "[" * 100_000], "line 2 is not JSON"),
        ([], "the file is empty"),
        ([GOOD], "two examples are needed"),
    ],
)
def test_complaints_name_the_line(tmp_path: Path, lines: list[str], match: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"`--data .*{match}"):
        load(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"should end in \.jsonl"):
        load(tmp_path / "d.csv")
    (tmp_path / "e.txt").write_text("")
    with pytest.raises(ValueError, match="file is empty"):
        load(tmp_path / "e.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load(tmp_path / "b.txt")


def test_a_line_separator_within_a_string_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a\u2028b", "completion": "c"}\r\n' + GOOD, encoding="utf-8")
    dataset = load(path)
    assert {e.prompt for e in all_of(dataset)} == {"a\u2028b", "a"}


def test_only_the_completion_is_learned(pairs: Path) -> None:
    dataset = load(pairs)
    every = all_of(dataset)
    assert len(every) == 40 and len(dataset.held_out) == 4 and not dataset.phonemes
    tokenizer = byte_tokenizer()
    for example in every:
        learned = example.tokens[example.start :]
        assert learned == [*tokenizer.encode(example.completion).ids, 256]
        assert tokenizer.decode(example.tokens[: example.given]) == example.prompt


def test_text_learns_every_token(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefgh" * 40)
    dataset = load(tmp_path / "t.txt")
    examples = all_of(dataset)
    assert sum(len(e.tokens) for e in examples) == 320
    assert max(len(e.tokens) for e in examples) == 96
    assert {(e.start, e.given) for e in examples} == {(1, 16)}


class NoTokens:
    """Stands in for a tokenizer where only the words matter: there are 100,000 of them."""

    def encode_batch_fast(self, texts: list[str], **_: Any) -> list[Any]:
        return [types.SimpleNamespace(ids=[0])] * len(texts)


@pytest.mark.nightly
def test_words_are_split_once_for_all() -> None:
    dataset = data.load(None, NoTokens(), 256, 96)
    train, held_out = ({e.prompt for e in part} for part in (dataset.train, dataset.held_out))
    assert len(held_out) == 2000 and len(train) > 100_000 and not train & held_out
    acoustic = next(
        e for e in [*dataset.train, *dataset.held_out] if "a c o u s t i c →" in e.prompt
    )
    assert acoustic.completion == " AH K UW S T IH K"


def examples_of(lengths: list[int]) -> list[data.Example]:
    random = np.random.default_rng(0)
    return [
        data.Example("", "", random.integers(1, 99, n).tolist(), n // 2, n // 2) for n in lengths
    ]


def test_packing_keeps_every_example_whole() -> None:
    lengths = np.random.default_rng(1).integers(4, 30, 200).tolist()
    examples = examples_of(lengths)
    rows = data.pack(iter(examples), 64)
    found = []
    for r, segment in itertools.product(range(len(rows.tokens)), range(1, 20)):
        here = rows.segments[r] == segment
        if here.any():
            tokens, targets = rows.tokens[r, here].tolist(), rows.targets[r, here]
            assert rows.positions[r, here].tolist() == list(range(len(tokens)))
            start = len(tokens) // 2
            assert targets.tolist() == [-1] * (start - 1) + tokens[start:] + [-1]
            found.append(tokens)
    assert sorted(found) == sorted(e.tokens for e in examples)
    assert (rows.segments > 0).mean() > 0.9


def test_batches_depend_on_the_seed_and_the_step_alone() -> None:
    examples = examples_of([10, 12, 14, 16] * 5)

    def make(seed: int, rows: int) -> list[dict[str, Any]]:
        return data.batches(data.pack(data.shuffled(examples, seed), 64, rows), 2)

    once, again, other = make(0, 20), make(0, 20), make(1, 20)
    assert len(once) == 10 and len({b["at"].shape for b in once}) == 1
    for a, b in zip(once, again, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(
        not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(once, other, strict=True)
    )


def test_batches_ask_where_targets_are() -> None:
    rows = data.pack(iter(examples_of([10, 20, 30])), 32)
    batches = data.batches(rows, 2)
    assert sum(b["weight"].sum() for b in batches) == (rows.targets >= 0).sum()
    first = batches[0]
    real = first["weight"] > 0
    flat = first["tokens"].reshape(-1)
    np.testing.assert_array_equal(flat[first["at"][real] + 1], first["target"][real])


# ------------------------------------------------------------------------------------------ streams


class Bytes:
    """A tokenizer whose tokens are the bytes, for files where speed matters."""

    def encode(self, text: str, **_: Any) -> Any:
        offsets = [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]
        return types.SimpleNamespace(ids=[*text.encode()], offsets=offsets)

    def encode_batch(self, texts: list[str], **_: Any) -> list[Any]:
        return [self.encode(text) for text in texts]

    encode_batch_fast = encode_batch

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


CHATML = chat.Chat(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    {},
    ["</s>"],
)


def write_files(folder: Path, lines: int, pieces: int = 1) -> list[str]:
    """Pairs and chats in one file, plain text in another."""
    say = lambda role, n: {"role": role, "content": f"{role} {n} ä"}
    talk = lambda n: [say(role, n) for role in ("user", "assistant") * (1 + n % 3)]
    pair = lambda n: {"prompt": "p" * (n % 7), "completion": f"pair {n}"}
    made = [json.dumps({"messages": talk(n)} if n % 2 else pair(n)) for n in range(lines)]
    (folder / "a.jsonl").write_text("".join(line + "\n" for line in made))
    (folder / "b.txt").write_text("".join(f"text {n} ü\n" for n in range(pieces * lines)))
    return [str(folder / "a.jsonl"), str(folder / "b.txt")]


def stream_of(files: list[str], window: int = 32, length: int | None = 96) -> Stream:
    reader = records.Reader(files, Bytes(), 0, 128, length, CHATML)
    return Stream(reader, length, window)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_stream_continues_anywhere_with_the_same_batches(tmp_path: Path) -> None:
    """Over several epochs, whose windows end where the batches do not."""
    stream = stream_of(write_files(tmp_path, 150))
    once = Streamed(stream, 60, 4, 2, seed=1)
    batches, positions = [], []
    for batch in once:
        batches.append(batch)
        positions.append(json.loads(json.dumps(once.position)))
    assert len(batches) == 60 and positions[-1][0] >= 2
    assert {p[2] for p in positions} != {0}, "no position is within a window"
    assert len({b["at"].shape for b in batches}) == 1 and batches[0]["at"].shape[0] == 2
    for step in (1, 7, 30, 59):
        again = Streamed(stream_of(stream.reader.paths), 60, 4, 2, seed=1)
        again.seek(step, positions[step - 1])
        assert same(again[0], batches[0])  # as when the programs are compiled
        assert all(same(again[n], batches[n]) for n in range(step, 60))
        assert same(again[3], batches[3])  # back to the start
    other = Streamed(stream, 60, 4, 2, seed=2)
    assert not any(same(a, b) for a, b in zip(batches, other, strict=True))


def test_every_epoch_has_every_example_once_in_another_order(tmp_path: Path) -> None:
    stream = stream_of(write_files(tmp_path, 150))
    epochs: dict[int, list[Any]] = {0: [], 1: []}
    at = Position(0, stream.reader.begin())
    for row, after in stream.rows(at, 0):
        epochs[at.epoch] += [(*e.tokens,) for e in row]
        at = after
        if at.epoch == 2:
            break
    counts = stream.counts
    assert len(epochs[0]) == counts.examples - counts.held_out
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    held_out = {(*e.tokens,) for e in stream.held_out}
    assert len(held_out) == counts.held_out and not held_out & {*epochs[0]}
    # The files are read side by side, not one after the other.
    kinds = [bytes(tokens).startswith(b"text") for tokens in epochs[0]]
    half = len(kinds) // 2
    assert 0 < sum(kinds[:half]) < half and 0 < sum(kinds[half:]) < half


def test_only_the_assistant_is_learned_in_every_turn(tmp_path: Path) -> None:
    stream = stream_of(write_files(tmp_path, 40), length=160)
    found = set()
    for example in all_of(data.Dataset(stream, stream.held_out, False)):
        if example.mask is None:
            continue
        text, mask = bytes(example.tokens), np.frombuffer(example.mask, bool)
        turns = text.decode().split("<assistant>")[1:]
        learned = bytes(np.array(example.tokens)[mask].tolist()).decode()
        assert learned == "".join(turn.split("<user>")[0] for turn in turns)
        # The prompt that is continued is the chat up to the last answer.
        assert text[: example.given].endswith(b"<assistant>") or len(text) == 160
        assert mask[example.given] and not mask[example.given - 1]
        found.add(text.count(b"<assistant>"))
    assert found == {1, 2, 3}


def test_packed_targets_are_those_of_the_mask() -> None:
    mask = bytes([0, 1, 0, 0, 1, 1])
    example = data.spoken("", "", [5, 6, 7, 8, 9, 3], mask)
    assert example is not None and example.start == example.given == 4
    rows = data.pack([example, example], 16)
    assert rows.targets[0].tolist() == [6, -1, -1, 9, 3, -1] * 2 + [-1] * 4
    cut = data.cut(example, 4)
    assert cut is not None and cut.start == 1 and data.cut(example, 1) is None
    assert data.spoken("", "", [5, 6], bytes([1, 0])) is None


def test_truncation_is_counted_and_said(tmp_path: Path, capsys: Any) -> None:
    lines = [{"prompt": "p" * n, "completion": "c" * 4} for n in (1, 3, 5, 8, 9, 2)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / "d.jsonl")]
    dataset = data.load(files, Bytes(), 0, 64, length=8)
    said = capsys.readouterr().out
    assert "4 examples with 29 tokens, 18 of them learned; 1 examples are held out" in said
    assert "the longest has 8 tokens; 1 are truncated and 2 dropped" in said
    assert max(len(e.tokens) for e in all_of(dataset)) == 8
    with pytest.raises(ValueError, match="`--length 1`: no example is left"):
        data.load(files, Bytes(), 0, 64, length=1)


def test_a_row_has_few_targets_more_than_on_average(tmp_path: Path) -> None:
    """The shapes of a step have room for that many, not for a target at every token."""
    lines = [{"prompt": "p" * 20, "completion": "c" * (1 + n % 3)} for n in range(99)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stream = stream_of([str(tmp_path / "d.jsonl")])
    batches = [*Streamed(stream, 10, 4, 1, seed=0)]
    weights = [b["weight"].sum() for b in batches]
    assert batches[0]["at"].shape == (64,) and min(weights) > 24


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_files(tmp_path: Path, monkeypatch: Any) -> None:
    """Files of five times as many lines, with what is constant made small."""
    monkeypatch.setattr(stream_module, "HELD_OUT", 20)
    monkeypatch.setattr(records, "PIECE", 1 << 10)

    def peak(lines: int) -> int:
        files = write_files(tmp_path, lines)
        tracemalloc.start()
        batches = Streamed(stream_of(files), 6, 2, 1, seed=0)
        assert sum(1 for _ in batches) == 6
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(20)  # what is imported and cached
    # Bytes for each line more, of which an example in memory would take a thousand.
    assert peak(3000) - peak(600) < 80 * 2400


def test_text_is_read_in_pieces_of_characters(tmp_path: Path) -> None:
    """A line may be longer than a piece, and is not cut within a character."""
    (tmp_path / "t.txt").write_text("aäß✓" * 30_000)  # 270 kB in one line
    stream = stream_of([str(tmp_path / "t.txt")], length=None)
    text, at = b"", stream.reader.begin()
    while not stream.reader.ended(at):
        found, at = stream.reader.read(at, 1)
        text += b"".join(bytes(e.tokens) for e in found)
    assert text.decode() == "aäß✓" * 30_000
    (tmp_path / "t.txt").write_bytes(b"a" * 70_000 + "ä".encode()[:1])
    with pytest.raises(ValueError, match="not UTF-8"):
        stream_of([str(tmp_path / "t.txt")])


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    files = write_files(tmp_path, 150)
    for file in files:
        stream = stream_of([file])
        Path(file).write_text("")
        with pytest.raises(ValueError, match="has become shorter while it was read"):
            next(stream.rows(Position(0, stream.reader.begin()), 0))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("abc", "abc", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert data.edit_distance(a, b) == data.edit_distance(b, a) == distance


def test_phoneme_error_rate() -> None:
    assert data.phoneme_error_rate([" AH K"], [" AH0 K\nnoise"]) == 0
    assert data.phoneme_error_rate([" AH K", " B IY"], [" AH", ""]) == 0.75
    # What is no phoneme was not said: a model that babbles has missed everything, no more.
    assert data.phoneme_error_rate([" AH K"], [" I do not know how"]) == 1
    assert data.phoneme_error_rate([" AH K"], [" AH AH AH AH K"]) == 1.5
