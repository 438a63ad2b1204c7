"""GGUF's blocks against gguf-py, bit for bit: random ones, and those of a real file."""

import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

import jlora
import jlora.gguf
from jlora import quant
from jlora.quant._formats import GGML
from jlora.quant.ggml import Ggml, fields_of, records

formats = pytest.mark.parametrize("format", GGML, ids=str)


def kind(format: Ggml) -> Any:
    return gguf.GGMLQuantizationType[str(format)]


def bits(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN scales
@formats
def test_random_blocks(format):
    """Any bytes, eagerly and compiled; the bytes come back from the fields."""
    assert (format.block, format.record) == gguf.GGML_QUANT_SIZES[kind(format)]
    data = np.random.default_rng(0).integers(0, 256, (5, 3 * format.record), dtype=np.uint8)
    parts = fields_of(format, data)
    want = gguf.dequantize(data, kind(format))
    np.testing.assert_array_equal(bits(format.unpack(parts)), bits(want))
    np.testing.assert_array_equal(bits(jax.jit(format.unpack)(parts)), bits(want))
    np.testing.assert_array_equal(records(format, parts), data)


@pytest.mark.parametrize("format", [x for x in GGML if x.write is not None], ids=str)
def test_quantized_to_the_same_bytes(format):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(40, 96)).astype(np.float32) * np.float32(2.0) ** rng.integers(
        -9, 9, (40, 1)
    )
    w[0], w[1, :32], w[2, 5] = 0, 1.5, 4 * w[2].max()
    w[3] = np.round(w[3] * 16 / np.abs(w[3]).max())  # ties
    stored = jlora.quantize({"w": jnp.asarray(w)}, {"w": format}, layouts={"w": "oi"})["w"]
    want = gguf.quantize(w, kind(format))
    np.testing.assert_array_equal(jlora.gguf.blocks(stored), want)
    np.testing.assert_array_equal(
        bits(stored.dequantize()), bits(gguf.dequantize(want, kind(format)))
    )


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_real_file(every):
    """SmolLM2's tensors: values equal to gguf-py's, bytes equal to the file's."""
    path = weights.fetch()
    found, tensors = jlora.gguf.read(path), gguf.GGUFReader(path).tensors
    assert list(found) == [x.name for x in tensors]
    built = jax.jit(lambda w: w.dequantize())
    seen = set()
    for tensor in tensors if every else tensors[5:9]:
        ours, want = found[tensor.name], gguf.dequantize(tensor.data, tensor.tensor_type)
        if not isinstance(ours, quant.QuantArray):
            np.testing.assert_array_equal(bits(ours), bits(want))
            continue
        heads = {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2])
        if heads:
            rows = want.reshape(heads, -1, 2, want.shape[1])
            want = rows.swapaxes(1, 2).reshape(want.shape)
        np.testing.assert_array_equal(bits(built(ours)), bits(want))
        raw = np.asarray(tensor.data).reshape(want.shape[0], -1)
        np.testing.assert_array_equal(jlora.gguf.blocks(ours, heads), raw)
        seen.add(str(ours.format))
        if str(ours.format) == "Q4_1":
            assert ours.nbytes <= 0.17 * 4 * ours.size
    assert seen == ({"Q8_0", "Q4_1"} if every else {"Q4_1"})


def write(path: Path, tensors: dict[str, Any], **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q8, Q2 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q2_K
W = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
BLOCKS = gguf.quantize(W, Q8)


def test_other_types_shapes_and_layouts(tmp_path):
    brain = gguf.quantize(W, gguf.GGMLQuantizationType.BF16)
    tensors = {
        **{"half": W.astype(np.float16), "full": W, "vector": W[0]},
        "brain": (brain, gguf.GGMLQuantizationType.BF16),
        "experts": (np.stack([BLOCKS, BLOCKS[::-1]]), Q8),
        "blk.0.attn_q.weight": (BLOCKS, Q8),
    }
    path = write(tmp_path / "a.gguf", tensors, architecture="other")
    found = jlora.gguf.read(path)
    np.testing.assert_array_equal(found["half"], W.astype(np.float16))
    np.testing.assert_array_equal(found["vector"], W[0])
    assert found["brain"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(bits(found["brain"]), bits(jnp.asarray(W).astype(jnp.bfloat16)))
    experts = found["experts"]
    assert experts.shape == (2, 8, 64) and experts.stack == 1
    one = gguf.dequantize(BLOCKS, Q8)
    np.testing.assert_array_equal(experts.dequantize()[1], one[::-1])
    np.testing.assert_array_equal(jlora.gguf.blocks(experts)[0], BLOCKS)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"].dequantize(), one)  # not a llama
    kernel = experts.as_layout("io", (64, 8))
    assert kernel.shape == (2, 64, 8)
    np.testing.assert_array_equal(kernel.dequantize()[0], one.T)
    heads = experts.as_layout("ioo", [64, 2, 4]).dequantize()
    np.testing.assert_array_equal(heads[0], one.T.reshape(64, 2, 4))
    for layout, dims in (("io", (8, 64)), ("ioo", (64, 8)), ("io", (64, 4, 2))):
        with pytest.raises(ValueError, match=r"as_layout\(.*has 64 inputs and 8 outputs"):
            experts.as_layout(layout, dims)


def test_damaged_files(tmp_path):
    good = write(tmp_path / "good.gguf", {"a.weight": (BLOCKS, Q8), "b.weight": W})
    data, bad = good.read_bytes(), tmp_path / "bad.gguf"
    for size in (0, 3, 20, 100, len(data) // 2, len(data) - 40):
        bad.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"jlora\.gguf\.read\('.*bad\.gguf'\).*truncated"):
            jlora.gguf.read(bad)
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a"
    for long in (("<IIQ", 9, 8, 2**60), ("<IIQ", 9, 4, 2**60), ("<IQ", 8, 2**60)):
        bad.write_bytes(head + struct.pack(*long) + bytes(64))
        with pytest.raises(ValueError, match=r"bad\.gguf.*it ends early"):
            jlora.gguf.read(bad)
    at = data.index(BLOCKS[0, :34].tobytes())
    bad.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
    with pytest.raises(ValueError, match=r'bad\.gguf.*scales \'d\' of "a\.weight" Q8_0\[8,64\]'):
        jlora.gguf.read(bad)
    with pytest.raises(FileNotFoundError, match=r"jlora\.gguf\.read\('.*none.*there is no such"):
        jlora.gguf.read(tmp_path / "none.gguf")
    two = np.zeros((2, 84), np.uint8)
    write(bad, {"a.weight": (two, Q2)})
    with pytest.raises(ValueError, match=r'"a\.weight" Q2_K\[2,256\] is of a type.*Q4_0, Q4_1'):
        jlora.gguf.read(bad)


def test_heads_that_do_not_fit(tmp_path):
    bad, tensors = tmp_path / "bad.gguf", {"blk.0.attn_k.weight": (BLOCKS, Q8)}
    write(bad, tensors)
    with pytest.raises(ValueError, match=r'bad\.gguf.*"blk\.0\.attn_k\.weight".*has None for it'):
        jlora.gguf.read(bad)
    write(bad, tensors, head_count=3)
    with pytest.raises(ValueError, match=r"Q8_0\[8,64\] do not divide into 3 heads of even"):
        jlora.gguf.read(bad)
    stored = jlora.quantize({"w": jnp.asarray(W)}, {"w": "nf4"}, layouts={"w": "oi"})["w"]
    with pytest.raises(ValueError, match=r"is stored as NF4\(.*which is no format of GGUF"):
        jlora.gguf.blocks(stored)
