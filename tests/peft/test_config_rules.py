"""PEFT's configurations as rules, and the ready names."""

import jax
import jax.numpy as jnp
import llama
import param_tree
import pytest
from helpers import says
from peft_cases import KEY, LAYOUTS, NAMES, ORDER, SMALL_NAMES, adapted, base, drawn, entries, model

import jlora
from jlora import peft


def test_llama_names_are_those_of_the_examples_weights():
    for tied in (True, False):
        sizes = llama.Config(16, 8, 12, 2, 2, 1, 4, 32, tied=tied)
        for path, _, name in param_tree.names(sizes):
            assert peft.llama_names(path) == peft.llama_names("params/" + path) == name
    assert (
        peft.llama_names("layers/attn/o_proj/kernel") == "model.layers.{}.self_attn.o_proj.weight"
    )
    assert peft.llama_names("layers_0/attn/rope") is None and peft.llama_names("x") is None


TUNIX = {
    "embedder/input_embedding": "model.embed_tokens.weight",
    "lm_head/w": "lm_head.weight",
    "final_norm/w": "model.norm.weight",
    "layers/12/attn/o_proj/w": "model.layers.12.self_attn.o_proj.weight",
    "layers/1/attn/v_bias": "model.layers.1.self_attn.v_proj.bias",
    "layers/1/attn/q_norm/w": "model.layers.1.self_attn.q_norm.weight",
    "layers/1/mlp/down_proj/kernel": "model.layers.1.mlp.down_proj.weight",
    "layers/1/mlp/router/kernel": "model.layers.1.mlp.gate.weight",
    "layers/1/mlp/down_proj": "model.layers.1.mlp.experts.{}.down_proj.weight",
    "layers/1/input_layernorm/w": "model.layers.1.input_layernorm.weight",
    "layers/1/mlp/down_proj/kernel_lora_a": None,
}
GEMMA3 = {
    "embedder/input_embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "layers/3/attn/attn_vec_einsum/w": "model.layers.3.self_attn.o_proj.weight",
    "layers/3/attn/q_einsum/w": "model.layers.3.self_attn.q_proj.weight",
    "layers/3/attn/qkv_einsum/w": [
        f"model.layers.3.self_attn.{x}_proj.weight" for x in ("q", "k", "v")
    ],
    "layers/3/attn/_key_norm/scale": "model.layers.3.self_attn.k_norm.weight",
    "layers/3/mlp/gate_proj/kernel": "model.layers.3.mlp.gate_proj.weight",
    "layers/3/pre_ffw_norm/scale": "model.layers.3.pre_feedforward_layernorm.weight",
    "layers/3/unknown": None,
}


@pytest.mark.parametrize(("path", "name"), TUNIX.items())
def test_tunix_names(path, name):
    assert peft.tunix_names(path) == name


@pytest.mark.parametrize(("path", "name"), GEMMA3.items())
def test_tunix_gemma3_names(path, name):
    assert peft.tunix_gemma3_names(path) == name


def recipe(**entries):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 5, **entries}


def chosen(entries, names=NAMES, **more):
    found = peft.rules(entries, model(), names=names, **more)
    return {path.replace("\\", ""): rule for path, rule in found.items()}


def test_rules_attach_what_was_saved(tmp_path):
    params = adapted()
    peft.save(tmp_path, params, names=NAMES, **ORDER)
    rules = peft.rules(tmp_path, model(), names=NAMES, init=drawn)
    again = jlora.attach(model(), rules, key=KEY, layouts=LAYOUTS)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert got.shape == want.shape
    assert rules == peft.rules(tmp_path / "adapter_config.json", model(), names=NAMES, init=drawn)


