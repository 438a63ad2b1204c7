"""kohya's files of Stable Diffusion 1.5 and SDXL."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import says
from modules import contents, equal, module, tensors_of

import jlora.kohya
from jlora._diffusion import SD15, SDXL, sgm_name, text_names, unet_names
from jlora._modules import Module

BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
# Of the names of all linear layers and convolutions of the models that diffusers 0.42.1 and
# transformers 5.23 build, sorted, one a line.
REAL = {
    "sd15": "dd6091162eb4b863",
    "sdxl": "d234e0d9bb1356fe",
    "te": "42ef3cd1482fe5d4",
    "te2": "2dde998206842bbf",
}
OURS = {
    "sd15": lambda: unet_names(SD15),
    "sdxl": lambda: unet_names(SDXL),
    "te": lambda: text_names(12),
    "te2": lambda: text_names(32, projection=True),
}


@pytest.mark.parametrize("model", REAL)
def test_the_names_are_those_of_the_real_models(model):
    names = sorted(OURS[model]())
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == REAL[model]


def test_no_two_modules_have_one_name():
    for names in (list(unet_names(SD15)), list(unet_names(SDXL)), list(text_names(32, True))):
        assert len({name.replace(".", "_") for name in names}) == len(names) > 100
    assert len({sgm_name(name) for name in unet_names(SDXL)}) == len(list(unet_names(SDXL)))


# Keys of published files: kohya's SDXL trainer names the modules of sgm's U-Net.
SGM = {
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": (
        "input_blocks.8.1.transformer_blocks.9.ff.net.2"
    ),
    "mid_block.attentions.0.transformer_blocks.3.attn2.to_k": (
        "middle_block.1.transformer_blocks.3.attn2.to_k"
    ),
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0": (
        "output_blocks.3.1.transformer_blocks.1.attn1.to_out.0"
    ),
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "up_blocks.2.resnets.2.time_emb_proj": "output_blocks.8.0.emb_layers.1",
    "add_embedding.linear_2": "label_emb.0.2",
}


@pytest.mark.parametrize(("ours", "theirs"), SGM.items())
def test_sgms_names(ours, theirs):
    assert sgm_name(ours) == theirs


def every_module(sdxl, dtype):
    """All modules of a model, tiny: linear layers, and convolutions where kohya has them."""
    unet = SDXL if sdxl else SD15
    names = [f"unet.{name}" for name in unet_names(unet)]
    names += [f"text_encoder.{name}" for name in text_names(12)]
    names += [f"text_encoder_2.{name}" for name in text_names(32)] if sdxl else []
    conv = ("conv", "conv1", "conv2", "conv_in", "conv_out")
    window = lambda name: 3 if name.rpartition(".")[2] in conv else None
    return [module(name, dtype=dtype, window=window(name)) for name in names]


@pytest.mark.parametrize(
    ("sdxl", "dtype"), [(False, np.float32), (True, np.float16), (True, jnp.bfloat16)]
)
def test_files_come_back_bit_for_bit(tmp_path, sdxl, dtype):
    modules = every_module(sdxl, dtype)
    file, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    jlora.kohya.save(file, modules)
    keys = tensors_of(file)
    assert len(keys) == 3 * len(modules)
    te = "lora_te1" if sdxl else "lora_te"
    assert f"{te}_text_model_encoder_layers_11_self_attn_q_proj.alpha" in keys
    place = "input_blocks_4_1" if sdxl else "down_blocks_1_attentions_0"
    assert f"lora_unet_{place}_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys
    read = jlora.kohya.load(file)
    assert equal(read, modules)
    jlora.kohya.save(again, read)
    assert contents(file) == contents(again)


def test_magnitudes_and_windows(tmp_path):
    """A DoRA of LyCORIS, with the norm of each output, and a projection by a 1×1 convolution."""
    a = module(f"{BLOCK}.attn1.to_q", dora=True)
    b = module("unet.down_blocks.1.attentions.0.proj_in", window=1, dora=True, alpha=0.75)
    jlora.kohya.save(tmp_path / "a.safetensors", [a, b])
    assert equal(jlora.kohya.load(tmp_path / "a.safetensors"), [a, b])
    keys = tensors_of(tmp_path / "a.safetensors")
    name = "lora_unet_down_blocks_1_attentions_0"
    assert keys[f"{name}_proj_in.dora_scale"][1] == (6, 1, 1, 1)
    assert keys[f"{name}_transformer_blocks_0_attn1_to_q.dora_scale"][1] == (6, 1)


def written(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
PAIR = {f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B}


@pytest.mark.parametrize(("alpha", "s"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5)])
def test_alpha(tmp_path, alpha, s):
    """Without alpha, or with 0, the scale is 1, as in kohya."""
    more = {} if alpha is None else {f"{Q}.alpha": np.array(alpha, np.float32)}
    (found,) = jlora.kohya.load(written(tmp_path, PAIR | more))
    assert found.scaling == s and found.name == f"{BLOCK}.attn1.to_q"


def test_other_models_by_their_names(tmp_path):
    """Names with "_" in them are told apart by the model's own."""
    pair = {
        f"lora_unet_double_blocks_0_img_mlp_0.{k.partition('.')[2]}": x for k, x in PAIR.items()
    }
    file = written(tmp_path, pair)
    (found,) = jlora.kohya.load(file, names=["transformer.double_blocks.0.img_mlp.0"])
    assert found.name == "transformer.double_blocks.0.img_mlp.0"
    with pytest.raises(ValueError, match="Pass `names=`, of the model's modules"):
        jlora.kohya.load(file)


