"""GGUF adapters: what is read back, and what is refused."""

import struct

import gguf as library
import jax.numpy as jnp
import numpy as np
import pytest
from modules import LLAMA, equal, module

import jlora.gguf
from jlora._modules import Module
from jlora.cli._source import config_of
from jlora.gguf._entries import model_config

LAYER = "model.layers.1"
SIZES = {"self_attn.q_proj": 8, "self_attn.k_proj": 4, "self_attn.v_proj": 4, "mlp.down_proj": 8}


def modules(dtype=np.float32, alpha=3.0):
    found = [module(f"{LAYER}.{name}", n, 8, dtype=dtype, alpha=alpha) for name, n in SIZES.items()]
    a, b = (module("lm_head", 20, 8, dtype=dtype, alpha=alpha), module("e", 8, 20, dtype=dtype))
    return [*found, a, Module("model.embed_tokens", b.a, b.b, alpha / 2, "embedding")]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_files_come_back_bit_for_bit(tmp_path, dtype):
    """Also the rows of q and k, which GGUF has in another order; one alpha is kept as it is."""
    file, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    jlora.gguf.save(file, modules(dtype), LLAMA)
    read = jlora.gguf.load(file, LLAMA)
    assert equal(read, modules(dtype))
    jlora.gguf.save(again, read, LLAMA)
    assert file.read_bytes() == again.read_bytes()
    q = next(x for x in library.GGUFReader(file).tensors if x.name == "blk.1.attn_q.weight.lora_b")
    types = {np.float32: "F32", np.float16: "F16", jnp.bfloat16: "BF16"}
    assert q.tensor_type.name == types[dtype]
    if dtype == np.float32:
        own = modules()[0].b
        np.testing.assert_array_equal(np.asarray(q.data)[:4], own[[0, 2, 1, 3]])


def test_alphas_that_differ(tmp_path):
    """s is in B, in float32, and alpha is left out."""
    one, other = module(f"{LAYER}.mlp.up_proj", alpha=3.0), module(f"{LAYER}.mlp.gate_proj")
    other = Module(other.name, other.a, other.b, 0.25)
    jlora.gguf.save(tmp_path / "a.gguf", [one, other], LLAMA)
    read = {m.name: m for m in jlora.gguf.load(tmp_path / "a.gguf", LLAMA)}
    for ours in (one, other):
        found = read[ours.name]
        assert found.scaling == 1.0
        np.testing.assert_array_equal(found.b, ours.b * np.float32(ours.scaling))


