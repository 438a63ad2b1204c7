"""AdaLoRA's and VeRA's files, of PEFT, read and written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from helpers import says
from live import entries, quiet
from safetensors.torch import load_file, save_file
from transformed import SIZES, tree

import jlora
import jlora.peft

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "ADALORA": lambda **more: peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=5, total_step=100, target_modules=list(TARGETS), **more
    ),
    "VERA": lambda **more: peft.VeraConfig(r=6, target_modules=list(TARGETS), **more),
}
PARTS = ("lora_A", "lora_B", "lora_E", "vera_lambda", "modules_to_save")
FILE = "adapter_model.safetensors"


def llama():
    """With grouped queries and another width in the MLP: A and B of three shapes."""
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def written(folder, method, **more):
    model = quiet(peft.get_peft_model, llama(), CONFIGS[method](**more)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in PARTS):
                p.copy_(torch.randn(p.shape) / 2)
    quiet(model.save_pretrained, folder)


def merged(folder):
    model = quiet(peft.PeftModel.from_pretrained, llama(), str(folder))
    return tree(quiet(model.merge_and_unload))[0]


def hold(params, folder, compare):
    want, got = merged(folder), jlora.merge(params)
    changed = 0
    for path, x in want.items():
        compare(got[path], x, path, 1e-6)
        changed += not np.array_equal(x, tree(llama())[0][path])
    assert changed >= 6


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", CONFIGS)
def test_there_and_back(tmp_path, compare, method):
    written(tmp_path / "there", method, modules_to_save=["lm_head"])
    params, names = tree(llama())
    read = jlora.peft.load(tmp_path / "there", params, names=names)
    node = read["model/layers/0/self_attn/q_proj/kernel"]
    assert node.form == method.lower() and node.rank == 6
    hold(read, tmp_path / "there", compare)
    jlora.peft.save(tmp_path / "back", read, names=names, peft_type=method)
    hold(read, tmp_path / "back", compare)
    first, again = (load_file(tmp_path / folder / FILE) for folder in ("there", "back"))
    assert first.keys() == again.keys()
    for key, x in first.items():
        compare(again[key], x, key, 1e-6)
    jlora.peft.save(tmp_path / "lora", read, names=names)  # without `peft_type`, plain LoRA
    assert entries(tmp_path / "lora")["peft_type"] == "LORA"
    hold(read, tmp_path / "lora", compare)


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", CONFIGS)
def test_rules_begin_as_peft_does(method):
    """One step's forward pass: the same ranks, the same scaling, the update is zero."""
    params, names = tree(llama())
    config = CONFIGS[method]()
    rules = jlora.peft.rules(config.to_dict(), params, names=names)
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    node = adapted["model/layers/1/mlp/down_proj/kernel"]
    assert node.form == method.lower() and node.rank == 6
    s = 5 / (6 + 1e-5) if method == "ADALORA" else 1
    assert float(node.scaling) == pytest.approx(s, rel=1e-7)
    assert all(bool(jnp.array_equal(x, params[p])) for p, x in jlora.merge(adapted).items())


def test_singular_values_that_were_taken_out(tmp_path, compare):
    """PEFT writes the ranks that are left and divides by the first one still."""
    model = quiet(peft.get_peft_model, llama(), CONFIGS["ADALORA"]()).eval()
    pattern = {}
    with torch.no_grad():
        for k, (name, p) in enumerate(model.named_parameters()):
            if any(part in name for part in PARTS):
                p.copy_(torch.randn(p.shape) / 2)
            if "lora_E" in name:
                left = [bool((k + n) % 3) for n in range(6)]
                p[~torch.tensor(left)] = 0
                pattern[name.removeprefix("base_model.model.")] = left
    model.peft_config["default"].rank_pattern = pattern
    quiet(model.save_pretrained, tmp_path / "there")
    ranks = {len(x) for key, x in load_file(tmp_path / "there" / FILE).items() if "lora_E" in key}
    assert ranks == {4}
    params, names = tree(llama())
    read = jlora.peft.load(tmp_path / "there", params, names=names)
    hold(read, tmp_path / "there", compare)
    jlora.peft.save(tmp_path / "back", read, names=names, peft_type="ADALORA")
    hold(read, tmp_path / "back", compare)


