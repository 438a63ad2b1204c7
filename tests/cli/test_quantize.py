"""`jlora quantize`: read back by bitsandbytes' layout, by gguf-py, and by transformers."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoints import BFLOAT16, checkpoint, drawn, read, run, tensors_of

import jlora
from jlora import bitsandbytes, quant

SHAPES = {
    "model.embed_tokens.weight": (20, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 128),
    "model.layers.0.mlp.odd.weight": (8, 24),
    "model.layers.0.input_layernorm.weight": (64,),
    "lm_head.weight": (20, 64),
}
Q, DOWN = (f"model.layers.0.{x}.weight" for x in ("self_attn.q_proj", "mlp.down_proj"))


@pytest.mark.parametrize("files", [1, 2])
def test_nf4(tmp_path, capsys, files):
    """The tensors of bitsandbytes, equal to those of `jlora.quantize`; all others unchanged."""
    base = tensors_of(SHAPES)
    folder = checkpoint(tmp_path / "base", base, files)
    run("quantize", folder, tmp_path / "out", "--format", "nf4", "--json")
    said = json.loads(capsys.readouterr().out)
    odd = "model.layers.0.mlp.odd.weight"
    assert said["quantized"] == 2 and odd in said["matrices left"]
    found = read(tmp_path / "out")
    for name in (Q, DOWN):
        ours = bitsandbytes.from_tensors(found, name)
        w = {"w": jnp.asarray(base[name])}
        want = jlora.quantize(w, {"w": "nf4"}, layouts={"w": "oi"})["w"]
        assert ours.dtype == jnp.bfloat16 and ours.shape == base[name].shape
        for part, x in want.parts.items():
            assert np.asarray(ours.parts[part]).tobytes() == np.asarray(x).tobytes()
    for name in set(base) - {Q, DOWN}:
        assert found[name].tobytes() == base[name].tobytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config["quantization_config"]["load_in_4bit"] and config["model_type"] == "llama"
    assert "model.layers.0.mlp.odd" in config["quantization_config"]["llm_int8_skip_modules"]
    assert (tmp_path / "out/tokenizer.json").is_file()
    if files > 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(found)


def test_int8(tmp_path):
    base = tensors_of(SHAPES, np.float32)
    folder = checkpoint(tmp_path / "base", base)
    run("quantize", folder, tmp_path / "out", "--format", "int8", "--targets", ".*q_proj.weight")
    found = read(tmp_path / "out")
    module = Q.removesuffix(".weight")
    codes, scb = found[Q], found[f"{module}.SCB"]
    assert codes.dtype == np.int8 and found[f"{module}.weight_format"].shape == ()
    np.testing.assert_array_equal(scb, np.abs(base[Q]).max(1))
    error = np.abs(codes * (scb / 127)[:, None] - base[Q])
    assert (error <= scb[:, None] / 250).all() and found[DOWN].tobytes() == base[DOWN].tobytes()


@pytest.mark.nightly
@pytest.mark.parametrize(("format", "bound"), [("nf4", 1e-5), ("int8", 0.02)])
@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it(tmp_path, kind, format, bound):
    """Its logits are those of the dequantized weights; bitsandbytes rounds the inputs of int8."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes)
    )
    model.eval().save_pretrained(tmp_path / "base")
    run("quantize", tmp_path / "base", tmp_path / "out", "--format", format)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    tokens, found = torch.tensor([[1, 5, 9, 33, 70]]), read(tmp_path / "out")
    weights, changed = model.state_dict(), 0
    for name in set(weights) & set(found):  # transformers names some heads differently in memory
        stored = found[name]
        if stored.dtype.itemsize == 1:
            if format == "nf4":
                wide = np.asarray(bitsandbytes.from_tensors(found, name).dequantize())
            else:
                wide = stored * (found[name.replace(".weight", ".SCB")] / 127)[:, None]
            weights[name], changed = torch.tensor(np.float32(wide)), changed + 1
    with torch.no_grad():
        plain = model(tokens).logits
        got = loaded.eval()(tokens).logits
        model.load_state_dict(weights)
        want = model(tokens).logits
    assert changed == (14 if kind == "Llama" else 8)
    assert (got - want).norm() < bound * want.norm()
    assert format == "int8" or (plain - want).norm() > 1e-2 * want.norm()


