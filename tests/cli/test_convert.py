"""`jlora convert`: what llama.cpp, MLX-LM and vLLM read."""

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import VOCAB, D, adapter, drawn, pair
from helpers import says
from modules import LLAMA

import jlora.gguf
import jlora.mlx
from jlora._modules import Module
from jlora.cli import main


def base(tmp_path, config=LLAMA):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*words, code=0):
    assert main(["convert", *map(str, words)]) == code


def read(file):
    reader = gguf.GGUFReader(file)
    said = {k: field.contents() for k, field in reader.fields.items() if not k.startswith("GGUF.")}
    return said, {t.name: np.array(t.data) for t in reader.tensors}


def half_split(x, angles):
    """The rotary embedding of transformers: element k turns with element k + n/2."""
    first, second = np.split(x, 2)
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
    )


def interleaved(x, angles):
    """The rotary embedding of llama.cpp for Llama: neighbors turn with each other."""
    even, odd = x[::2], x[1::2]
    out = np.empty_like(x)
    out[::2] = even * np.cos(angles) - odd * np.sin(angles)
    out[1::2] = odd * np.cos(angles) + even * np.sin(angles)
    return out


def test_attention_is_the_same_after_the_rotary_embedding(tmp_path):
    """⟨q, k⟩ of every head, with our order and its embedding, and with GGUF's and its own."""
    attention = "model.layers.1.self_attn."
    lora = pair(attention + "q_proj", D, D) | pair(attention + "k_proj", D // 2, D, seed=1)
    path = adapter(tmp_path / "lora", lora, target_modules=["q_proj", "k_proj"])
    run(path, tmp_path / "a.gguf", "--to", "gguf", "--base", base(tmp_path))
    said, tensors = read(tmp_path / "a.gguf")
    x, angles = drawn(D, seed=3), np.array([0.3, 1.1])

    def ours(name):
        a, b = (lora[f"{attention}{name}.lora_{k}.weight"] for k in "AB")
        return [half_split(h, angles) for h in (3 * b @ (a @ x)).reshape(-1, 4)]

    def theirs(name):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{k}"] for k in "ab")
        s = said["adapter.lora.alpha"] / len(a)
        return [interleaved(h, angles) for h in (s * b @ (a @ x)).reshape(-1, 4)]

    (k,), (other,) = ours("k_proj"), theirs("attn_k")
    for q, p in zip(ours("q_proj"), theirs("attn_q"), strict=True):
        np.testing.assert_allclose(q @ k, p @ other, rtol=1e-5)
    assert not np.allclose(ours("q_proj")[0], theirs("attn_q")[0])


def test_what_is_written(tmp_path, capsys):
    """Every scaling is in B: alpha patterns, rsLoRA, ranks by module."""
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    lora = pair(up, 12, D) | pair(down, D, 12, 3, seed=1) | pair("lm_head", VOCAB, D, seed=2)
    lora["model.embed_tokens.lora_embedding_A"] = drawn((2, VOCAB), seed=4)
    lora["model.embed_tokens.lora_embedding_B"] = drawn((D, 2), seed=5)
    said = {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"lm_head": 5},
        "target_modules": ["up_proj", "down_proj", "lm_head", "embed_tokens"],
    }
    path = adapter(tmp_path / "lora", lora, **said)
    words = [path, tmp_path / "a.gguf", "--to", "gguf", "--base", base(tmp_path)]
    run(*words, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["weights"] == 4 and report["ranks"] == [2, 3]
    said, tensors = read(tmp_path / "a.gguf")
    assert said["general.architecture"] == "llama" and said["general.type"] == "adapter"
    assert said["adapter.type"] == "lora" and "adapter.lora.alpha" not in said
    s = {"blk.0.ffn_up": 6 / 2**0.5, "blk.1.ffn_down": 6 / 3**0.5, "output": 5 / 2**0.5}
    for (name, by), module in zip(s.items(), (up, down, "lm_head"), strict=True):
        a, b = (lora[f"{module}.lora_{k}.weight"] for k in "AB")
        np.testing.assert_array_equal(tensors[f"{name}.weight.lora_a"], a)
        np.testing.assert_allclose(tensors[f"{name}.weight.lora_b"], by * b, rtol=1e-6)
    a = lora["model.embed_tokens.lora_embedding_A"]
    np.testing.assert_array_equal(tensors["token_embd.weight.lora_a"], a.T)
    assert len(tensors) == 8 and len(list(tmp_path.iterdir())) == 3
    run(*words, code=2)
    run(*words, "--overwrite", "--dtype", "float16")
    assert {x.dtype for x in read(tmp_path / "a.gguf")[1].values()} == {np.dtype(np.float16)}


def test_qwen_is_not_permuted(tmp_path):
    q = "model.layers.0.self_attn.q_proj"
    lora = pair(q, D, D)
    path = adapter(tmp_path / "lora", lora, target_modules=["q_proj"])
    config = {"model_type": "qwen2", "num_hidden_layers": 1}
    run(path, tmp_path / "a.gguf", "--to", "gguf", "--base", base(tmp_path, config))
    said, tensors = read(tmp_path / "a.gguf")
    b = tensors["blk.0.attn_q.weight.lora_b"]
    np.testing.assert_array_equal(b, lora[f"{q}.lora_B.weight"])
    assert said["adapter.lora.alpha"] == 6


A, B = drawn((2, D)), drawn((D, 2))
Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "architecture": (Module(Q, A, B, 1.0), {**LLAMA, "model_type": "mamba"}, "'mamba' in GGUF"),
    "name": (Module("model.layers.0.self_attn.qproj", A, B, 1.0), LLAMA, "is no tensor of llama"),
    "layer": (Module(Q.replace("0", "7"), A, B, 1.0), LLAMA, "is no tensor of llama"),
    "dora": (Module(Q, A, B, 1.0, magnitude=drawn(D)), LLAMA, "has a magnitude (DoRA)"),
    "tied": (Module("lm_head", A, B, 1.0), {**LLAMA, "tie_word_embeddings": True}, "is the embed"),
    "conv": (Module(Q, A, B, 1.0, "conv"), LLAMA, "is a convolution"),
    "heads": (Module(Q, A, B, 1.0), {**LLAMA, "num_attention_heads": 3}, "3 heads do not divide"),
}


