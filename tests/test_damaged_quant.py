"""Damaged files of quantized weights: read right, or refused soon in one paragraph.

A change inside the numbers of a tensor, or to another type of the same size, cannot be told from
another model. All other changes have to be found.
"""

import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
import pytest
import weights
from helpers import bits
from jaxtyping import TypeCheckError
from quantized import is_quant, one
from safetensors.numpy import load_file, save_file
from tiny_gguf import write_gguf
from tiny_llama import TINY, write_model

import jlora
import jlora.bitsandbytes
import jlora.gguf
from jlora import quant
from jlora.quant._formats import FORMATS, GGML

SECONDS, BYTES = 2, 1 << 30  # for one file
ODD = (0, 1, 2**16, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1)
WIDE = {**TINY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
seeds = pytest.mark.parametrize(
    ("first", "count"), [(0, 25), pytest.param(25, 1000, marks=pytest.mark.nightly)]
)


class Change(NamedTuple):
    """A damaged file: its bytes, and where they begin to differ and how many are changed."""

    data: bytes
    at: int
    size: int


def change(data: bytes, header: int, rng: random.Random) -> Change:
    """Cut, lengthen, or change, insert or remove bytes of the header."""
    at, kind = rng.randrange(header), rng.randrange(7)
    if kind == 0:
        at = rng.randrange(len(data))
        return Change(data[:at], at, len(data) - at)
    if kind == 1:
        return Change(data + rng.randbytes(rng.choice((1, 32, 4000))), len(data), 0)
    more = rng.choice((1, 2, 4, 8))
    if kind == 2:
        return Change(data[:at] + rng.randbytes(more) + data[at:], at, header - at)
    if kind == 3:
        return Change(data[:at] + data[at + more :], at, header - at)
    if kind == 4:
        odd = rng.choice(ODD).to_bytes(8, "little")
        return Change(data[:at] + odd + data[at + 8 :], at, 8)
    return Change(data[:at] + rng.randbytes(1) + data[at + 1 :], at, 1)


def refused(run: Callable[[], Any], path: str) -> str | None:
    """The message, if the file is refused; the bounds hold either way."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = None
    try:
        run()
    except (ValueError, KeyError) as error:
        said = str(error.args[0])
        assert not isinstance(error, TypeCheckError), said
        assert "\n" not in said and len(said) < 1000 and path in said and said[-1] in ".`'\"", said
    assert time.perf_counter() - begin < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    return said


def leaves(tree: Any) -> dict[str, list[bytes]]:
    """The bits of each weight, and what is known of it."""
    found = jax.tree.leaves_with_path(tree, is_leaf=is_quant)
    known = lambda x: f"{x.format} {x.shape}".encode() if is_quant(x) else str(x.shape).encode()
    return {
        jax.tree_util.keystr(path): [known(x), *map(bits, jax.tree.leaves(x))] for path, x in found
    }


def every_type(path: Path) -> bytes:
    """A file with a tensor of every type that is read, and rows in llama.cpp's order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list(["a", "b"])
    rng = np.random.default_rng(0)
    w = rng.normal(size=(256, 256)).astype(np.float32)
    eight = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("norm", w[0])
    for name, rows in (("blk.0.attn_q.weight", 256), ("blk.0.attn_k.weight", 128)):
        writer.add_tensor(name, gguf.quantize(w[:rows], eight), raw_dtype=eight)
    for format in GGML:
        data = jlora.gguf.blocks(one(format.name))
        writer.add_tensor(str(format), data, raw_dtype=gguf.GGMLQuantizationType[str(format)])
    writer.add_tensor("half", w[:3].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def types_of(data: bytes, names: list[str]) -> Iterator[tuple[str, int]]:
    """Where the type of each tensor is in the header."""
    for name in names:
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        yield name, at + 4 + 8 * struct.unpack_from("<I", data, at)[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int, dict[str, list[bytes]]]:
    """An intact file, the length of its header, and its tensors."""
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    data = every_type(path)
    reader = gguf.GGUFReader(path)
    return data, int(reader.tensors[0].data_offset), leaves(jlora.gguf.read(path))


@seeds
def test_gguf(first: int, count: int, good: Any, tmp_path: Path) -> None:
    data, header, clean = good
    of_type = {f"['{name}']": at for name, at in types_of(data, [x[2:-2] for x in clean])}
    bad, done = tmp_path / "bad.gguf", 0
    for seed in range(first, first + count):
        made = change(data, header, random.Random(seed))
        bad.write_bytes(made.data)
        found: dict[str, Any] = {}
        if refused(lambda found=found: found.update(jlora.gguf.read(bad)), str(bad)):
            done += 1
            continue
        for name, got in leaves(found).items():
            touched = made.at < of_type.get(name, 0) + 4 and made.at + made.size > of_type.get(
                name, len(data)
            )
            assert name not in clean or got == clean[name] or touched, (seed, name)
    assert count / 3 < done < count


def test_every_length_of_a_header_in_turn(good: Any, tmp_path: Path) -> None:
    """Whatever eight bytes are replaced by a huge number, and wherever the file is cut."""
    data, header, clean = good
    bad = tmp_path / "bad.gguf"
    for at in range(8, header - 8, 97):
        bad.write_bytes(data[:at] + b"\xff" * 7 + b"\x7f" + data[at + 8 :])
        assert (
            refused(lambda: jlora.gguf.check(bad), str(bad))
            or leaves(jlora.gguf.read(bad)).items() & clean.items()
        )
    for at in range(0, len(data) - 32, 9973):
        bad.write_bytes(data[:at])
        assert refused(lambda: jlora.gguf.check(bad), str(bad))


def test_heads_of_another_width(good: Any, tmp_path: Path) -> None:
    """Rows of q and k in the wrong order would be a model that is wrong in silence."""
    data, bad = good[0], tmp_path / "bad.gguf"
    for key, old, new in (("head_count", 4, 8), ("head_count_kv", 2, 4), ("length", 256, 512)):
        key = "llama.embedding_length" if key == "length" else f"llama.attention.{key}"
        at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
        assert struct.unpack_from("<I", data, at) == (old,)
        bad.write_bytes(data[:at] + struct.pack("<I", new) + data[at + 4 :])
        with pytest.raises(ValueError, match=r"bad\.gguf.*rows for \d heads, but the metadata has"):
            jlora.gguf.read(bad)
    bad.write_bytes(data.replace(b"llama.attention", b"lmama.attention"))
    with pytest.raises(ValueError, match=r"general\.architecture='llama', but the number of heads"):
        jlora.gguf.check(bad)
    with pytest.raises(FileNotFoundError, match=r"gguf\.check\('.*none'\)`: there is no such file"):
        jlora.gguf.check(tmp_path / "none")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, Any]]:
    """A model as a GGUF file, and as a folder with weights of bitsandbytes."""
    place = tmp_path_factory.mktemp("models")
    path, folder = write_gguf(place / "m.gguf", WIDE), write_model(place / "folder", WIDE)
    tensors: dict[str, np.ndarray] = {}
    for name, x in load_file(folder / "model.safetensors").items():
        tensors[name] = x
        if "_proj" in name:
            kept = {"w": jax.numpy.asarray(x)}
            w = jlora.quantize(kept, {"w": "nf4"}, layouts={"w": "oi"})["w"]
            tensors |= jlora.bitsandbytes.to_tensors(w, name)
    save_file(tensors, folder / "model.safetensors")
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**WIDE, "quantization_config": said}))
    headers = int(gguf.GGUFReader(path).tensors[0].data_offset), 8
    with (folder / "model.safetensors").open("rb") as f:
        headers = headers[0], 8 + int.from_bytes(f.read(8), "little")
    clean = [leaves(weights.load(str(x), keep=True)[1]) for x in (path, folder)]
    return {"gguf": (path, headers[0], clean[0]), "nf4": (folder, headers[1], clean[1])}


