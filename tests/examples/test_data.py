"""Data: the complaints by line, packing, batches, and the score."""

import itertools
import json
import types
from pathlib import Path
from typing import Any

import data
import numpy as np
import pytest
from tiny_llama import byte_tokenizer

GOOD = '{"prompt": "a", "completion": "b"}'


def load(path: Path, context: int = 96) -> data.Dataset:
    return data.load(str(path), byte_tokenizer(), 256, context)


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
    assert {e.prompt for e in dataset.train + dataset.held_out} == {"a\u2028b", "a"}


def test_only_the_completion_is_learned(pairs: Path) -> None:
    dataset = load(pairs)
    assert len(dataset.train) == 36 and len(dataset.held_out) == 4 and not dataset.phonemes
    tokenizer = byte_tokenizer()
    for example in dataset.train:
        learned = example.tokens[example.start :]
        assert learned == [*tokenizer.encode(example.completion).ids, 256]
        assert tokenizer.decode(example.tokens[: example.given]) == example.prompt


def test_text_learns_every_token(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefgh" * 40)
    dataset = load(tmp_path / "t.txt")
    examples = dataset.train + dataset.held_out
    assert sum(len(e.tokens) for e in examples) == 320
    assert max(len(e.tokens) for e in examples) == 96
    assert {(e.start, e.given) for e in examples} == {(1, 16)}


class NoTokens:
    """Stands in for a tokenizer where only the words matter: there are 100,000 of them."""

    def encode_batch_fast(self, texts: list[str], **_: Any) -> list[Any]:
        return [types.SimpleNamespace(ids=[0])] * len(texts)


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