@pytest.mark.parametrize(("module", "config", "part"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, module, config, part):
    with pytest.raises(ValueError, match=says("`jlora.gguf.save(", part)):
        jlora.gguf.save(tmp_path / "a.gguf", [module], config)
    assert not (tmp_path / "a.gguf").exists()


def test_a_dtype_that_is_not_one(tmp_path):
    with pytest.raises(ValueError, match="it must be one of float32, float16, bfloat16"):
        jlora.gguf.save(tmp_path / "a.gguf", [Module(Q, A, B, 1.0)], LLAMA, "int8")


def test_refused_folders(tmp_path, capsys):
    saved = {"model.norm.weight": drawn(D)}
    path = adapter(tmp_path / "lora", saved, modules_to_save=["norm"])
    words = [path, tmp_path / "a.gguf", "--to", "gguf", "--base"]
    run(*words, base(tmp_path), code=2)
    assert "is saved whole, for which the format has no place" in capsys.readouterr().err
    words[0] = adapter(tmp_path / "q", pair(Q, D, D), target_modules=["q_proj"])
    run(*words, tmp_path / "nothing", code=2)
    assert "there is no" in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def two_ranks(tmp_path, **more):
    lora = pair(UP, 12, D) | pair(DOWN, D, 12, 3, seed=1)
    if more.get("use_dora"):
        lora |= {
            f"{UP}.lora_magnitude_vector": drawn(12),
            f"{DOWN}.lora_magnitude_vector": drawn(D),
        }
    said = {"rank_pattern": {"down_proj": 3}, "target_modules": ["up_proj", "down_proj"], **more}
    return lora, adapter(tmp_path / "lora", lora, **said)


@pytest.mark.parametrize("dora", [False, True])
def test_mlx(tmp_path, dora):
    """MLX-LM's product, scale · (x a) b, is the update of each module."""
    lora, path = two_ranks(tmp_path, use_dora=dora, base_model_name_or_path="smol")
    run(path, tmp_path / "out", "--to", "mlx", "--base", base(tmp_path))
    tensors = safetensors.numpy.load_file(tmp_path / "out/adapters.safetensors")
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["fine_tune_type"] == ("dora" if dora else "lora") and said["num_layers"] == 2
    assert said["model"] == "smol" and said["lora_parameters"]["rank"] == 3
    assert said["lora_parameters"]["keys"] == ["mlp.down_proj", "mlp.up_proj"]
    for module, s in ((UP, 3.0), (DOWN, 2.0)):
        a, b = (lora[f"{module}.lora_{k}.weight"] for k in "AB")
        x = drawn(a.shape[1], seed=8)
        got = said["lora_parameters"]["scale"] * (x @ tensors[f"{module}.lora_a"])
        np.testing.assert_allclose(got @ tensors[f"{module}.lora_b"], s * b @ (a @ x), rtol=1e-4)
        if dora:
            m = lora[f"{module}.lora_magnitude_vector"]
            np.testing.assert_array_equal(tensors[f"{module}.m"], m)
    assert len(tensors) == (6 if dora else 4)


def test_vllm(tmp_path):
    """One rank and alpha, without patterns, and the same update."""
    lora, path = two_ranks(tmp_path, use_rslora=True)
    run(path, tmp_path / "out", "--to", "vllm")
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"] == 3 and not said["use_rslora"]
    assert not said["rank_pattern"] and not said["alpha_pattern"]
    tensors = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    for module, s in ((UP, 6 / 2**0.5), (DOWN, 6 / 3**0.5)):
        a, b = (lora[f"{module}.lora_{k}.weight"] for k in "AB")
        x, y = (tensors[f"base_model.model.{module}.lora_{k}.weight"] for k in "AB")
        assert x.shape[0] == y.shape[1] == 3
        np.testing.assert_allclose(y @ x, s * b @ a, rtol=1e-4, atol=1e-5)
    assert main(["check", str(tmp_path / "out"), "--for", "vllm"]) == 0
    assert main(["check", str(path), "--for", "vllm"]) == 2


MLX = {
    "head": ([Module("lm_head", A, B, 1.0)], "is outside of the blocks"),
    "embedding": ([Module("model.embed_tokens", A, B, 1.0, "embedding")], "is no linear layer"),
    "some": (
        [Module(Q, A, B, 1.0), Module(Q, A, B, 1.0, magnitude=drawn(D))],
        "has no magnitude and others have one",
    ),
}


@pytest.mark.parametrize(("modules", "part"), MLX.values(), ids=MLX)
def test_mlx_refuses(tmp_path, modules, part):
    with pytest.raises(ValueError, match=says("`jlora.mlx.save(", part)):
        jlora.mlx.save(tmp_path / "out", modules, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "gguf"], "needs `--base`"),
        (["--to", "mlx", "--base", "BASE"], "config.json has no num_hidden_layers"),
    ],
)
def test_refused_arguments(tmp_path, capsys, words, said):
    _, path = two_ranks(tmp_path)
    folder = base(tmp_path, {"model_type": "llama"})
    words = [str(folder) if word == "BASE" else word for word in words]
    run(path, tmp_path / "out", *words, code=2)
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_of_peft_without_its_alpha(tmp_path, capsys):
    _, path = two_ranks(tmp_path)
    run(path / "adapter_model.safetensors", tmp_path / "out", "--to", "peft", code=2)
    assert "its alpha is in adapter_config.json. Pass the folder" in capsys.readouterr().err


