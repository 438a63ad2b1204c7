"""MLX-LM's folders, read back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from modules import contents, equal, module

import jlora.mlx
from jlora._modules import Module

UP = "model.layers.0.mlp.up_proj"
A, B = np.ones((4, 2), np.float32), np.ones((2, 6), np.float32)
PAIR = {f"{UP}.lora_a": A, f"{UP}.lora_b": B}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_files_come_back_bit_for_bit(tmp_path, dtype, dora):
    names = [f"model.layers.{n}.{x}" for n in range(2) for x in ("mlp.up_proj", "self_attn.q_proj")]
    modules = [module(name, dtype=dtype, dora=dora, alpha=40.0) for name in names]
    jlora.mlx.save(tmp_path / "a", modules, 2)
    read = jlora.mlx.load(tmp_path / "a")
    assert equal(read, modules)
    jlora.mlx.save(tmp_path / "b", read, 2)
    files = [tmp_path / x / "adapters.safetensors" for x in "ab"]
    assert contents(files[0]) == contents(files[1])
    configs = [(tmp_path / x / "adapter_config.json").read_text() for x in "ab"]
    assert configs[0] == configs[1] and json.loads(configs[0])["lora_parameters"]["scale"] == 20


def written(tmp_path, tensors, config=None):
    safetensors.numpy.save_file(tensors, tmp_path / "adapters.safetensors")
    config = {"lora_parameters": {"rank": 2, "scale": 0.5}} if config is None else config
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_embeddings(tmp_path):
    tensors = {"model.embed_tokens.lora_a": A, "model.embed_tokens.lora_b": B}
    (found,) = jlora.mlx.load(written(tmp_path, tensors))
    want = Module("model.embed_tokens", A.T.copy(), B.T.copy(), 0.5, "embedding")
    assert equal([found], [want])


def test_a_dtype(tmp_path):
    """Where s is multiplied into B, the result is float32 unless a dtype is given."""
    modules = [
        module(UP, alpha=2.0, dtype=np.float16),
        module("model.layers.0.q", dtype=np.float16),
    ]
    for dtype, want in ((None, np.float32), ("bfloat16", jnp.bfloat16)):
        jlora.mlx.save(tmp_path, modules, 1, dtype=dtype)
        assert {m.b.dtype for m in jlora.mlx.load(tmp_path)} == {np.dtype(want)}


SCALE = {"lora_parameters": {"scale": 1}}
WRONG = {
    "list": (PAIR, [], "is not a JSON object"),
    "no_scale": (PAIR, {"lora_parameters": {"rank": 2}}, 'and a finite "scale"'),
    "scale": (PAIR, {"lora_parameters": {"scale": "x"}}, 'and a finite "scale"'),
    "full": (PAIR, {"fine_tune_type": "full"}, "its fine_tune_type is 'full'"),
    "key": (PAIR | {"model.norm.weight": A}, SCALE, "is none of <module>.lora_a, lora_b, m"),
    "experts": ({f"{UP}.lora_a": A[None], f"{UP}.lora_b": B[None]}, SCALE, "a stack of experts"),
    "half": ({f"{UP}.lora_b": B}, SCALE, "has B alone"),
    "ranks": (PAIR | {f"{UP}.lora_b": B[:1]}, SCALE, r"not \(r, in\) and \(out, r\)"),
    "m": (PAIR | {f"{UP}.m": A}, SCALE, r"as m, not \(6,\)"),
    "empty": ({}, SCALE, "the file has no tensors"),
}


@pytest.mark.parametrize(("tensors", "config", "part"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path, tensors, config, part):
    with pytest.raises(ValueError, match=rf"`jlora\.mlx\.load\(.*{part}"):
        jlora.mlx.load(written(tmp_path, tensors, config))


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_file_is_missing(tmp_path, name):
    (written(tmp_path, PAIR) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no .*{name}"):
        jlora.mlx.load(tmp_path)
