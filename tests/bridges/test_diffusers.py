"""diffusers' files: of pipelines and of one model, in three spellings."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import says
from modules import contents, equal, module, tensors_of

import jlora.diffusers
from jlora._diffusion import SD15, SDXL, text_names, unet_names
from jlora._modules import Module

Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
A, B = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)


def written(tmp_path, tensors, said=None):
    file = tmp_path / "a.safetensors"
    metadata = None if said is None else {"lora_adapter_metadata": json.dumps(said)}
    safetensors.numpy.save_file(tensors, file, metadata)
    return file


@pytest.mark.parametrize(("unet", "dtype"), [(SD15, jnp.bfloat16), (SDXL, np.float16)])
def test_files_come_back_bit_for_bit(tmp_path, unet, dtype):
    """All modules of a model, of several ranks and alphas."""
    names = [f"unet.{name}" for name in unet_names(unet)]
    names += [f"text_encoder.{name}" for name in text_names(12)]
    modules = [module(x, rank=2 + n % 2, alpha=4 + n % 3, dtype=dtype) for n, x in enumerate(names)]
    jlora.diffusers.save(tmp_path / "a", modules)
    file = tmp_path / "a/pytorch_lora_weights.safetensors"
    assert len(tensors_of(file)) == 2 * len(modules)
    assert f"{Q}.to_q.lora_A.weight" in tensors_of(file)
    read = jlora.diffusers.load(tmp_path / "a")
    assert equal(read, modules)
    jlora.diffusers.save(tmp_path / "b.safetensors", read)
    assert contents(file) == contents(tmp_path / "b.safetensors")


def test_all_kinds(tmp_path):
    """Magnitudes, convolutions and embeddings."""
    dora = [module(f"{Q}.to_q", dora=True), module("unet.conv_in", dora=True, window=3)]
    text = Module("text_encoder.text_model.embeddings.token_embedding", A, B, 0.5, "embedding")
    jlora.diffusers.save(tmp_path, [*dora, text])
    assert equal(jlora.diffusers.load(tmp_path), [*dora, text])
    keys = tensors_of(tmp_path / "pytorch_lora_weights.safetensors")
    assert keys["unet.conv_in.lora_magnitude_vector"][1] == (1, 6, 1, 1)


SPELLINGS = {
    f"{Q}.to_q.lora.{{}}.weight": f"{Q}.to_q",
    f"{Q}.processor.to_k_lora.{{}}.weight": f"{Q}.to_k",
    f"{Q}.processor.to_out_lora.{{}}.weight": f"{Q}.to_out.0",
    f"{TEXT}.q_proj.lora_linear_layer.{{}}.weight": f"{TEXT}.q_proj",
    f"{TEXT}.to_out_lora.{{}}.weight": f"{TEXT}.out_proj",
    "unet.mid_block.resnets.0.conv1.lora.{}.weight": "unet.mid_block.resnets.0.conv1",
}


@pytest.mark.parametrize(("key", "name"), SPELLINGS.items())
def test_spellings(tmp_path, key, name):
    """Of releases before PEFT's; without metadata and alphas the scale is 1."""
    file = written(tmp_path, {key.format("down"): A, key.format("up"): B})
    (found,) = jlora.diffusers.load(file)
    assert (found.name, found.scaling) == (name, 1.0)
    np.testing.assert_array_equal(found.b, B)


def test_scales(tmp_path):
    """PEFT's configuration, of the component or of the one model; else the file's alphas."""
    tensors = {
        f"{name}.lora_{k}.weight": x
        for name in ("a.q", "a.k", "b.q")
        for k, x in (("A", A), ("B", B))
    }
    said = {"a.lora_alpha": 4, "a.alpha_pattern": {"k": 6}, "a.r": 2, "b.lora_alpha": 8}
    said["b.use_rslora"] = True
    scales = {m.name: m.scaling for m in jlora.diffusers.load(written(tmp_path, tensors, said))}
    assert scales == {"a.q": 2.0, "a.k": 3.0, "b.q": 8 / 2**0.5}
    said = {"lora_alpha": 4, "alpha_pattern": {"b.q": 1}}
    scales = {m.name: m.scaling for m in jlora.diffusers.load(written(tmp_path, tensors, said))}
    assert scales == {"a.q": 2.0, "a.k": 2.0, "b.q": 0.5}
    alpha = {"a.k.alpha": np.array(6, np.float32)}
    scales = {m.name: m.scaling for m in jlora.diffusers.load(written(tmp_path, tensors | alpha))}
    assert scales == {"a.q": 1.0, "a.k": 3.0, "b.q": 1.0}


PAIR = {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}
WRONG = {
    "bias": (PAIR | {"unet.q.lora_B.bias": A}, None, "is neither A, B, a magnitude nor an alpha"),
    "long": ({f"{'x' * 5000}.lora_A.weight": A}, None, "is neither A, B, a magnitude"),
    "half": ({"unet.q.lora_A.weight": A}, None, "has A alone"),
    "twice": (PAIR | {"unet.q.lora.down.weight": A}, None, 'is a second "a"'),
    "magnitude": (PAIR | {"unet.q.lora_magnitude_vector": A}, None, r"as magnitude, not \(6,\)"),
    "alpha": (PAIR | {"unet.q.alpha": A}, None, "is not one finite number"),
    "said": (PAIR, {"unet.lora_alpha": "much"}, "is not one finite number"),
    "list": (PAIR, [], "are not a JSON object"),
    "empty": ({}, None, "the file has no tensors"),
}


@pytest.mark.parametrize(("tensors", "said", "part"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path, tensors, said, part):
    with pytest.raises(ValueError, match=rf"`jlora\.diffusers\.load\(.*{part}"):
        jlora.diffusers.load(written(tmp_path, tensors, said))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*pytorch_lora_weights"):
        jlora.diffusers.load(tmp_path)


@pytest.mark.parametrize("name", ["down_blocks.0.conv", "unet"])
def test_a_name_without_component(tmp_path, name):
    with pytest.raises(ValueError, match="does not begin with a component of a pipeline"):
        jlora.diffusers.save(tmp_path / "a", [Module(name, A, B, 1.0)])
    assert not (tmp_path / "a").exists()


def test_magnitudes_in_some(tmp_path):
    some = [module("unet.a", dora=True), module("unet.b")]
    with pytest.raises(ValueError, match=says('"unet.b" has no magnitude and others have one')):
        jlora.diffusers.save(tmp_path / "a", some)
