"""`jlora merge` against PEFT's `merge_and_unload`, live, on a model of transformers on disk."""

import peft
import pytest
import torch
from live import quiet, randomize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from jlora.cli import main

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ADAPTERS = {
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"k_proj": 5},
        "alpha_pattern": {r"layers\.1\..*q_proj": 3},
        "use_rslora": True,
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path, max_shard_size="4KB")
    return path


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_checkpoint_is_the_merged_model(folder, tmp_path, compare, name):
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=3, lora_alpha=4, init_lora_weights=False, **ADAPTERS[name])
    model = quiet(peft.get_peft_model, base, config)
    randomize(model)
    quiet(model.save_pretrained, tmp_path / "lora")
    assert main(["merge", str(folder), str(tmp_path / "lora"), str(tmp_path / "out")]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = quiet(model.merge_and_unload)
    want = theirs.state_dict()
    got = ours.state_dict()
    assert set(got) == set(want)
    for key, x in want.items():
        compare(got[key].numpy(), x.numpy(), key)
    tokens = torch.tensor([[1, 5, 7, 30]])
    with torch.no_grad():
        compare(ours(tokens).logits.numpy(), theirs(tokens).logits.numpy(), "logits")