@pytest.mark.parametrize("kind", ["gguf", "nf4"])
@pytest.mark.parametrize(
    ("first", "count"), [(0, 6), pytest.param(6, 300, marks=pytest.mark.nightly)]
)
def test_models_of_the_examples(
    first: int, count: int, kind: str, models: Any, tmp_path: Path
) -> None:
    """Read by `examples/weights.py`, as stored, after one change of the weights' file."""
    path, header, clean = models[kind]
    bad = tmp_path / path.name
    if path.is_dir():
        shutil.copytree(path, bad)
    file = bad if path.is_file() else bad / "model.safetensors"
    data = (path if path.is_file() else path / "model.safetensors").read_bytes()
    for seed in range(first, first + count):
        made = change(data, header, random.Random(seed))
        file.write_bytes(made.data)
        found: list[Any] = []
        read = lambda found=found: found.append(weights.load(str(bad), keep=True)[1])
        if refused(read, str(bad)):
            continue
        got = leaves(found[0])
        other = [k for k in clean if got[k] != clean[k]]
        # At most one tensor, whose type is another of its size.
        assert got.keys() == clean.keys() and len(other) <= 1, (seed, other)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 40), pytest.param(40, 3000, marks=pytest.mark.nightly)]
)
def test_a_state_of_bitsandbytes(first: int, count: int) -> None:
    """Its JSON, its tensors' names and dtypes, and how many numbers they have."""
    w = one("nf4")
    good = jlora.bitsandbytes.to_tensors(w, "m")
    key, want = "m.quant_state.bitsandbytes__nf4", leaves(w)[""]
    for seed in range(first, first + count):
        rng, tensors = random.Random(seed), dict(good)
        if rng.random() < 0.7:
            made = change(good[key].tobytes(), good[key].size, rng)
            tensors[key] = np.frombuffer(made.data, np.uint8)
        else:
            name = rng.choice(list(tensors))
            x = tensors.pop(name)
            cut = x.reshape(-1)[: rng.randrange(x.size + 1)]
            tensors[rng.choice((name, "other"))] = rng.choice((cut, x.astype(np.float32), x[:0]))
        found: list[Any] = []
        read = lambda tensors=tensors, found=found: found.append(
            jlora.bitsandbytes.from_tensors(tensors, "m")
        )
        if refused(read, "'m'") is None:
            got = leaves(found[0])[""]
            # All but the number that is added to the scales, which is a part of the JSON.
            offset = sorted(w.parts).index("offset") + 1
            for k, (a, b) in enumerate(zip(got, want, strict=True)):
                assert a == b or k == offset, (seed, k)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_leaf_has_no_gradient(name: str) -> None:
    with pytest.raises(TypeError, match=r'attach.*"a/w".*is stored as `.*`, which has no gradient'):
        jlora.attach({"a": {"w": one(name)}}, {"a/w": "full"}, key=jax.random.key(0))