def written(tmp_path, tensors, alpha=4.0, **entries):
    """A file of gguf-py's writer."""
    said = {"type": "adapter", "lora": "lora", "arch": "llama", **entries}
    writer = library.GGUFWriter(None, said["arch"])
    writer.add_type(said["type"])
    writer.add_string("adapter.type", said["lora"])
    writer.add_array("adapter.alora.invocation_tokens", [1, 2, 3])
    writer.add_array("names", ["a", "b"])
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, x in tensors.items():
        raw = library.GGMLQuantizationType.Q8_0 if x.dtype == np.uint8 else None
        writer.add_tensor(name, x, raw_dtype=raw)
    writer.write_header_to_file(tmp_path / "a.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def test_what_llama_cpps_converter_writes(tmp_path):
    """One alpha, arrays among the entries, and Q8_0."""
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    packed = library.quantize(rows, library.GGMLQuantizationType.Q8_0)
    b = np.ones((6, 2), np.float32)
    up = "blk.0.ffn_up.weight"
    (found,) = jlora.gguf.load(
        written(tmp_path, {f"{up}.lora_a": packed, f"{up}.lora_b": b}), LLAMA
    )
    assert (found.name, found.scaling) == ("model.layers.0.mlp.up_proj", 2.0)
    np.testing.assert_array_equal(
        found.a, library.dequantize(packed, library.GGMLQuantizationType.Q8_0)
    )
    (found,) = jlora.gguf.load(
        written(tmp_path, {f"{up}.lora_a": rows, f"{up}.lora_b": b}, alpha=0.0), LLAMA
    )
    assert found.scaling == 1.0


A, B = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
UP = {"blk.0.ffn_up.weight.lora_a": A, "blk.0.ffn_up.weight.lora_b": B}
WRONG = {
    "model": ({**UP}, {"type": "model"}, "its general.type is 'model', not 'adapter'"),
    "kind": (UP, {"lora": "alora"}, "its adapter.type is 'alora', not 'lora'"),
    "arch": (UP, {"arch": "qwen2"}, "its general.architecture is 'qwen2', not 'llama'"),
    "alpha": (UP, {"alpha": float("nan")}, "not a finite number"),
    "norm": ({"blk.0.attn_norm.weight": A}, {}, "is no A or B of a tensor of llama"),
    "name": ({"blk.9.ffn_up.weight.lora_a": A}, {}, 'Closest: "blk.'),
    "half": ({"blk.0.ffn_up.weight.lora_a": A}, {}, "has A alone"),
    "ranks": (UP | {"blk.0.ffn_up.weight.lora_b": B[:, :1]}, {}, r"not \(r, in\) and \(out, r\)"),
    "type": (UP | {"blk.0.ffn_up.weight.lora_a": A.astype(np.int32)}, {}, "is of type 26"),
    "empty": ({}, {}, "the file has no tensors"),
}


@pytest.mark.parametrize(("tensors", "said", "part"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path, tensors, said, part):
    with pytest.raises(ValueError, match=rf"`jlora\.gguf\.load\(.*{part}"):
        jlora.gguf.load(written(tmp_path, tensors, **said), LLAMA)


def test_wrong_configurations(tmp_path):
    file = written(tmp_path, UP)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        jlora.gguf.load(tmp_path / "nothing", LLAMA)
    with pytest.raises(ValueError, match="config has num_hidden_layers None"):
        jlora.gguf.load(file, {"model_type": "llama"})
    with pytest.raises(ValueError, match="'mamba' in GGUF is not known"):
        jlora.gguf.load(file, {"model_type": "mamba"})


def header(tensors=0, entries=0, rest=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


def key(name, kind, value=b""):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HUGE = struct.pack("<IQ", 4, 2**60)
DAMAGED = {
    "magic": (header(magic=b"GGUX"), "does not begin as one"),
    "version": (header(version=9), "does not begin as one"),
    "short": (b"GGUF\3", "it ends early"),
    "counts": (header(2**63, 2**63), "it ends early"),
    "length": (header(0, 1, struct.pack("<Q", 2**62)), "it ends early"),
    "array": (header(0, 1, key(b"a", 9, HUGE)), "it ends early"),
    "texts": (header(0, 1, key(b"a", 9, struct.pack("<IQ", 8, 2**60))), "it ends early"),
    "nested": (
        header(0, 1, key(b"a", 9, struct.pack("<IQ", 9, 1) * 9)),
        "it has a value of type 9",
    ),
    "type": (header(0, 1, key(b"a", 77)), "it has a value of type 77"),
    "utf": (header(0, 1, key(b"\xff", 4, b"\0\0\0\0")), "a name is no UTF-8"),
    "dimensions": (header(1, 0, key(b"a", 99)), "has 99 dimensions"),
    "alignment": (
        header(0, 1, key(b"general.alignment", 4, b"\0\0\0\0")),
        "its alignment is 0, not a power of two",
    ),
    "twice": (
        header(2, 0, 2 * key(b"a", 1, struct.pack("<QIQ", 1, 0, 0)) + bytes(64)),
        '"a" twice',
    ),
    "size": (header(1, 0, key(b"a", 2, struct.pack("<QQIQ", 2**40, 2**40, 0, 0))), "it ends early"),
    "offset": (
        header(1, 0, key(b"a", 1, struct.pack("<QIQ", 1, 0, 2**63))),
        "does not begin where",
    ),
}


@pytest.mark.parametrize(("data", "part"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path, data, part):
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"is not a complete GGUF file: .*{part}"):
        jlora.gguf.load(tmp_path / "a.gguf", LLAMA)


def test_the_configuration_of_a_model(tmp_path):
    """A GGUF model, with a tokenizer among its entries, tells what config.json would."""
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    packed = library.quantize(np.ones((2, 32), np.float32), library.GGMLQuantizationType.Q4_1)
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, packed, raw_dtype=library.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert model_config(tmp_path / "m.gguf", "call") == LLAMA
    assert config_of(tmp_path / "m.gguf", "call") == LLAMA  # as `--base` reads it
