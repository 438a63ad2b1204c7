"""PEFT's files without PEFT: exact round trips, every layout, alphas, folders, rules, names."""

import functools
import json

import jax
import jax.numpy as jnp
import llama
import numpy as np
import param_tree
import pytest
import safetensors.numpy

import jlora
from jlora import FullArray, LoraSpec, peft

KEY = jax.random.key(0)


def drawn(key, weight, rank, scaling=1.0, dtype=jnp.float32):
    """An initializer that makes both A and B other than zero, and compiles fast."""
    d_in, d_out = weight.shape
    seed = weight.astype(jnp.float32).sum()
    a = jnp.sin(1.7 * jnp.arange(d_in * rank, dtype=jnp.float32) + seed)
    b = jnp.cos(0.9 * jnp.arange(rank * d_out, dtype=jnp.float32) + seed)
    return a.reshape(d_in, rank).astype(dtype), b.reshape(rank, d_out).astype(dtype)


def spec(rank=2, alpha=5, **more):
    return LoraSpec(rank, alpha, init=drawn, **more)


@functools.cache
def model():
    """A weight of every shape that a name can unroll."""
    rng = np.random.default_rng(0)
    w = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return {
        "dense": {"kernel": w(5, 7), "bias": w(7)},
        "torch": w(7, 5).astype(jnp.bfloat16),
        "query": {"kernel": w(6, 2, 3), "bias": w(2, 3)},
        "out": {"kernel": w(2, 3, 6)},
        "gemma": w(2, 6, 3),
        "conv": {"kernel": w(3, 3, 4, 8), "oihw": w(8, 4, 3, 3)},
        "embed": {"embedding": w(11, 6)},
        "layers": {"kernel": w(3, 5, 4)},
        "experts": {"up": w(4, 5, 6), "down": w(4, 6, 5)},
        "deep": w(3, 4, 5, 6),
        "norm": {"scale": w(6)},
        "head": {"kernel": w(6, 11)},
    }


NAMES = {
    "dense/kernel": "m.dense.weight",
    "dense/bias": "m.dense.bias",
    "torch": "m.torch.weight",
    "query/kernel": "m.q_proj.weight",
    "query/bias": "m.q_proj.bias",
    "out/kernel": "m.o_proj.weight",
    "gemma": "m.k_proj.weight",
    "conv/kernel": "m.conv.weight",
    "conv/oihw": "m.oihw.weight",
    "embed/embedding": "m.embed.weight",
    "layers/kernel": "m.layers.{}.fc.weight",
    "experts/up": "m.experts.up",
    "experts/down": "m.experts.down",
    "deep": "m.blocks.{}.experts.w",
    "norm/scale": "m.norm.weight",
    "head/kernel": "m.head.weight",
}
LAYOUTS = {
    "query/kernel": "ioo",
    "out/kernel": "iio",
    "gemma": "oio",
    "torch": "oi",
    "conv/oihw": "oiii",
}
RULES = {
    "dense/kernel": spec(3),
    "torch": spec(dtype=jnp.bfloat16, layout="oi"),
    "query/kernel": spec(dtype=jnp.float16),
    "(layers|experts|deep).*": spec(alpha=1, layout="io"),
    "(dense|query)/bias": "full",
    "norm/scale|head/kernel": "full",
    ".*": spec(),
}
ORDER = {"target_parameters": ["experts.up", "experts.down"]}


@functools.cache
def adapted():
    return jlora.attach(model(), RULES, key=KEY, layouts=LAYOUTS)


def bits(x):
    x = np.asarray(x)
    return x.dtype.name, x.shape, x.tobytes()


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), x in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert bits(g) == bits(x), path


def keys(folder):
    return safetensors.deserialize((folder / "adapter_model.safetensors").read_bytes())


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_save_and_load_are_exact(tmp_path):
    params = adapted()
    peft.save(tmp_path, params, names=NAMES, **ORDER)
    base = model()
    got = peft.load(tmp_path, base, names=NAMES, layouts=LAYOUTS)
    same(got, params)
    assert got["deep"].base is base["deep"]
    assert got["deep"].scaling.shape == (3, 4) and got["experts"]["up"].lora_a.shape == (4, 5, 2)


def test_load_onto_adapted_parameters_keeps_their_layouts(tmp_path):
    params = adapted()
    peft.save(tmp_path, params, names=NAMES, **ORDER)
    same(peft.load(tmp_path, params, names=NAMES), params)