WRONG = {
    "loha": ({f"{Q}.hada_w1_a": A}, "belongs to LoHa of LyCORIS"),
    "lokr": ({f"{Q}.lokr_w2_b": A}, "belongs to lokr of LyCORIS"),
    "key": ({f"{Q}.weight": A}, "is none of kohya's keys"),
    "module": ({f"{Q}x.alpha": A}, 'is no module of the model.*Closest: "lora_unet'),
    "half": ({f"{Q}.lora_up.weight": B}, "has B alone"),
    "ranks": (PAIR | {f"{Q}.lora_up.weight": B[:, :1]}, r"not \(r, in\) and \(out, r\)"),
    "window": (
        {f"{Q}.lora_down.weight": A[..., None, None], f"{Q}.lora_up.weight": np.ones((6, 2, 3, 3))},
        "of a convolution, B is 1×1",
    ),
    "alpha": (PAIR | {f"{Q}.alpha": A}, "is not one finite number"),
    "nan": (PAIR | {f"{Q}.alpha": np.float32(np.nan).reshape(1)}, "is not one finite number"),
    "inputs": (PAIR | {f"{Q}.dora_scale": np.ones((1, 4))}, "is of the inputs"),
    "empty": ({}, "the file has no tensors"),
}


@pytest.mark.parametrize(("tensors", "part"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path, tensors, part):
    tensors = {k: x.astype(np.float32) for k, x in tensors.items()}
    with pytest.raises(ValueError, match=rf"(?s)`jlora\.kohya\.load\(.*{part}"):
        jlora.kohya.load(written(tmp_path, tensors))


REFUSED = {
    "component": (Module("vae.conv", A, B, 1.0), "is linear of"),
    "embedding": (Module("text_encoder.text_model.x", A, B, 1.0, "embedding"), "is embedding of"),
    "name": (Module("unet.down_blocks.9.conv", A, B, 1.0), "is no module of SD 1.5"),
}


@pytest.mark.parametrize(("one", "part"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, one, part):
    with pytest.raises(ValueError, match=says("`jlora.kohya.save(", part)):
        jlora.kohya.save(tmp_path / "a.safetensors", [one])
    assert not (tmp_path / "a.safetensors").exists()


def test_which_model(tmp_path):
    """SDXL is told by its depth, its cross-attention and its second text encoder."""
    common = module(f"{BLOCK}.attn1.to_q")
    wide = module(f"{BLOCK}.attn2.to_k", ins=2048)
    deep = module("unet.mid_block.attentions.0.transformer_blocks.9.ff.net.2")
    second = module("text_encoder_2.text_model.encoder.layers.0.mlp.fc1")
    for more in ([wide], [deep], [second]):
        jlora.kohya.save(tmp_path / "a.safetensors", [common, *more])
        assert any("input_blocks_4_1" in key for key in tensors_of(tmp_path / "a.safetensors"))
    jlora.kohya.save(tmp_path / "a.safetensors", [common], sdxl=True)
    assert any("input_blocks_4_1" in key for key in tensors_of(tmp_path / "a.safetensors"))
    four = module("unet.up_blocks.3.resnets.0.conv1", window=3)
    with pytest.raises(ValueError, match="is no module of SDXL"):
        jlora.kohya.save(tmp_path / "b.safetensors", [four], sdxl=True)