def test_rules_of_patterns_biases_and_whole_modules():
    got = chosen(
        recipe(
            target_modules=["q_proj", "m.o_proj", "embed"],
            rank_pattern={"q_proj": 4, "m.q_proj": 3},
            alpha_pattern={"^m.o_proj": 2, "o_proj": 7},
            modules_to_save=["head"],
            bias="lora_only",
            use_rslora=True,
            init_lora_weights="gaussian",
        )
    )
    assert set(got) == {
        "query/kernel",
        "query/bias",
        "out/kernel",
        "embed/embedding",
        "head/kernel",
    }
    assert got["query/bias"] == got["head/kernel"] == "full"
    query, out = got["query/kernel"], got["out/kernel"]
    assert (query.rank, query.alpha, query.scaling) == (4, 5, "rslora")
    assert (out.rank, out.alpha, out.init) == (2, 2, jlora.initializers.gaussian)
    a, b = got["embed/embedding"].init(KEY, jnp.ones((500, 40)), 2)
    assert not a.any() and float(b.std()) == pytest.approx(1, abs=0.2)


INITS = {
    True: jlora.initializers.kaiming,
    False: jlora.initializers.uniform,
    "gaussian": jlora.initializers.gaussian,
    "orthogonal": jlora.initializers.orthogonal,
    "pissa": jlora.initializers.pissa,
    "OLoRA": jlora.initializers.olora,
}


@pytest.mark.parametrize(("name", "init"), INITS.items())
def test_rules_name_the_initializer(name, init):
    got = chosen(recipe(target_modules=["fc", "embed"], init_lora_weights=name))
    assert got["layers/kernel"].init is init
    own = name in (True, False, "gaussian")
    assert (got["embed/embedding"].init is not init) == own
    if own:
        a, b = got["embed/embedding"].init(KEY, jnp.ones((500, 40)), 2)
        assert a.any() == (name is False)
        assert float(b.std()) == pytest.approx(1, abs=0.2)


def test_rules_of_a_randomized_decomposition():
    """One function for all layers of a stacked leaf, with the number in its name."""
    init = chosen(recipe(target_modules=["fc"], init_lora_weights="pissa_niter_16"))
    init = init["layers/kernel"].init
    assert init.func is jlora.initializers.pissa and init.keywords == {"niter": 16}


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga", "loftq", "mica"])
def test_rules_refuse_what_needs_more_than_the_weights(name):
    entries = recipe(target_modules=["fc"], init_lora_weights=name)
    with pytest.raises(ValueError, match=says(f"init_lora_weights='{name}'", "Give `init=`")):
        chosen(entries)
    rules = peft.rules(entries, model(), names=NAMES, init=jlora.initializers.mica)
    assert rules["layers/kernel"].init is jlora.initializers.mica


LINEAR = dict.fromkeys(("torch", "query/kernel", "out/kernel", "gemma"), "linear")


def test_rules_of_all_linear_and_all_biases():
    got = chosen(
        recipe(target_modules="all-linear", bias="all", task_type="SEQ_CLS"),
        {**NAMES, "head/kernel": "m.classifier.weight"},
        kinds=LINEAR,
    )
    linear = {"dense/kernel", "torch", "query/kernel", "out/kernel", "gemma", "layers/kernel"}
    assert set(got) == linear | {"dense/bias", "query/bias", "head/kernel"}
    assert got["head/kernel"] == "full"  # PEFT adds it, by the task