def test_a_file_with_a_nan(tmp_path, capsys):
    a, b = np.ones((2, 8), np.float32), np.full((12, 2), np.nan, np.float32)
    folder = base(tmp_path)
    jlora.gguf.save(
        tmp_path / "a.gguf",
        [Module(UP, a, b, 1.0)],
        json.loads((folder / "config.json").read_text()),
    )
    run(tmp_path / "a.gguf", tmp_path / "out", "--to", "peft", "--base", folder, code=2)
    assert f'"{UP}, b" in a.gguf has values that are not finite' in capsys.readouterr().err


def test_vllm_has_no_dora(tmp_path, capsys):
    _, path = two_ranks(tmp_path, use_dora=True)
    run(path, tmp_path / "out", "--to", "vllm", code=2)
    assert "has a magnitude (DoRA), for which vLLM has no form" in capsys.readouterr().err


def test_a_bridge_without_its_library(tmp_path, monkeypatch, capsys):
    def fails(name):
        raise ModuleNotFoundError(name="gguf")

    monkeypatch.setattr("jlora.cli._source.import_module", fails)
    _, path = two_ranks(tmp_path)
    run(path, tmp_path / "out", "--to", "gguf", "--base", base(tmp_path), code=2)
    assert "needs gguf: `pip install gguf`" in capsys.readouterr().err
