"""Patterns of configurations: what is tried, and what could take too long."""

import re
import time

import jax.numpy as jnp
import pytest

from jlora import peft

TAGS = "vision|image|visual|patch|language|text"
PARTS = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|fc|qkv|proj|linear_fc1"
LAYERS = rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{LINEAR})))"
# What programs write by default for models that see: Unsloth, older and newer, LLaMA-Factory.
REAL = {
    "unsloth": rf"(?:.*?(?:{TAGS}).*?(?:{PARTS}).*?(?:{LINEAR}))|{LAYERS}",
    "unsloth_old": rf"(?:.*?(?:{TAGS}).*?(?:{PARTS}).*?(?:{LINEAR}).*?)|{LAYERS}",
    "unsloth_audio": rf"(?:.*?(?:{TAGS}).*?(?:{PARTS}).*?(?:{LINEAR}))|{LAYERS}"
    rf"|(?:.*?(?:audio|conformer).*?(?:{PARTS}|ffw_layer_start).*?(?:{LINEAR}|linear))"
    rf"|(?:\bmodel\.language_model\.layers\.[\d]{{1,}}\.(?:{PARTS})\.(?:(?:{LINEAR})))",
    "factory": r"^(?!.*(?:visual|patch_embed)).*(?:q_proj|v_proj|gate_proj|fc1).*",
    "ranges": r"model\.layers\.(1[0-9]|[2-9])\.(?P<part>self_attn|mlp)\.(q_proj|gate_proj)",
    "braces": r".*\.layers\.\d{1,2}\.self_attn\.[qv]_proj(?:)?",
}
NAMES = (
    "model.vision_tower.encoder.layers.3.self_attn.q_proj",
    "model.language_model.layers.1.mlp.gate_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.2.mlp.gate_proj",
    "model.visual.blocks.0.mlp.linear_fc1",
    "model.multi_modal_projector.linear",
    "model.audio_tower.conformer.0.ffw_layer_start.linear",
)
SLOW = {
    "nested": r"(a+)+",
    "nested_lazily": r"(?:\w*?)*x",
    "alternatives_repeated": r"(a|aa)*b",
    "alternatives_counted": r"(?:a|ab){9,}",
    "conditional": r"(a)?(?(1)b|b*)*",
    "polynomial": ".*" * 6 + "x",
    "classes": r"[ab]{1,30}" * 9,
    "optional": "a?" * 40,
    "alternatives": "(m|m|m)" * 20,
    "alternatives_inside": "((m|m|m))" * 20,
    "alternatives_by_case": "(?:a|A)" * 30,
    "alternatives_by_class": r"(?:a|\w)" * 30,
    "verbose": "(?x)(a # (\n)",
}


def config(target: str) -> dict[str, str]:
    return {"peft_type": "LORA", "target_modules": target}


@pytest.mark.parametrize("name", REAL)
def test_real_patterns_choose_what_they_match(name):
    params = {n: {"kernel": jnp.ones((8, 8))} for n in NAMES}
    found = peft.rules(config(REAL[name]), params, names=lambda p: p.replace("/kernel", ".weight"))
    want = [n for n in NAMES if re.fullmatch(REAL[name], n)]
    assert 0 < len(want) < len(NAMES)
    assert set(found) == {re.escape(f"{n}/kernel") for n in want}


@pytest.mark.parametrize("name", SLOW)
def test_slow_patterns_are_not_tried(name):
    module = "a" * 60 + "m" * 60
    params, names = {"w": jnp.ones((8, 8))}, {"w": f"{module}.weight"}
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"repeat|flag x"):
        peft.rules(config(SLOW[name]), params, names=names)
    assert time.perf_counter() - began < 5
