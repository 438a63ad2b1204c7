"""`jlora convert` between all formats: the source's is found, the update stays the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import D, adapter, drawn, pair

import jlora.diffusers
import jlora.gguf
import jlora.kohya
import jlora.mlx
from jlora._modules import Module
from jlora.cli import main
from jlora.cli._source import open_source

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def run(*words, code=0):
    assert main(["convert", *map(str, words)]) == code


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "base"


def updates(path, base=None):
    """s B A of every module, and their dtypes."""
    modules = open_source(path, base, "read").modules
    dtypes = {x.dtype.name for m in modules for x in (m.a, m.b)}
    return dtypes, {
        m.name: m.scaling
        * np.tensordot(m.b.astype(np.float64).reshape(len(m.b), -1), m.a.astype(np.float64), 1)
        for m in modules
    }


def same(ours, theirs):
    assert ours[0] == theirs[0] and ours[1].keys() == theirs[1].keys() and ours[1]
    for name, x in ours[1].items():
        np.testing.assert_allclose(x, theirs[1][name], rtol=1e-6, atol=1e-7)
    return True


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_language_model_around_all_formats(tmp_path, base, capsys, dtype):
    """PEFT to GGUF, to MLX, to vLLM's subset, to PEFT: one update, and the dtype of the file."""
    lora = {k: x.astype(dtype) for k, x in (pair(Q, D, D) | pair(UP, 12, D, seed=1)).items()}
    first = adapter(tmp_path / "lora", lora, target_modules=["q_proj", "up_proj"])
    want = updates(first)
    assert want[0] == {np.dtype(dtype).name}
    run(first, tmp_path / "a.gguf", "--to", "gguf", "--base", base, "--json")
    assert json.loads(capsys.readouterr().out)["from"] == "peft"
    run(tmp_path / "a.gguf", tmp_path / "mlx", "--to", "mlx", "--base", base, "--json")
    assert json.loads(capsys.readouterr().out)["from"] == "gguf"
    run(tmp_path / "mlx", tmp_path / "peft", "--to", "peft", "--json")
    assert json.loads(capsys.readouterr().out)["from"] == "mlx"
    for path in (tmp_path / "a.gguf", tmp_path / "mlx", tmp_path / "peft"):
        assert same(updates(path, base), want)
    again = safetensors.safe_open(tmp_path / "peft/adapter_model.safetensors", "np")
    assert set(again.keys()) == {f"base_model.model.{name}" for name in lora}
    run(tmp_path / "mlx", tmp_path / "vllm", "--to", "vllm")
    assert updates(tmp_path / "vllm")[1].keys() == want[1].keys()


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.3.mlp.fc1"


@pytest.mark.parametrize("dora", [False, True])
def test_a_pipeline_around_all_formats(tmp_path, capsys, dora):
    """kohya to diffusers, to a PEFT folder for each model, and back, with convolutions."""
    m = (lambda n: drawn(n, seed=n)) if dora else (lambda n: None)
    modules = [
        Module(f"unet.{BLOCK}", drawn((2, 4)), drawn((6, 2)), 0.75, magnitude=m(6)),
        Module(
            "unet.mid_block.resnets.0.conv1",
            *(drawn((3, 4, 3, 3)), drawn((5, 3, 1, 1)), 2.0, "conv", m(5)),
        ),
        Module(f"text_encoder.{TEXT}", drawn((2, 4)), drawn((8, 2)), 0.5, magnitude=m(8)),
    ]
    jlora.kohya.save(tmp_path / "a.safetensors", modules)
    want = updates(tmp_path / "a.safetensors")
    order = [("diffusers", "b"), ("peft", "c"), ("kohya", "d.safetensors"), ("peft", "e")]
    order += [("diffusers", "f"), ("kohya", "g.safetensors")]
    source, formats = tmp_path / "a.safetensors", []
    for to, name in order:
        run(source, tmp_path / name, "--to", to, "--json")
        formats.append(json.loads(capsys.readouterr().out)["from"])
        source = tmp_path / name
        assert same(updates(source), want), name
    several = "peft, a folder for each model"
    assert formats == ["kohya", "diffusers", several, "kohya", several, "diffusers"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["text_encoder", "unet"]
    unet = safetensors.numpy.load_file(tmp_path / "c/unet/adapter_model.safetensors")
    assert f"base_model.model.{BLOCK}.lora_A.weight" in unet
    # One model's folder gets its component back.
    run(tmp_path / "c/unet", tmp_path / "u", "--to", "diffusers")
    assert set(updates(tmp_path / "u")[1]) == {m.name for m in modules[:2]}
    run(tmp_path / "c/text_encoder", tmp_path / "t.safetensors", "--to", "kohya")
    assert set(updates(tmp_path / "t.safetensors")[1]) == {modules[2].name}


def test_dry_runs_write_nothing(tmp_path, base, capsys):
    first = adapter(tmp_path / "lora", pair(Q, D, D), target_modules=["q_proj"])
    before = sorted(tmp_path.rglob("*"))
    for to in ("gguf", "mlx", "vllm", "peft"):
        run(first, tmp_path / "out", "--to", to, "--base", base, "--dry-run")
        assert "nothing (--dry-run)" in capsys.readouterr().out
    run(first, tmp_path / "out", "--to", "kohya", "--dry-run", code=2)
    assert "is linear of" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_no_room(tmp_path, capsys, monkeypatch):
    first = adapter(tmp_path / "lora", pair(Q, D, D), target_modules=["q_proj"])
    free = lambda path: type("Usage", (), {"free": 10})
    monkeypatch.setattr("jlora.cli._output.shutil.disk_usage", free)
    run(first, tmp_path / "out", "--to", "peft", code=2)
    assert "has 10 B free. Nothing was written" in capsys.readouterr().err


def test_sources_that_are_none(tmp_path, capsys):
    (tmp_path / "a.lora.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(8))
    (tmp_path / "a.txt").write_text("text")
    for name, said in {
        "a.lora.h5": "numbers the layers of its model",
        "a.txt": "is neither .safetensors nor GGUF",
        "nothing": "there is no",
    }.items():
        run(tmp_path / name, tmp_path / "out", "--to", "peft", code=2)
        assert said in capsys.readouterr().err


def test_a_dtype_too_narrow(tmp_path, capsys):
    lora = {k: x * np.float32(1e6) for k, x in pair(Q, D, D).items()}
    first = adapter(tmp_path / "lora", lora, target_modules=["q_proj"])
    run(first, tmp_path / "out", "--to", "peft", "--dtype", "float16", code=2)
    assert "values that are not finite in float16" in capsys.readouterr().err
    run(first, tmp_path / "out", "--to", "peft", "--dtype", "bfloat16")
    assert updates(tmp_path / "out")[0] == {"bfloat16"}