VALUES = {
    "normal": lambda x: x,
    "zeros": lambda x: 0 * x,
    "tiny": lambda x: x * np.float32(1e-42),
    "largest": lambda x: np.sign(x) * np.finfo(np.float32).max,
    "infinite": lambda x: np.where(x > 2, np.inf, x),
    "nan": lambda x: np.where(x > 2, np.nan, x),
}


@pytest.mark.parametrize(
    "count", [12, pytest.param(600, marks=pytest.mark.nightly)], ids=["ci", "nightly"]
)
def test_quantize(count: int) -> None:
    """Any format, block, shape, layout and dtype: near the weight, or refused with its path."""
    for seed in range(count):
        rng = random.Random(seed)
        formats = (*FORMATS, "nf3", "", quant.NF4(rng.choice((2, 10, 64)), False), quant.Int4(6))
        format, kind = rng.choice(formats), rng.choice(list(VALUES))
        dims = [rng.choice((1, 2, 6, 10, 32, 64, 256)) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
        layout = rng.choice((None, "io", "oi", "ioo", "iio", "i"))
        dtype = rng.choice(("float32", "bfloat16", "float16", "int32"))
        x = np.random.default_rng(seed).normal(size=dims).astype(np.float32)
        with np.errstate(all="ignore"):
            x = jax.numpy.asarray(VALUES[kind](x)).astype(dtype)
        run = lambda format=format, x=x, layout=layout: jlora.quantize(
            {"a": {"w": x}}, {"a/w": format}, layouts={"a/w": layout} if layout else None
        )
        try:
            if refused(run, "a/w") is not None:
                continue
        except TypeError as error:
            assert "a/w" in str(error) and dtype == "int32"
            continue
        made = run()["a"]["w"]
        built = np.asarray(made.dequantize()).astype(np.float32)
        wide = np.asarray(x).astype(np.float32)
        most = np.abs(wide).max()
        assert made.shape == x.shape and made.dtype == x.dtype
        assert np.isfinite(built).all(), (seed, format, kind, dtype)
        assert np.abs(built - wide).max() <= max(0.3 * most, 1e-7), (seed, format, kind, dtype)
