"""Damaged and hostile files: one clear error, soon, and nothing is written."""

import json
import struct
import time

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import TARGETS, adapter, checkpoint, drawn, q_and_up, tensors_of

from jlora.cli import _output, _safetensors, main

CALL = "call"


def file_of(tmp_path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


WRONG = {
    "not_json": (b"{" * 10, b"", "not a JSON object"),
    "a_list": ([], b"", "not a JSON object"),
    "deep": (b"[" * 100_000, b"", "not a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "metadata is not an object of strings"),
    "no_shape": ({"a": {"dtype": "F32"}}, b"", 'the entry of "a"'),
    "negative": ({"a": entry(shape=(-2,))}, bytes(8), 'the entry of "a"'),
    "bool": ({"a": entry(shape=(True, 2))}, bytes(8), 'the entry of "a"'),
    "huge": ({"a": entry(shape=(2**62, 2**62))}, bytes(8), "has 8 bytes for the shape"),
    "dtype": ({"a": entry(dtype="F4")}, bytes(8), "of dtype 'F4', which is not supported"),
    "gap": ({"a": entry(offsets=(4, 12))}, bytes(12), "overlap or have a gap"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "overlap or have a gap"),
    "short": ({"a": entry()}, bytes(4), "where its header tells"),
    "long": ({"a": entry()}, bytes(12), "where its header tells"),
}


@pytest.mark.parametrize(("header", "data", "said"), WRONG.values(), ids=WRONG)
def test_wrong_headers(tmp_path, header, data, said):
    with pytest.raises(ValueError, match="`call`") as caught:
        _safetensors.header(file_of(tmp_path, header, data), CALL)
    assert said in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 16], ids=["empty", "zero", "long"])
def test_no_header(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its header is cut off or too long"):
        _safetensors.header(path, CALL)


def test_what_is_written_is_read_by_safetensors(tmp_path):
    """Every dtype, scalars and empty tensors; and what it writes is read here."""
    tensors = {
        name: np.arange(6).reshape(2, 3).astype(dtype)
        for name, dtype in _safetensors.DTYPES.items()
    }
    tensors |= {"scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 4), np.float16)}
    targets = {
        name: _safetensors.Target(
            _safetensors.NAMES[x.dtype], x.shape, lambda x=x: iter([_safetensors.as_bytes(x)])
        )
        for name, x in tensors.items()
    }
    file = tmp_path / "x.safetensors"
    with _safetensors.syncing() as sync:
        _safetensors.write(file, targets, {"format": "pt"}, lambda size: None, sync)
    found = dict(safetensors.deserialize(file.read_bytes()))
    for name, x in tensors.items():
        assert found[name]["shape"] == list(x.shape) and bytes(found[name]["data"]) == x.tobytes()
    entries, metadata = _safetensors.header(file, CALL)
    assert metadata == {"format": "pt"} and list(entries) == list(tensors)
    for name, x in tensors.items():
        assert entries[name].read().tobytes() == x.tobytes()
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert length % 8 == 0


def test_a_target_with_other_bytes(tmp_path):
    short = _safetensors.Target("F32", (2,), lambda: iter([b"1234"]))
    with pytest.raises(ValueError, match='"a" has 4 bytes, not 8'):
        _safetensors.write(tmp_path / "x", {"a": short}, {}, lambda size: None, print)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": drawn(4)}, file)
    entries, _ = _safetensors.header(file, CALL)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="ends early"):
        entries["a"].read()
    span = _safetensors.Span(file, entries["a"].start, entries["a"].size)
    with (tmp_path / "x").open("wb") as f, pytest.raises(ValueError, match="ends early"):
        span.copy_to(f)


def index(weights):
    return json.dumps({"weight_map": weights})


CHECKPOINTS = {
    "index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), 'no "weight_map"'),
    "listed": (
        lambda f: (f / "model.safetensors.index.json").write_text(index({"a": "b.safetensors"})),
        'lists "b.safetensors", which is not in',
    ),
    "outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(index({"a": "../x.safetensors"})),
        "which is not in",
    ),
    "twice": (
        lambda f: [
            (f / "b.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
            (f / "model.safetensors.index.json").write_text(
                index({"a": "b.safetensors", "b": "model.safetensors"})
            ),
        ],
        "is in b.safetensors and in model.safetensors",
    ),
    "several": (
        lambda f: (
            [(f / "model.safetensors").rename(f / n) for n in ("b.safetensors",)]
            + [(f / "c.safetensors").write_bytes((f / "b.safetensors").read_bytes())]
        ),
        "has 2 safetensors files and no model.safetensors.index.json",
    ),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is never loaded",
    ),
    "config": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
}


@pytest.mark.parametrize(("damage", "said"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_damaged_checkpoints(tmp_path, capsys, damage, said):
    folder = checkpoint(tmp_path / "base", tensors_of())
    damage(folder)
    path = adapter(tmp_path / "lora", q_and_up(), **TARGETS)
    assert main(["merge", str(folder), str(path), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.nightly)])
def test_mutated_files(tmp_path, capsys, count):
    """Random bytes of a file change, or are cut off: an error of ours, or success."""
    folder = checkpoint(tmp_path / "base", tensors_of())
    path = adapter(tmp_path / "lora", q_and_up(), **TARGETS)
    words = ["merge", str(folder), str(path), str(tmp_path / "out"), "--dry-run"]
    rng = np.random.default_rng(0)
    files = [
        folder / "model.safetensors",
        folder / "config.json",
        path / "adapter_model.safetensors",
        path / "adapter_config.json",
    ]
    failed = 0
    for n in range(count):
        file = files[n % len(files)]
        good = file.read_bytes()
        data = bytearray(good)
        first = min(len(data), 900)  # the header, mostly
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(first)] = rng.integers(256)
        if n % 5 == 0:
            data = data[: rng.integers(len(data))]
        file.write_bytes(bytes(data))
        begun = time.monotonic()
        failed += main(words) == 2
        assert time.monotonic() - begun < 2
        file.write_bytes(good)
    capsys.readouterr()
    assert failed > count / 2 and main(words) == 0 and not (tmp_path / "out").exists()


def test_without_safetensors(monkeypatch, capsys):
    def fails(name):
        raise ModuleNotFoundError(name="safetensors")

    monkeypatch.setattr("jlora.cli.import_module", fails)
    assert main(["merge"]) == 2
    assert capsys.readouterr().err == (
        "error: `jlora` needs safetensors: `pip install 'jlora[peft]'`.\n"
    )


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"], ["merge"], ["nothing"]])
def test_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == (0 if "--help" in words else 2)
    said = capsys.readouterr()
    assert "usage: jlora" in said.out + said.err


def test_sizes():
    assert _output.bytes_of("5GB") == 5 * 10**9 and _output.bytes_of("1.5 kb") == 1500
    assert _output.shown(5 * 10**9) == "5 GB" and _output.shown(12) == "12 B"
    for text in ("", "GB", "-1GB", "much", "0", "infGB"):
        with pytest.raises(ValueError, match="a size is a number with B, KB, MB, GB or TB"):
            _output.bytes_of(text)