def model_file(file, **entries):
    """A GGUF model with F16 and F32 matrices, and an array among its entries."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_token_list(["a", "b", "c"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(1)
    half = {"token_embd.weight": drawn((3, 64), np.float16)}
    half |= {f"blk.0.{x}.weight": drawn((40, 64), np.float16, n) for n, x in enumerate("ab")}
    single = {"blk.0.attn_norm.weight": drawn(64), "blk.0.c.weight": drawn((2, 32), seed=5)}
    for name, x in (half | single).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return half | single


def test_q4_1(tmp_path, capsys, monkeypatch):
    """gguf-py's own blocks, in several pieces; entries and other tensors as they were."""
    monkeypatch.setattr("jlora.gguf._requantize._CHUNK", 64 * 7)
    tensors = model_file(tmp_path / "m.gguf")
    words = ["quantize", tmp_path / "m.gguf", tmp_path / "q.gguf", "--format", "q4_1"]
    run(*words, "--dry-run")
    assert not (tmp_path / "q.gguf").exists()
    run(*words, "--json")
    said = json.loads(capsys.readouterr().out.partition("(--dry-run)\n")[2])
    assert said["quantized"] == 3 and said["unchanged"] == 2
    old, new = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in "mq")
    kinds = {x.name: x.tensor_type.name for x in new.tensors}
    assert kinds["blk.0.a.weight"] == "Q4_1" and kinds["token_embd.weight"] == "F16"
    for x in new.tensors:
        want = tensors[x.name]
        if x.tensor_type.name == "Q4_1":
            want = gguf.quantize(want.astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
        np.testing.assert_array_equal(x.data, want)
    contents = lambda r: {k: f.contents() for k, f in r.fields.items() if k[:5] != "GGUF."}
    changed = {"general.file_type": 3, "general.quantization_version": 2}
    assert contents(new) == contents(old) | changed
    found = jlora.gguf.read(tmp_path / "q.gguf")
    assert isinstance(found["blk.0.a.weight"], quant.QuantArray)
    run(*words, code=2)
    run(*words, "--overwrite")
    run("quantize", tmp_path / "q.gguf", tmp_path / "r.gguf", "--format", "q4_1")
    assert (tmp_path / "r.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


def broken(tmp_path, case):
    config, words, base = None, [], tmp_path / "base"
    match case:
        case "quantized":
            config = {"quantization_config": {}}
        case "conv1d":
            config = {"model_type": "gpt2"}
        case "bare":
            config = {}
        case "pattern":
            words = ["--targets", "("]
        case "nothing":
            words = ["--targets", "x"]
        case "narrow":
            words = ["--targets", "narrow.weight"]
    shapes = {**SHAPES, "narrow.weight": (64, 48)} if case == "narrow" else SHAPES
    checkpoint(base, tensors_of(shapes), config=config)
    files = ("gguf_of_codes", "weights", "absent", "folder")
    if case in (*files, "targets", "cut", "type", "same", "version"):
        words = ["--targets", "x"] if case == "targets" else []
        if case == "absent":
            return [tmp_path / "nothing", tmp_path / "out", "--format", "q4_1"]
        if case == "gguf_of_codes":
            config = '{"quantization_config": {}, "model_type": "llama"}'
            (base / "config.json").write_text(config)
        elif case == "weights":
            base = base / "model.safetensors"
        elif case == "folder":
            (base / "config.json").write_text('{"model_type": "gpt2"}')
        else:
            base = tmp_path / "m.gguf"
            model_file(base)
        data = bytearray(base.read_bytes()) if base.is_file() else bytearray()
        if case == "cut":
            base.write_bytes(data[:-100])
        if case == "version":
            base.write_bytes(data[:4] + b"\t" + data[5:])
        if case == "type":
            name = b"blk.0.b.weight"
            at = data.index(name) + len(name) + 4 + 16
            data[at] = 99
            base.write_bytes(data)
        return [base, base if case == "same" else tmp_path / "out", "--format", "q4_1", *words]
    return [base, tmp_path / "out", "--format", "nf4", *words]


SAID = {
    "quantized": "is quantized already",
    "conv1d": "whose layers are no `nn.Linear`",
    "bare": "is without a config.json",
    "pattern": "is no regular expression",
    "nothing": "there is no matrix of F64, F32, F16, BF16 to quantize",
    "narrow": "whose number of columns is a multiple of 64 to quantize",
    "folder": "is none of llama, qwen2, qwen3. Convert the folder",
    "absent": "there is no",
    "gguf_of_codes": "BASE is quantized already",
    "weights": "has the weights alone. Pass its folder",
    "targets": "does not use `--targets`",
    "cut": "it ends early",
    "version": "does not begin as one",
    "type": '"blk.0.b.weight" is of type 99',
    "same": "exists. Give another file",
}


@pytest.mark.parametrize("case", SAID)
def test_refused(tmp_path, capsys, case):
    words = broken(tmp_path, case)
    before = sorted(tmp_path.rglob("*"))
    run("quantize", *words, code=2)
    err = capsys.readouterr().err
    assert err.startswith("error: `jlora quantize BASE OUT") and SAID[case] in err
    assert sorted(tmp_path.rglob("*")) == before


def test_onto_itself(tmp_path, capsys):
    model_file(tmp_path / "m.gguf")
    run("quantize", *[tmp_path / "m.gguf"] * 2, "--format", "q4_1", "--overwrite", code=2)
    assert "is BASE. Give another file" in capsys.readouterr().err


def test_a_dry_run(tmp_path, capsys):
    folder = checkpoint(tmp_path / "base", tensors_of(SHAPES, BFLOAT16))
    run("quantize", folder, tmp_path / "out", "--format", "nf4", "--dry-run")
    assert "nothing (--dry-run)" in capsys.readouterr().out and not (tmp_path / "out").exists()