def test_stacked_layers(tmp_path, compare):
    for method in CONFIGS:
        written(tmp_path / method, method)
        params, names = tree(llama())
        paths = [p for p in params if p.startswith("model/layers/0/")]
        layers = {p: [params[p], params[p.replace("/0/", "/1/")]] for p in paths}
        stacked = {p.replace("/0/", "/"): jnp.stack(layers[p]) for p in paths}
        of = {p.replace("/0/", "/"): names[p].replace(".0.", ".{}.") for p in paths}
        read = jlora.peft.load(tmp_path / method, stacked, names=of)
        want, got = merged(tmp_path / method), jlora.merge(read)
        for path, x in got.items():
            for k in range(2):
                compare(x[k], want[path.replace("layers/", f"layers/{k}/")], path, 1e-6)
        jlora.peft.save(tmp_path / "back", read, names=of, peft_type=method)
        again = merged(tmp_path / "back")
        for path, x in want.items():
            compare(again[path], x, path, 1e-6)


def test_ranks_and_scalings_of_their_own(tmp_path, compare):
    """PEFT has one of each: the rest is in the singular values, and in zeros."""
    params, names = tree(llama())
    rules = {
        ".*q_proj/kernel": jlora.LoraSpec(2, 8, form="adalora"),
        ".*(v|down)_proj/kernel": jlora.LoraSpec(3, 1, form="adalora"),
    }
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    trainable, frozen = jlora.partition(adapted)
    trainable = jax.tree.map(lambda x: x + 0.3, trainable)
    adapted = jlora.combine(trainable, frozen)
    jlora.peft.save(tmp_path, adapted, names=names, peft_type="ADALORA")
    hold(adapted, tmp_path, compare)


def test_what_is_not_of_the_method_is_refused(tmp_path):
    params, names = tree(llama())
    rules = {
        ".*q_proj/kernel": jlora.LoraSpec(2),
        ".*v_proj/kernel": jlora.LoraSpec(2, form="vera"),
    }
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    for method in ("ADALORA", "VERA", "LOHA"):
        match = says(f"peft_type='{method}' is none of", "of the form", "Leave `peft_type` out")
        with pytest.raises(ValueError, match=match):
            jlora.peft.save(tmp_path, adapted, names=names, peft_type=method)
    rules = {".*q_proj/kernel": jlora.LoraSpec(2, form="vera")}
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    with pytest.raises(ValueError, match=says("one A and one B for all layers", "jlora.tie(")):
        jlora.peft.save(tmp_path, adapted, names=names, peft_type="VERA")
    rules = {".*q_proj/kernel": jlora.LoraSpec(2, alpha=0, form="adalora")}
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"has no scaling of 0"):
        jlora.peft.save(tmp_path, adapted, names=names, peft_type="ADALORA")
    rules = {".*embedding": jlora.LoraSpec(2, form="adalora")}
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    with pytest.raises(ValueError, match=says("ADALORA of linear layers alone", "embed_tokens")):
        jlora.peft.save(tmp_path, adapted, names=names, peft_type="ADALORA")
    config = CONFIGS["VERA"](d_initial=0.2).to_dict()
    with pytest.raises(ValueError, match=says("peft_type 'VERA' is of linear layers", "d_initial")):
        jlora.peft.rules(config, params, names=names)


def test_damaged_files_of_the_methods(tmp_path):
    params, names = tree(llama())
    written(tmp_path / "vera", "VERA")
    file = tmp_path / "vera" / FILE
    tensors = load_file(file)
    left = "layers.0.mlp.down_proj.vera_lambda_d"
    damaged = {
        "has no vera_A and vera_B": {k: x for k, x in tensors.items() if "vera_A" not in k},
        r"has no \['vera_lambda_d'\]": {k: x for k, x in tensors.items() if left not in k},
        "Is it an adapter of this model": tensors | {"base_model.vera_A": torch.zeros(6, 5)},
    }
    for match, odd in damaged.items():
        save_file(odd, file)
        with pytest.raises(ValueError, match=match):
            jlora.peft.load(tmp_path / "vera", params, names=names)
    written(tmp_path / "adalora", "ADALORA")
    config = tmp_path / "adalora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_r": 5}))
    with pytest.raises(ValueError, match="they need one rank, at most init_r=5"):
        jlora.peft.load(tmp_path / "adalora", params, names=names)
