"""PEFT's files without PEFT: exact round trips, every layout, alphas, folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import bits
from peft_cases import KEY, LAYOUTS, NAMES, ORDER, adapted, config, keys, model, same, spec

import jlora
from jlora import FullArray, peft


def test_save_and_load_are_exact(tmp_path):
    params = adapted()
    peft.save(tmp_path, params, names=NAMES, **ORDER)
    base = model()
    got = peft.load(tmp_path, base, names=NAMES, layouts=LAYOUTS, dtype=None)
    same(got, params)
    assert got["deep"].base is base["deep"]
    assert got["deep"].scaling.shape == (3, 4) and got["experts"]["up"].lora_a.shape == (4, 5, 2)


def test_load_onto_adapted_parameters_keeps_their_layouts(tmp_path):
    params = adapted()
    peft.save(tmp_path, params, names=NAMES, **ORDER)
    same(peft.load(tmp_path, params, names=NAMES, dtype=None), params)


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
    read = lambda k, dtype=np.float32: np.frombuffer(found[k]["data"], dtype).reshape(
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


@pytest.mark.sample(4)
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


@pytest.mark.sample(2)
@pytest.mark.parametrize("layout", ["ooio", "oio", "iooi"])
def test_one_leaf_whose_parameters_share_a_or_b(tmp_path, layout):
    """What the program multiplies by at once has one A (or B); the file has it for each."""
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(2, 3, 6, 4)), jnp.float32)}
    names = {"w": ["m.k.weight", "m.v.weight"]}
    params = jlora.attach(base, {"w": spec(layout=layout)}, key=KEY)
    for name, tree in (("whole", params), ("part", jlora.detach(params)[1])):
        peft.save(tmp_path / name, tree, names=names)
        got = peft.load(tmp_path / name, base, names=names, layouts={"w": layout})
        assert got["w"].layout == layout[-3:] and got["w"].base is base["w"]
        want, have = (jlora.merge(tree)["w"] for tree in (params, got))
        np.testing.assert_array_equal(have, want)
        found = dict(keys(tmp_path / name))
        shared = {"ooio": "A", "iooi": "B"}.get(layout)
        if shared is not None:
            k, v = (found[f"base_model.model.m.{x}.lora_{shared}.weight"]["data"] for x in "kv")
            assert k == v


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


def test_loading_only_full_parameters(tmp_path):
    params = jlora.attach(model(), {"head/kernel": "full"}, key=KEY)
    peft.save(tmp_path, params, names=NAMES)
    got = peft.load(tmp_path, model(), names=NAMES)
    assert isinstance(got["head"]["kernel"], FullArray)
    same(got, params)
