"""`jlora merge` against PEFT's, live, where transformers names modules otherwise than files do."""

import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from live import quiet, randomize, tensors

from jlora.cli import main

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
IMAGE = dict(SIZES, image_size=8, patch_size=4)
TEXT = dict(SIZES, num_key_value_heads=1, vocab_size=40, head_dim=8)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
ENCODER = ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]


def classifier(name, **options):
    config = getattr(tf, f"{name}Config")(num_labels=3, **options)
    return getattr(tf, f"{name}ForImageClassification")(config)


def seeing(name, text, tower, **options):
    """A language model with a tower for images."""
    text, tower = dict(TEXT, model_type=text), dict(IMAGE, model_type=tower)
    config = getattr(tf, f"{name}Config")(text_config=text, vision_config=tower, **options)
    return getattr(tf, f"{name}ForConditionalGeneration")(config)


def qwen():
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), range(36, 40), strict=True))
    tower = dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4)
    ids = {f"{name}_token_id": n for name, n in ids.items()}
    text = dict(TEXT, rope_parameters=MROPE)
    config = tf.Qwen2VLConfig(text_config=text, vision_config=tower, **ids)
    return tf.Qwen2VLForConditionalGeneration(config)


def captioner():
    """An encoder of Linear and a decoder of Conv1D, both with square weights."""
    decoder = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8)
    decoder = tf.GPT2Config(**decoder, add_cross_attention=True, is_decoder=True)
    encoder = tf.ViTModel(tf.ViTConfig(**IMAGE))
    return tf.VisionEncoderDecoderModel(encoder=encoder, decoder=tf.GPT2LMHeadModel(decoder))


SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2])
SEGFORMER = dict(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4)
MODELS = {
    "vit": (lambda: classifier("ViT", **IMAGE), ENCODER),
    "deit": (lambda: classifier("DeiT", **IMAGE), ENCODER),
    "beit": (lambda: classifier("Beit", **IMAGE), ENCODER),
    "dinov2": (lambda: classifier("Dinov2", **IMAGE), ENCODER),
    "swin": (lambda: classifier("Swin", window_size=2, **SWIN), ENCODER),
    "segformer": (lambda: classifier("Segformer", **SEGFORMER), ENCODER),
    "clip": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGE)), ["q_proj", "fc1"]),
    "llava": (
        lambda: seeing("Llava", "llama", "clip_vision_model", image_token_index=39),
        ["q_proj", "linear_1", "lm_head"],
    ),
    "gemma 3": (
        lambda: seeing("Gemma3", "gemma3_text", "siglip_vision_model", mm_tokens_per_image=4),
        ["q_proj", "fc1"],
    ),
    "qwen 2 vl": (qwen, ["q_proj", "qkv", "fc1"]),
    "gpt-neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, vocab_size=40)),
        ["query_key_value", "lm_head"],
    ),
    "captioner": (captioner, ["q_proj", "fc1", "c_attn", "c_proj"]),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_files_are_those_of_the_merged_model(tmp_path, compare, name):
    torch.manual_seed(0)
    model, targets = MODELS[name][0](), MODELS[name][1]
    quiet(model.save_pretrained, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    wrapped = quiet(peft.get_peft_model, model, config)
    randomize(wrapped)
    quiet(wrapped.save_pretrained, tmp_path / "lora")
    words = ["merge", tmp_path / "base", tmp_path / "lora", tmp_path / "out"]
    assert main(list(map(str, words))) == 0
    quiet(quiet(wrapped.merge_and_unload).save_pretrained, tmp_path / "want")
    base, got, want = (
        safetensors.torch.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("base", "out", "want")
    )
    assert set(got) == set(want)
    for key, x in want.items():
        compare(got[key].numpy(), x.numpy(), key)
    changed = sum(not torch.equal(got[key], x) for key, x in base.items())
    assert changed == sum(key.endswith(".lora_A.weight") for key in tensors(tmp_path / "lora"))