def test_a_detached_adapter_saves_the_same(tmp_path):
    params = adapted()
    for name, tree in (("whole", params), ("part", jlora.detach(params)[1])):
        peft.save(tmp_path / name, tree, names=NAMES, **ORDER)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "part" / file).read_bytes()


def test_the_shapes_and_values_in_the_file(tmp_path):
    params = adapted()
    peft.save(tmp_path, params, names=NAMES, **ORDER)
    found = {k.removeprefix("base_model.model.m."): e for k, e in keys(tmp_path)}
    read = lambda k, dtype=np.float32: np.frombuffer(found[k]["data"], dtype).reshape(  # noqa: E731
        found[k]["shape"]
    )
    np.testing.assert_array_equal(read("dense.lora_A.weight"), params["dense"]["kernel"].lora_a.T)
    # Not contiguous in memory, which the safetensors writer would not notice.
    np.testing.assert_array_equal(read("dense.lora_B.weight"), params["dense"]["kernel"].lora_b.T)
    assert found["torch.lora_A.weight"]["dtype"] == "BF16"
    assert found["q_proj.lora_B.weight"]["dtype"] == "F16"
    assert found["conv.lora_A.weight"]["shape"] == [2, 4, 3, 3]
    assert found["conv.lora_B.weight"]["shape"] == [8, 2, 1, 1]
    np.testing.assert_array_equal(
        read("conv.lora_A.weight")[1, 2], params["conv"]["kernel"].lora_a[:, :, 2, 1]
    )
    np.testing.assert_array_equal(
        read("oihw.lora_A.weight")[1], params["conv"]["oihw"].lora_a[..., 1]
    )
    np.testing.assert_array_equal(
        read("embed.lora_embedding_A"), params["embed"]["embedding"].lora_a.T
    )
    np.testing.assert_array_equal(
        read("layers.2.fc.lora_A.weight"), params["layers"]["kernel"].lora_a[2].T
    )
    # The one that PyTorch declares last is outermost; the expert runs fastest in B.
    down, up = read("experts.lora_B.weight"), read("experts.base_layer.lora_A.weight")
    assert down.shape == (5, 8) and up.shape == (8, 5)
    np.testing.assert_array_equal(down[:, 1 * 4 + 3], params["experts"]["down"].lora_b[3, 1])
    np.testing.assert_array_equal(up[3 * 2 + 1], params["experts"]["up"].lora_a[3, :, 1])
    np.testing.assert_array_equal(read("head.weight"), params["head"]["kernel"].value.T)
    assert found["q_proj.base_layer.bias"]["shape"] == [6]


def test_what_the_configuration_says(tmp_path):
    peft.save(tmp_path, adapted(), names=NAMES, task_type="CAUSAL_LM", lora_dropout=0.1, **ORDER)
    got = config(tmp_path)
    assert (got["r"], got["lora_alpha"], got["bias"]) == (2, 1, "lora_only")
    assert got["rank_pattern"] == {"m.dense": 3}
    fives = [
        "m.conv",
        "m.dense",
        "m.embed",
        "m.k_proj",
        "m.o_proj",
        "m.oihw",
        "m.q_proj",
        "m.torch",
    ]
    assert got["alpha_pattern"] == dict.fromkeys(fives, 5)
    assert got["modules_to_save"] == ["m.head", "m.norm"]
    assert got["target_modules"] == sorted(
        ["m.dense", "m.torch", "m.q_proj", "m.o_proj", "m.k_proj", "m.conv", "m.oihw", "m.embed"]
        + [f"m.layers.{n}.fc" for n in range(3)]
    )
    assert got["target_parameters"][:2] == [f"m.blocks.{n}.experts.w" for n in range(2)]
    assert (got["task_type"], got["lora_dropout"], got["peft_type"]) == ("CAUSAL_LM", 0.1, "LORA")