def test_rules_of_a_classifier_that_peft_saved():
    """PEFT writes both usual names of the head, of which a model has one."""
    saved = dict(modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    names = {**NAMES, "head/kernel": "m.score.weight"}
    found = chosen(recipe(target_modules=["dense"], **saved), names)
    assert found["head/kernel"] == "full" and set(found) == {"dense/kernel", "head/kernel"}


def test_all_linear_leaves_out_what_is_excluded():
    every = set(chosen(recipe(target_modules="all-linear"), kinds=LINEAR))
    for exclude in (["q_proj", "dense"], r"m\.(q_proj|dense)"):
        some = recipe(target_modules="all-linear", exclude_modules=exclude)
        left = set(chosen(some, kinds=LINEAR))
        assert every - left and not any("query" in path or "dense" in path for path in left)


def test_a_stacked_leaf_that_lies_otherwise():
    params = {"q": jnp.ones((2, 5, 4)), "k": jnp.ones((2, 4, 5))}
    names = {"q": "layers.{}.q.weight", "k": "layers.{}.k.weight"}
    config = recipe(target_modules=["q", "k"])
    found = peft.rules(config, params, names=names, layouts={"q": "oi"})
    assert (found["q"].layout, found["k"].layout) == ("oi", "io")
    node = jlora.attach(params, found, key=jax.random.key(0))["q"]
    assert node.lora_a.shape[:2] == (2, 4)
    with pytest.raises(KeyError, match=says('`layouts` has "v"')):
        peft.rules(config, params, names=names, layouts={"v": "oi"})


def test_rules_exclude_and_choose_layers():
    both = dict(exclude_modules="m.q.*", target_modules=r"m\.(q_proj|o_proj|conv)")
    assert set(chosen(recipe(**both))) == {"out/kernel", "conv/kernel"}
    assert set(chosen(recipe(target_modules=["fc"], layers_to_transform=[0, 1, 2]))) == {
        "layers/kernel"
    }
    names = {**NAMES, "torch": "m.layers.7.q_proj.weight"}
    some = dict(target_modules=["q_proj"], layers_to_transform=7, layers_pattern="layers")
    assert set(chosen(recipe(**some), names)) == {"torch"}


RECIPES = {
    "no_targets": (entries(), ValueError, says("has no target_modules")),
    "idle": (
        entries(target_modules=["u_proj", "w_proj"]),
        ValueError,
        says("['u_proj', 'w_proj'] of the configuration choose nothing", "Closest", "q_proj"),
    ),
    "empty": (entries(target_modules=[]), ValueError, says("target_modules is empty")),
    "idle_pattern": (entries(target_modules="w.*"), ValueError, says("['w.*']")),
    "idle_whole": (
        entries(target_modules=["q_proj"], modules_to_save=["head"]),
        ValueError,
        says("['head']"),
    ),
    "init": (
        entries(target_modules=["q_proj"], init_lora_weights="corda"),
        ValueError,
        says("init_lora_weights='corda' is computed from the layers' inputs", "`init=`"),
    ),
    "unknown_init": (
        entries(target_modules=["q_proj"], init_lora_weights="pissa_niter_x"),
        ValueError,
        says("init_lora_weights='pissa_niter_x' is not a name that jlora knows"),
    ),
    "layers_pattern": (
        entries(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="(?P<index>a)"),
        ValueError,
        says("'(?P<index>a)' is not a regular expression here"),
    ),
    "object": (3, TypeError, says("the configuration is a int", "to_dict()")),
    "qalora": (
        entries(target_modules=["q_proj"], use_qalora=True),
        ValueError,
        says("uses QALoRA"),
    ),
}


@pytest.mark.parametrize(("config", "error", "match"), RECIPES.values(), ids=RECIPES)
def test_rules_refuse(config, error, match):
    with pytest.raises(error, match=match):
        peft.rules(config, base(), names=SMALL_NAMES)


def test_an_error_lists_keys_in_one_order():
    """Where nothing is close the first are shown: by name, and not as a set happens to lie."""
    first = 'Closest: "alora_invocation_tokens", "alpha_pattern", "arrow_config".'
    with pytest.raises(ValueError, match=says('sets "0123456789"', first)):
        peft.rules(entries(**{"0123456789": 1}), base(), names=SMALL_NAMES)
    some = {f"q{k}": jnp.ones((4, 4)) for k in range(9)}
    rules = {"q[08]": jlora.LoraSpec(2)}
    params = jlora.attach({**some, "0": some["q0"]}, {**rules, "0": rules["q[08]"]}, key=KEY)
    names = lambda path: f"m.{path}.weight" if path[0] == "q" else None
    with pytest.raises(ValueError, match=says('Closest: "q0", "q1", "q2".')):
        peft.save("unused", {"z" * 9: params.pop("0"), **params}, names=names)
