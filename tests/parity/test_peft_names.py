"""PEFT live: which modules a configuration means, with which rank and alpha; and odd key names."""

import itertools
import re
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from live import quiet, randomize
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

import jlora.peft

KEYS = [
    *("q", "fc", "layers.1.q", "model.layers.1.q", "model.layers.10.q", "model.layers.1.q.w"),
    *("h.1.attn.q", "m.h.1.attn.q", "m.h.11.attn.q", "m.h.1.mlp.experts.2.q", "m.h.2.mlp.1.q"),
    *("bar.1.baz", "foo.bar.1.baz", "blocks.1.weight", "enc.blocks.1.weight", "enc.1", "1.q"),
    *("a.fc", "a.b.fc", "afc", "a.bfc", "enc.layers.3.self_attn.q", "dec.layers.3.self_attn.q"),
    *("a.layers.001.q", "a.bar.1.x.2.baz", "a.bar.2.x.1.baz", "bar.1.bias", "m.h.1.attn.q.drop"),
]
NAMES = [
    *("q", "fc", "weight", "baz", "1", "attn.q", "1.q", "layers.1.q", "h.1.attn.q", "a.fc", "w"),
    *("model.layers.1.q", "self_attn.q", "experts.2.q", ".q", "Q", ".", "model.layers.*.q", "m"),
]
PATTERNS = [
    "q",
    ".*q",
    r".*\.q",
    r"model\.layers\.\d+\.q",
    "(a|b).*",
    r".*\.[0-4]\..*q",
    "fc",
    ".*",
]
LAYERS = [None, 1, [1], [0, 1], [2, 3], [10, 11], []]
LAYER_NAMES = [None, "", "layers", ["h"], ["layers", "h"], "bar", "blocks", "l.*s", "experts", []]

TARGETS: dict[str, list[dict[str, Any]]] = {
    "lists": [{"target_modules": [name]} for name in NAMES],
    "pairs": [
        {"target_modules": list(pair), "layers_to_transform": layers, "layers_pattern": pattern}
        for pair in (("q", "fc"), ("baz", "spam"), ("layers.1.q", "weight"))
        for layers, pattern in ((None, None), (1, "bar"), ([0, 1], ["layers", "h"]), ([2, 3], ""))
    ],
    "patterns": [{"target_modules": pattern} for pattern in PATTERNS],
    "layers": [
        {"target_modules": [name], "layers_to_transform": layers, "layers_pattern": pattern}
        for name, layers, pattern in itertools.product(
            ("q", "baz", "weight", "layers.1.q", "model.layers.1.q", "1"), LAYERS, LAYER_NAMES
        )
        if layers is not None or not pattern
    ],
    "exclude": [
        {"target_modules": ".*", "exclude_modules": exclude}
        for exclude in (*PATTERNS, *([name] for name in NAMES), ["q", "a.fc"])
    ],
    "modules_to_save": [
        {"target_modules": ".*", "modules_to_save": [name]}
        for name in ("q", "fc", "a", "layers", "model.layers.1", "self_attn", "m.h")
    ],
}


def jlora_chooses(key: str, config: dict[str, Any]) -> bool:
    """Whether `rules` gives the module a LoRA layer."""
    names = {key: f"{key}.weight"}
    for entry in config.get("modules_to_save", ()):  # so that no entry chooses nothing
        names[f"saved {entry}"] = f"other.{entry}.weight"
    targets = config["target_modules"]
    if isinstance(targets, list) and len(targets) > 1:  # a whole name is chosen in any layer
        names |= {f"target {entry}": f"{entry}.weight" for entry in targets if entry != key}
    params = dict.fromkeys(names, jax.ShapeDtypeStruct((4, 4), np.float32))
    try:
        found = jlora.peft.rules({"peft_type": "LORA", **config}, params, names=names)
    except ValueError as error:
        assert "choose nothing" in str(error), error  # PEFT's own answer to that is no answer
        return False
    return isinstance(found.get(re.escape(key)), jlora.LoraSpec)


@pytest.mark.sample(2)
@pytest.mark.parametrize("group", TARGETS)
def test_the_same_modules_are_chosen(group, compare):
    # What ends with an entry of `modules_to_save` but not after a dot, PEFT both adapts and saves.
    cases = [
        (config, key)
        for config, key in itertools.product(TARGETS[group], KEYS)
        if not any(re.search(rf"[^.]{m}$", key) for m in config.get("modules_to_save", ()))
    ]
    theirs = [bool(check_target_module_exists(peft.LoraConfig(**c), key)) for c, key in cases]
    ours = [jlora_chooses(key, c) for c, key in cases]
    assert [case for case, o, t in zip(cases, ours, theirs, strict=True) if o != t] == []
    compare(ours, theirs, group)
    assert 0.02 < np.mean(theirs) < 0.98, "a table whose answers are all alike tells nothing"