def test_the_files_are_as_peft_writes_them(tmp_path):
    for name in ("one", "two"):
        peft.save(tmp_path / name, adapted(), names=NAMES, **ORDER)
    raw = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    assert raw == (tmp_path / "two" / "adapter_model.safetensors").read_bytes()
    text = (tmp_path / "one" / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_saving_changes_nothing_that_was_given(tmp_path):
    params, names = adapted(), dict(NAMES)
    before = jax.tree.leaves(params)
    peft.save(tmp_path, params, names=names, **ORDER)
    assert names == NAMES
    assert all(a is b for a, b in zip(jax.tree.leaves(params), before, strict=True))


@pytest.mark.parametrize(
    ("alpha", "rank"), [(16, 8), (8, 8), (10, 3), (1, 7), (32, 3), (0.1, 3), (7.25, 5), (1e-3, 2)]
)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_alpha_comes_back(tmp_path, alpha, rank, scaling):
    rules = {"w": spec(rank, alpha, scaling=scaling)}
    params = jlora.attach({"w": jnp.ones((9, 8))}, rules, key=KEY)
    names = {"w": "m.w.weight"}
    peft.save(tmp_path, params, names=names, use_rslora=scaling == "rslora")
    written = config(tmp_path)["lora_alpha"]
    assert written == alpha and isinstance(written, type(alpha))
    same(peft.load(tmp_path, {"w": jnp.ones((9, 8))}, names=names), params)


def test_rslora_can_be_written_as_plain(tmp_path):
    params = jlora.attach({"w": jnp.ones((9, 8))}, {"w": spec(8, 16, scaling="rslora")}, key=KEY)
    peft.save(tmp_path, params, names={"w": "m.w.weight"})
    assert config(tmp_path)["use_rslora"] is False
    same(peft.load(tmp_path, {"w": jnp.ones((9, 8))}, names={"w": "m.w.weight"}), params)


def test_layers_of_a_stack_may_have_other_alphas(tmp_path):
    params = jlora.attach({"w": jnp.ones((2, 5, 4))}, {"w": spec(layout="io")}, key=KEY)
    node = params["w"]
    node = jlora.LoraArray(node.base, node.lora_a, node.lora_b, jnp.array([2.5, 0.5]), "io")
    names = {"w": "m.{}.w.weight"}
    peft.save(tmp_path, {"w": node}, names=names)
    assert config(tmp_path)["lora_alpha"] == 1 and config(tmp_path)["alpha_pattern"] == {"m.0.w": 5}
    same(peft.load(tmp_path, {"w": node.base}, names=names), {"w": node})


def test_one_leaf_of_several_parameters(tmp_path):
    """Gemma's key and value kernels are one leaf, (2, K, D, H), and two parameters there."""
    base = {"layers": {"0": {"attn": {"kv_einsum": {"w": jnp.ones((2, 2, 6, 3))}}}}}
    params = jlora.attach(base, {".*": spec(layout="oio")}, key=KEY)
    peft.save(tmp_path, params, names=peft.tunix_gemma3_names)
    assert config(tmp_path)["target_modules"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ]
    for layout in ("oio", "ooio"):  # as the user says it, and as `jlora.layouts` reads it
        layouts = {"layers/0/attn/kv_einsum/w": layout}
        got = peft.load(tmp_path, base, names=peft.tunix_gemma3_names, layouts=layouts)
        same(got, params)


def test_several_adapters_in_sub_folders(tmp_path):
    names = {"w": "m.w.weight"}
    one, two = (jlora.attach({"w": jnp.ones((5, 4))}, {"w": spec(r)}, key=KEY) for r in (1, 2))
    peft.save(tmp_path / "two", two, names=names)
    with pytest.raises(FileNotFoundError, match=r"sub-folders have the adapters \['two'\]"):
        peft.load(tmp_path, {"w": jnp.ones((5, 4))}, names=names)
    peft.save(tmp_path, one, names=names)
    same(peft.load(tmp_path, {"w": jnp.ones((5, 4))}, names=names), one)
    same(peft.load(tmp_path, {"w": jnp.ones((5, 4))}, names=names, adapter="two"), two)


def test_loralibs_flat_keys(tmp_path):
    a, b = np.ones((2, 5), np.float32), np.full((4, 2), 3, np.float32)
    flat = {"m.w.lora_A": a, "m.w.lora_B": b}
    safetensors.numpy.save_file(flat, tmp_path / "adapter_model.safetensors")
    names = {"w": "m.w.weight"}
    got = peft.load(tmp_path, {"w": jnp.ones((5, 4))}, names=names, alpha=6)["w"]
    assert (
        float(got.scaling) == 3 and bits(got.lora_a) == bits(a.T) and bits(got.lora_b) == bits(b.T)
    )
    with pytest.raises(FileNotFoundError, match="give `alpha=`"):
        peft.load(tmp_path, {"w": jnp.ones((5, 4))}, names=names)


def test_a_copy_of_the_base_embedding_is_no_adapter(tmp_path):
    """PEFT saves the base weight of a targeted `embed_tokens` too."""
    base = {"embedding": jnp.arange(12.0).reshape(4, 3)}
    names = {"embedding": "m.embed_tokens.weight"}
    params = jlora.attach(base, {".*": spec(1)}, key=KEY)
    peft.save(tmp_path, params, names=names)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    copy = "base_model.model.m.embed_tokens.base_layer.weight"
    safetensors.numpy.save_file({**tensors, copy: np.asarray(base["embedding"])}, file)
    same(peft.load(tmp_path, base, names=names), params)
    safetensors.numpy.save_file({**tensors, copy: np.zeros((4, 3), np.float32)}, file)
    with pytest.raises(ValueError, match=r"base weight of \"m.embed_tokens\".*other weights"):
        peft.load(tmp_path, base, names=names)


def test_saving_again_replaces_and_leaves_the_rest(tmp_path):
    names = {"w": "m.w.weight"}
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle of before")
    for rank in (1, 3):
        params = jlora.attach({"w": jnp.ones((5, 4))}, {"w": spec(rank)}, key=KEY)
        peft.save(tmp_path, params, names=names)
    assert peft.load(tmp_path, params, names=names)["w"].rank == 3
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_failed_save_keeps_the_old_one(tmp_path, monkeypatch):
    names = {"w": "m.w.weight"}
    old, new = (jlora.attach({"w": jnp.ones((5, 4))}, {"w": spec(r)}, key=KEY) for r in (1, 3))
    peft.save(tmp_path, old, names=names)

    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        peft.save(tmp_path, new, names=names)
    same(peft.load(tmp_path, new, names=names), old)
    assert len([*tmp_path.iterdir()]) == 2


def test_targets_that_are_suffixes_of_others_are_written_exactly(tmp_path):
    base = {"a": jnp.ones((5, 4)), "b": jnp.ones((5, 4)), "c": jnp.ones((5, 4))}
    names = {"a": "fc.weight", "b": "block.fc.weight", "c": "block.other.weight"}
    params = jlora.attach(base, {"a": spec(1), "c": spec(2)}, key=KEY)
    peft.save(tmp_path, params, names=names)
    assert config(tmp_path)["target_modules"] == r"block\.other|fc"
    same(peft.load(tmp_path, base, names=names), params)
    params = jlora.attach(base, {"a": spec(1), "b": spec(2), "c": spec(2)}, key=KEY)
    peft.save(tmp_path, params, names=names)
    assert config(tmp_path)["rank_pattern"] == {"^fc": 1}
    same(peft.load(tmp_path, base, names=names), params)


# --------------------------------------------------------------------------------- ready names


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


# --------------------------------------------------------------------------------------- rules


def recipe(**entries):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 5, **entries}