PATTERN_KEYS = [
    *("q", "fc", "layers.1.q", "^layers.1.q", "model.*", r".*\.1\..*", "h.1.attn.q", "^q", "x.q"),
    *("layers.[0-9]+.q", "(a|b).fc", "baz|q", "1", "layers?1.q", "^model.layers.1.q"),
]


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.nightly)])
def test_the_same_rank_and_alpha(step, compare):
    """The first key of a pattern that matches the end of a name wins."""
    ours, theirs = [], []
    pairs = itertools.combinations(PATTERN_KEYS, 2)
    for (one, two), key in itertools.product(pairs, [*KEYS[::step], "layersX1.q"]):
        pattern = {one: 3, two: 5}
        theirs.append(pattern.get(get_pattern_key(pattern, key), 2))
        found = jlora.peft.rules(
            {
                "peft_type": "LORA",
                "target_modules": ".*",
                "r": 2,
                "lora_alpha": 2,
                "rank_pattern": pattern,
                "alpha_pattern": pattern,
            },
            {key: jax.ShapeDtypeStruct((4, 4), np.float32)},
            names={key: f"{key}.weight"},
        )
        (spec,) = found.values()
        assert spec.alpha == spec.rank
        ours.append(spec.rank)
    compare(ours, theirs, "ranks by patterns")
    assert {2, 3, 5} == set(theirs)


@pytest.fixture(scope="module")
def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return lambda: transformers.LlamaForCausalLM(config)


def leaves_of(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The module's parameters as shapes by path, and the names of the paths."""
    params, names = {}, {}
    for name, p in module.named_parameters():
        path = name.replace(".", "/")
        path = path.replace("embed_tokens/weight", "embed_tokens/embedding")
        params[path] = jax.ShapeDtypeStruct(tuple(p.shape), np.float32)
        names[path] = name
    return params, names


MODEL_CONFIGS = {
    "all_linear": dict(target_modules="all-linear"),
    "some": dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "embedding": dict(target_modules=["embed_tokens", "down_proj"], exclude_modules=r".*\.0\..*"),
    "whole": dict(target_modules=["o_proj"], modules_to_save=["lm_head", "norm"]),
}


@pytest.mark.parametrize("config", MODEL_CONFIGS.values(), ids=MODEL_CONFIGS)
def test_a_whole_model(tiny_llama, config, compare):
    module = tiny_llama()
    params, names = leaves_of(module)
    model = quiet(peft.get_peft_model, module, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    theirs = {
        name.partition("base_model.model.")[2].partition(".lora_")[0]
        for name, _ in model.named_parameters()
        if "lora_" in name
    }
    whole = {
        name.partition("base_model.model.")[2].replace("modules_to_save.default.", "")
        for name, _ in model.named_parameters()
        if "modules_to_save" in name
    }
    kinds = {path: "linear" for path in params if path.endswith("_proj/weight")}
    entries = {"peft_type": "LORA", **config}
    found = jlora.peft.rules(entries, params, names=names, kinds=kinds)
    ours = {names[path.replace("\\", "")]: rule for path, rule in found.items()}
    assert {n.removesuffix(".weight") for n, r in ours.items() if r != "full"} == theirs
    assert {n for n, r in ours.items() if r == "full"} == whole
    compare(len(ours), len(theirs) + len(whole), "the number of adapted parameters", 0)


class Odd(torch.nn.Module):
    """Modules whose names look like parts of keys."""

    NAMES = ("lora_x", "default", "weights", "biased", "adapter", "lora_A_proj", "x_lora_B")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.NAMES:
            x = getattr(self, name)(x) + x
        return x


def test_odd_module_names(tmp_path, compare):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=[f"{n}.0" for n in Odd.NAMES])
    model = quiet(peft.get_peft_model, Odd(), config)
    randomize(model)
    quiet(model.save_pretrained, tmp_path)
    names = {n: f"{n}.0.weight" for n in Odd.NAMES}
    base = {n: np.zeros((5, 5), np.float32) for n in Odd.NAMES}
    layouts = dict.fromkeys(base, "oi")
    params = jlora.peft.load(tmp_path, base, names=names, layouts=layouts)
    jlora.peft.save(tmp_path / "again", params, names=names)
    first, again = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path, tmp_path / "again")
    )
    assert set(first) == set(again) and len(first) == 2 * len(Odd.NAMES)
    for key in first:
        compare(again[key].numpy(), first[key].numpy(), key, 0)


def leaf() -> torch.nn.Module:
    """Parameters that are no module's weight."""
    module = torch.nn.Module()
    for name in ("up", "down", "xup"):
        module.register_parameter(name, torch.nn.Parameter(torch.ones(3, 4, 4)))
    return module


PARAMETERS = [
    *(["up"], ["down", "up"], ["a.up"], ["n.a.up"], ["b.down"], ["xup", "b.up"], ["m.a.up"]),
    *(["m.n.b.xup"], ["a.up", "up"], ["xa.up"]),
]


@pytest.mark.parametrize("entries", PARAMETERS, ids=str)
def test_the_same_parameters_are_chosen(entries, compare):
    """An entry of `target_parameters` is a whole name or its last components, and no pattern."""
    module = torch.nn.Module()
    module.m = torch.nn.ModuleDict({"a": leaf(), "b": leaf(), "xa": leaf()})
    module.m["n"] = torch.nn.ModuleDict({"a": leaf(), "b": leaf()})
    shapes = {
        n: jax.ShapeDtypeStruct(tuple(p.shape), np.float32) for n, p in module.named_parameters()
    }
    config = peft.LoraConfig(target_modules=[], target_parameters=entries)
    model = quiet(peft.get_peft_model, module, config)
    theirs = set(model.base_model.targeted_parameter_names)
    found = jlora.peft.rules(config.to_dict(), shapes, names={name: name for name in shapes})
    assert {path.replace("\\", "") for path in found} == theirs and 0 < len(theirs) < len(shapes)
    assert all(isinstance(rule, jlora.LoraSpec) for rule in found.values())
    compare(len(found), len(theirs), "the number of adapted parameters", 0)