def chosen(entries, names=NAMES):
    found = peft.rules(entries, model(), names=names)
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


def test_rules_of_all_linear_and_all_biases():
    got = chosen(
        recipe(target_modules="all-linear", bias="all", task_type="SEQ_CLS"),
        {**NAMES, "head/kernel": "m.classifier.weight"},
    )
    linear = {"dense/kernel", "torch", "query/kernel", "out/kernel", "gemma", "layers/kernel"}
    assert set(got) == linear | {"dense/bias", "query/bias"}


def test_rules_of_a_classifier_that_peft_saved():
    """PEFT writes both usual names of the head, of which a model has one."""
    saved = dict(modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    names = {**NAMES, "head/kernel": "m.score.weight"}
    found = chosen(recipe(target_modules=["dense"], **saved), names)
    assert found["head/kernel"] == "full" and set(found) == {"dense/kernel", "head/kernel"}


def test_rules_exclude_and_choose_layers():
    both = dict(exclude_modules="m.q.*", target_modules=r"m\.(q_proj|o_proj|conv)")
    assert set(chosen(recipe(**both))) == {"out/kernel", "conv/kernel"}
    assert set(chosen(recipe(target_modules=["fc"], layers_to_transform=[0, 1, 2]))) == {
        "layers/kernel"
    }
    names = {**NAMES, "torch": "m.layers.7.q_proj.weight"}
    some = dict(target_modules=["q_proj"], layers_to_transform=7, layers_pattern="layers")
    assert set(chosen(recipe(**some), names)) == {"torch"}


def test_loading_only_full_parameters(tmp_path):
    params = jlora.attach(model(), {"head/kernel": "full"}, key=KEY)
    peft.save(tmp_path, params, names=NAMES)
    got = peft.load(tmp_path, model(), names=NAMES)
    assert isinstance(got["head"]["kernel"], FullArray)
    same(got, params)
