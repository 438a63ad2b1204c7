"""PEFT's files, refused: what is wrong, in which key, what was meant; and a fuzz."""

import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import FullArray, LoraArray, LoraSpec, peft

NAMES = {"q/kernel": "m.q_proj.weight", "k/kernel": "m.k_proj.weight", "q/bias": "m.q_proj.bias"}
PREFIX = "base_model.model."


def says(*parts: str) -> str:
    return "(?s)" + ".*".join(re.escape(p) for p in parts)


def base():
    return {
        "q": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)},
        "k": {"kernel": jnp.ones((5, 3))},
    }


def tensors(**changes):
    found = {
        "m.q_proj.lora_A.weight": np.ones((2, 5), np.float32),
        "m.q_proj.lora_B.weight": np.full((4, 2), 2, np.float32),
        "m.k_proj.lora_A.weight": np.full((2, 5), 3, np.float32),
        "m.k_proj.lora_B.weight": np.full((3, 2), 4, np.float32),
    }
    found |= {k.replace("__", "."): x for k, x in changes.items()}
    return {PREFIX + k: x for k, x in found.items() if x is not None}


def entries(**changes):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **changes}


def write(folder, tensors, entries):
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "adapter_config.json").write_text(text)
    return folder


def load(folder, names=NAMES, **kw):
    return peft.load(folder, base(), names=names, **kw)


def zeros(*shape):
    return np.zeros(shape, np.float32)


FILES = {
    "missing": (
        tensors(m__q_proj__lora_B__weight=None),
        {},
        says(
            "1 keys are missing", f'"{PREFIX}m.q_proj.lora_B.weight"', 'Closest: "m.q_proj.weight"'
        ),
    ),
    "missing_target": (
        tensors(m__k_proj__lora_A__weight=None, m__k_proj__lora_B__weight=None),
        {"target_modules": ["q_proj", "k_proj"]},
        says("2 keys are missing", "m.k_proj.lora_A.weight"),
    ),
    "missing_whole": (
        tensors(),
        {"modules_to_save": ["q_proj"]},
        says("2 keys are missing", "m.q_proj.weight"),
    ),
    "missing_bias": (
        tensors(),
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        says("1 keys are missing", "m.q_proj.bias"),
    ),
    "unexpected": (
        tensors(m__w_proj__lora_A__weight=zeros(2, 5), m__w_proj__lora_B__weight=zeros(4, 2)),
        {},
        says("2 keys are unexpected", "m.w_proj.lora_A.weight", "Closest", "m.q_proj.weight"),
    ),
    "unexpected_embedding": (
        tensors(m__q_proj__lora_embedding_A=zeros(2, 5), m__q_proj__lora_embedding_B=zeros(4, 2)),
        {},
        says("2 keys are unexpected", "m.q_proj.lora_A.weight"),
    ),
    "unexpected_whole": (
        tensors(m__q_proj__weight=zeros(4, 5)),
        {},
        says("1 keys are unexpected", "m.q_proj.weight"),
    ),
    "vector": (
        tensors(m__bias_proj__lora_A__weight=zeros(2, 5), m__bias_proj__lora_B__weight=zeros(4, 2)),
        {},
        says("unexpected", "bias_proj"),
    ),
    "misshaped": (
        tensors(m__q_proj__lora_A__weight=zeros(2, 6)),
        {},
        says(
            "1 keys have another shape",
            'm.q_proj.lora_A.weight" [2, 6], where "q/kernel" needs [2, 5]',
        ),
    ),
    "another_rank": (tensors(), {"r": 3}, says("4 keys have another shape", "needs [3, 5]")),
    "scalar": (
        tensors(m__q_proj__lora_A__weight=zeros()),
        {},
        says("1 keys have another shape", "[]"),
    ),
    "misshaped_whole": (
        tensors(m__q_proj__bias=zeros(5)),
        {"bias": "all"},
        says("1 keys have another shape", 'm.q_proj.bias" [5], where "q/bias" needs [4]'),
    ),
    "empty": ({}, {}, says("the file holds no tensors")),
    "integers": (
        tensors(m__q_proj__lora_A__weight=np.ones((2, 5), np.int64)),
        {},
        says("q_proj.lora_A.weight", "dtype I64"),
    ),
    "magnitude": (
        tensors(m__q_proj__lora_magnitude_vector=zeros(4)),
        {},
        says("is of DoRA's magnitudes, which jlora does not have yet"),
    ),
    "bias_of_b": (tensors(m__q_proj__lora_B__bias=zeros(4)), {}, says("is of a bias on lora_B")),
    "kasa": (tensors(m__q_proj__lora_diag=zeros(2)), {}, says("is of KaSA")),
    "velora": (tensors(m__q_proj__lora_velora_embed=zeros(2)), {}, says("is of VeLoRA")),
    "monteclora": (
        tensors(m__q_proj__lora_monteclora_sampler__std_prior=zeros(2)),
        {},
        says("is of MonteCLoRA"),
    ),
    "tokens": (
        tensors(m__q_proj__token_adapter__trainable_tokens_delta=zeros(2, 4)),
        {},
        says("is of trainable tokens"),
    ),
    "peft_type_missing": (tensors(), {"peft_type": None}, says('has no "peft_type"')),
    "peft_type": (tensors(), {"peft_type": "LOHA"}, says("peft_type 'LOHA' is another method")),
    "dora": (tensors(), {"use_dora": True}, says("uses DoRA (use_dora=True)", "other numbers")),
    "qalora": (tensors(), {"use_qalora": True}, says("uses QALoRA")),
    "lora_bias": (tensors(), {"lora_bias": True}, says("uses a bias on lora_B")),
    "alora": (tensors(), {"alora_invocation_tokens": [3]}, says("uses activated LoRA")),
    "arrow": (tensors(), {"arrow_config": {"top_k": 3}}, says("uses Arrow")),
    "bdlora": (tensors(), {"use_bdlora": {"nblocks": 2}}, says("uses block-diagonal LoRA")),
    "kasa_config": (tensors(), {"kasa_config": {"beta": 1e-4}}, says("uses KaSA")),
    "monte": (tensors(), {"monteclora_config": {"num_samples": 8}}, says("uses MonteCLoRA")),
    "velora_config": (tensors(), {"velora_config": {"scale": 1.0}}, says("uses VeLoRA")),
    "megatron": (tensors(), {"megatron_config": {"a": 1}}, says("uses Megatron's")),
    "replication": (tensors(), {"layer_replication": [[0, 2]]}, says("uses layers replicated")),
    "token_indices": (tensors(), {"trainable_token_indices": [1]}, says("uses trainable tokens")),
    "tying": (tensors(), {"ensure_weight_tying": True}, says("uses adapters of tied layers")),
    "unknown_key": (
        tensors(),
        {"use_rslora2": True},
        says('sets "use_rslora2" to True', "Closest", "use_rslora"),
    ),
    "pissa": (tensors(), {"init_lora_weights": "pissa_niter_4"}, says("moves the base weights")),
    "mica": (tensors(), {"init_lora_weights": "mica"}, says("init_lora_weights='mica'")),
    "r": (tensors(), {"r": 0}, says("r is 0; it must be an integer of at least 1")),
    "r_bool": (tensors(), {"r": True}, says("r is True")),
    "alpha": (tensors(), {"lora_alpha": float("nan")}, says("lora_alpha is nan", "finite number")),
    "alpha_huge": (tensors(), {"lora_alpha": 10**400}, says("lora_alpha is", "finite number")),
    "rank_pattern": (tensors(), {"rank_pattern": {"q": -1}}, says("rank_pattern is {'q': -1}")),
    "alpha_pattern": (tensors(), {"alpha_pattern": [3]}, says("alpha_pattern is [3]")),
    "use_rslora": (tensors(), {"use_rslora": "yes"}, says("use_rslora is 'yes'", "true or false")),
    "target_modules": (tensors(), {"target_modules": 3}, says("target_modules is 3")),
    "exclude_modules": (tensors(), {"exclude_modules": [3]}, says("exclude_modules is [3]")),
    "layers": (tensors(), {"layers_to_transform": "a"}, says("layers_to_transform is 'a'")),
    "bias": (tensors(), {"bias": "some"}, says("bias is 'some'", '"lora_only"')),
    "init": (tensors(), {"init_lora_weights": 3}, says("init_lora_weights is 3")),
    "task_type": (tensors(), {"task_type": 3}, says("task_type is 3")),
    "saved": (tensors(), {"modules_to_save": [3]}, says("modules_to_save is [3]")),
    "regex": (tensors(), {"alpha_pattern": {"(": 3}}, says("'(' is not a regular expression")),
    "slow": (
        tensors(),
        {"alpha_pattern": {"(a+)+": 3}},
        says("'(a+)+' repeats a group"),
    ),
    "slow_2": (tensors(), {"alpha_pattern": {"a*" * 9: 3}}, says("repeats in more than 5 places")),
    "slow_3": (tensors(), {"alpha_pattern": {"(m|m|m)" * 20: 3}}, says("too many groups")),
    "not_json": (tensors(), "{", says("adapter_config.json is not JSON")),
    "deep": (tensors(), "[" * 100_000, says("adapter_config.json is not JSON")),
    "no_object": (tensors(), "[1]", says("not a JSON object but a list")),
}


@pytest.mark.parametrize(("file", "config", "match"), FILES.values(), ids=FILES)
def test_a_file_is_refused(tmp_path, file, config, match):
    names = {**NAMES, "q/bias": "m.bias_proj.weight"} if "m.bias_proj" in str(file) else NAMES
    config = config if isinstance(config, str) else entries(**config)
    write(tmp_path, file, config)
    with pytest.raises(ValueError, match=match):
        load(tmp_path, names)


def raw(header: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


HOSTILE = {
    "nothing": b"",
    "no_header": raw(b"", 2**63),
    "oversized_header": raw(b"{}", 2**40),
    "no_json": raw(b"\xff{}"),
    "deep_json": raw(b"[" * 100_000),
    "a_list": raw(b"[]"),
    "outside": raw(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "negative": raw(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', data=b"1234"),
    "overlapping": raw(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        data=b"1234",
    ),
    "huge_shape": raw(
        b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', data=b"1234"
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_safetensors_file_is_refused(tmp_path, content):
    write(tmp_path, tensors(), entries())
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a whole safetensors"):
        load(tmp_path)


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries()))
    with pytest.raises(ValueError, match=says("is a pickle", "weights_only=True")):
        load(tmp_path)


@pytest.mark.parametrize("adapter", ["..", "../other", "/etc", "a/b", "", ".", "a\0b", "a\\b"])
def test_a_name_cannot_leave_the_folder(tmp_path, adapter):
    inside, outside = tmp_path / "in", tmp_path / "other"
    for folder in (inside, outside):
        folder.mkdir()
        write(folder, tensors(), entries())
    with pytest.raises(ValueError, match=says("leads out of the directory")):
        load(inside, adapter=adapter)
    (inside / "link").symlink_to(outside)
    with pytest.raises(ValueError, match=says("'link'", "leads out of the directory")):
        load(inside, adapter="link")


def test_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=says("there is no", "adapter_model.safetensors")):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=says("there is no", "adapter_config.json")):
        peft.rules(tmp_path, base(), names=NAMES)


ARGUMENTS = {
    "unknown_path": (
        {"q/kernal": "m.q"},
        {},
        KeyError,
        says('`names` has "q/kernal"', '"q/kernel"'),
    ),
    "unknown_layout": (NAMES, {"layouts": {"v": "io"}}, KeyError, says('`layouts` has "v"')),
    "unknown_kind": (NAMES, {"kinds": {"v": "conv"}}, KeyError, says('`kinds` has "v"')),
    "kind": (NAMES, {"kinds": {"q/kernel": "x"}}, ValueError, says("'x'; give one of", "Conv1D")),
    "twice": (
        {"k/kernel": "m.q.weight", "q/kernel": "m.q.weight"},
        {},
        ValueError,
        says('gives "m.q.weight" to both "k/kernel" and "q/kernel"', "tied"),
    ),
    "no_string": (lambda path: 3, {}, TypeError, says('gives 3 for "k/kernel"')),
    "too_deep": (
        {"q/kernel": "m.{}.{}.{}.weight"},
        {},
        ValueError,
        says("unrolls 3 dimensions", '"q/kernel" float32[5,4]'),
    ),
    "wrong_list": ({"q/kernel": ["m.a.weight"]}, {}, ValueError, says("has 1 names", "each index")),
    "ragged": (
        {"q/kernel": ["m.{}.weight", "m.b.weight", "m.c.weight", "m.d.weight", "m.e.weight"]},
        {},
        ValueError,
        says('names of "q/kernel" unroll another number of dimensions'),
    ),
}


@pytest.mark.parametrize(("names", "more", "error", "match"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_refused(tmp_path, names, more, error, match):
    write(tmp_path, tensors(), entries())
    with pytest.raises(error, match=match):
        load(tmp_path, names, **more)


def test_a_weight_whose_sides_are_not_known(tmp_path):
    write(tmp_path, tensors(), entries())
    weights = {"q": jnp.ones((5, 2, 2)), "k": jnp.ones((5, 3))}
    names = {"q": "m.q_proj.weight", "k": "m.k_proj.weight"}
    with pytest.raises(ValueError, match=says('[5, 2, 2] of "q" are input', "layouts")):
        peft.load(tmp_path, weights, names=names)
    assert peft.load(tmp_path, weights, names=names, layouts={"q": "ioo"})["q"].rank == 2
    with pytest.raises(ValueError, match=says("layout 'i' has 1 letters", "needs its {}")):
        peft.load(tmp_path, weights, names=names, layouts={"q": "i"})


def test_layers_of_one_stack_must_be_alike(tmp_path):
    file = {f"m.{n}.q.lora_{s}.weight": zeros(2, 4) for n in range(2) for s in "A"}
    file |= {f"m.{n}.q.lora_B.weight": zeros(4, 2) for n in range(2)}
    names, weights = {"q": "m.{}.q.weight"}, {"q": jnp.ones((3, 4, 4))}
    write(tmp_path, file, entries())
    with pytest.raises(ValueError, match=says("1 keys are missing", "m.2.q.lora_A.weight")):
        peft.load(tmp_path, weights, names=names)
    file |= {"m.2.q.lora_A.weight": zeros(1, 4), "m.2.q.lora_B.weight": zeros(4, 1)}
    write(tmp_path, file, entries(rank_pattern={"2.q": 1}))
    with pytest.raises(ValueError, match=says('"q" is one stacked leaf', '"m.2.q.weight" rank 1')):
        peft.load(tmp_path, weights, names=names)
    config = entries(target_modules=["q"], rank_pattern={"2.q": 1})
    with pytest.raises(ValueError, match=says('"q" is one stacked leaf', "Unstack")):
        peft.rules(config, weights, names=names)


def test_experts_of_equal_shapes_need_their_order(tmp_path):
    weights = {"e": {"a": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4, 4))}}
    names = {"e/a": "m.e.a", "e/b": "m.e.b"}
    init = lambda key, w, rank, **_: (w[:, :rank] * 0 + 1, w[:rank] * 0)  # noqa: E731
    rules = {"e/a": LoraSpec(2, 2, layout="io", init=init), "e/b": LoraSpec(2, 4, layout="io")}
    params = jlora.attach(weights, rules, key=jax.random.key(0))
    with pytest.raises(ValueError, match=says('several parameters of "m.e"', "target_parameters=")):
        peft.save(tmp_path, params, names=names)
    peft.save(tmp_path, params, names=names, target_parameters=["e.b", "e.a"])
    with pytest.raises(ValueError, match=says("['a', 'b'], of equal shapes", "declares")):
        peft.load(tmp_path, weights, names=names)
    got = peft.load(tmp_path, weights, names=names, target_parameters=["e.b", "e.a"])
    assert (got["e"]["a"].lora_a == 1).all() and (got["e"]["a"].scaling == 1).all()


# ---------------------------------------------------------------------------------------- save


def node(**changes):
    parts = {
        "base": jnp.ones((5, 4)),
        "lora_a": jnp.ones((5, 2)),
        "lora_b": jnp.ones((2, 4)),
        "scaling": jnp.float32(2),
        "layout": "io",
    }
    return LoraArray(**{**parts, **changes})


def full(*shape):
    return FullArray(jnp.ones(shape), jnp.ones(shape))


SAVES = {
    "nothing": (base(), NAMES, {}, says("nothing in `params` is adapted")),
    "unnamed": (
        {"q": node(), "k": node()},
        {"q": "m.q.weight"},
        {},
        says('"k" is adapted, but `names` gives it no PyTorch name', 'Closest: "q"'),
    ),
    "not_for_the_caller": ({"q": node()}, {"q": "m.q.weight"}, {"r": 3}, says('"r" is not for')),
    "init": (
        {"q": node()},
        {"q": "m.q.weight"},
        {"init_lora_weights": "pissa"},
        says("init_lora_weights='pissa' makes PEFT move the base"),
    ),
    "no_json": ({"q": node()}, {"q": "m.q.weight"}, {"revision": {1}}, says("are not JSON")),
    "no_alpha": (
        {"q": node(scaling=jnp.float32("nan"))},
        {"q": "m.q.weight"},
        {},
        says('scalings of "q" are [nan]'),
    ),
    "experts_of_two_alphas": (
        {"q": LoraArray(None, jnp.ones((2, 5, 1)), jnp.ones((2, 1, 4)), jnp.arange(2.0), "io")},
        {"q": "m.e.q"},
        {},
        says('scalings of "q" are [0.0, 1.0]', 'one finite alpha for "m.e.q"'),
    ),
    "half_a_module": (
        {"q": node(), "n": {"scale": full(4), "bias": jnp.ones(4)}},
        {"q": "m.q.weight", "n/scale": "m.n.weight", "n/bias": "m.n.bias"},
        {},
        says('for "m.n" also [', "m.n.bias", "must be trained whole"),
    ),
    "a_module_of_the_same_end": (
        {"q": node(), "a": full(4, 4), "b": jnp.ones((4, 4))},
        {"q": "m.q.weight", "a": "head.weight", "b": "m.head.weight"},
        {},
        says('for "head" also [', "m.head"),
    ),
    "some_biases": (
        {"q": node(), "a": full(4), "b": jnp.ones(4), "c": jnp.ones(4)},
        {"q": "m.q.weight", "a": "m.a.bias", "b": "m.b.bias", "c": "m.q.bias"},
        {},
        says("1 of 3 train, and not ['m.b.bias', 'm.q.bias']"),
    ),
    "half_an_attention": (
        {"q": node()},
        {"q": "m.mha.in_proj_weight"},
        {},
        says('both projections of "m.mha" or none', "m.mha.out_proj.weight"),
    ),
    "attention_of_two_ranks": (
        {"q": node(), "o": node(scaling=jnp.float32(1))},
        {"q": "m.mha.in_proj_weight", "o": "m.mha.out_proj.weight"},
        {},
        says('one rank and alpha for "m.mha"'),
    ),
    "a_parameter_of_the_same_end": (
        {"q": node(), "o": jnp.ones((5, 4))},
        {"q": "e.w", "o": "m.e.w"},
        {},
        says('PEFT would adapt "m.e.w" too'),
    ),
    "half_a_node": (
        {"q": node(lora_b=None)},
        {"q": "m.q.weight"},
        {},
        says('"q" is a part of a LoraArray', "jlora.combine(trainable, frozen)"),
    ),
    "half_a_full_node": (
        {"q": FullArray(jnp.ones(3), None)},
        {"q": "m.q.weight"},
        {},
        says('the value of "q" is taken out', "jlora.combine(trainable, frozen)"),
    ),
    "two_ranks": (
        {"q": node(base=None, lora_b=jnp.ones((3, 4)))},
        {"q": "m.q.weight"},
        {},
        says("needs lora_a (5, 2) and lora_b (2, 4); got (5, 2) and (3, 4)"),
    ),
    "a_window_at_no_end": (
        {"q": node(base=None, lora_a=jnp.ones((3, 3, 4, 2)), layout="iioi")},
        {"q": "m.q.weight"},
        {},
        says("a convolution's kernel [3, 3, 4, 4] with the layout 'iioi'", '"oiii" for OIHW'),
    ),
    "stack_without_braces": (
        {"q": node(base=None, lora_a=jnp.ones((2, 3, 5, 2)), lora_b=jnp.ones((2, 3, 2, 4)))},
        {"q": "m.q.weight"},
        {},
        says("leaves the shape [2, 3, 5, 4]", "needs its {}"),
    ),
}


@pytest.mark.parametrize(("params", "names", "config", "match"), SAVES.values(), ids=SAVES)
def test_save_refuses_and_writes_nothing(tmp_path, params, names, config, match):
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path / "new", params, names=names, **config)
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------- rules

RECIPES = {
    "no_targets": (entries(), ValueError, says("has no target_modules")),
    "idle": (
        entries(target_modules=["q_proj", "w_proj"]),
        ValueError,
        says("['w_proj'] of the configuration choose nothing", "Closest", "q_proj"),
    ),
    "idle_pattern": (entries(target_modules="w.*"), ValueError, says("['w.*']")),
    "idle_whole": (
        entries(target_modules=["q_proj"], modules_to_save=["head"]),
        ValueError,
        says("['head']"),
    ),
    "init": (
        entries(target_modules=["q_proj"], init_lora_weights="corda"),
        ValueError,
        says("init_lora_weights='corda' has no like", "`init=`"),
    ),
    "object": (3, TypeError, says("the configuration is a int", "to_dict()")),
    "dora": (entries(target_modules=["q_proj"], use_dora=True), ValueError, says("uses DoRA")),
}


@pytest.mark.parametrize(("config", "error", "match"), RECIPES.values(), ids=RECIPES)
def test_rules_refuse(config, error, match):
    with pytest.raises(error, match=match):
        peft.rules(config, base(), names=NAMES)


# ---------------------------------------------------------------------------------------- fuzz


def good_files(folder: Path) -> tuple[bytes, str]:
    write(folder, tensors(), entries(target_modules=["q_proj", "k_proj"], alpha_pattern={"q.*": 5}))
    file, text = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    return file.read_bytes(), text.read_text()


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 8)),
    max_size=4,
)


def damaged(content: bytes, edits, keep: float) -> bytes:
    for where, new, cut in edits:
        at = int(where * len(content))
        content = content[:at] + new + content[at + cut :]
    return content[: int(keep * len(content))]


@settings(max_examples=150, deadline=None)
@given(in_header=edits, in_config=edits, keep=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5]))
def test_damaged_files_load_right_or_not_at_all(in_header, in_config, keep):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, config = good_files(folder)
        weights = damaged(weights, in_header, keep)
        config = damaged(config.encode(), in_config, 1.0)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_bytes(config)
        try:
            got = load(folder)
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return
        # What was read is what the files still say.
        found, says_ = safetensors.numpy.load(weights), json.loads(config)
        for leaf, module in (("q", "m.q_proj"), ("k", "m.k_proj")):
            node = got[leaf]["kernel"]
            if not isinstance(node, LoraArray):
                assert not any(module in key for key in found)
                continue
            a = np.asarray(node.lora_a)
            assert a.T.tobytes() == found[f"{PREFIX}{module}.lora_A.weight"].tobytes()
            alphas = {says_.get("lora_alpha", 8), *says_.get("alpha_pattern", {}).values()}
            scalings = {np.float32(x / node.rank) for x in alphas}
            scalings |= {np.float32(x / node.rank**0.5) for x in alphas}
            assert np.float32(node.scaling) in scalings


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = (
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora target_modules target_parameters "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias init_lora_weights "
    "task_type use_dora anything"
).split()


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3))
def test_any_json_is_read_or_refused(changes):
    with tempfile.TemporaryDirectory() as name:
        config = entries(target_modules=["q_proj"]) | changes
        folder = write(Path(name), tensors(), config)
        for use in (lambda: load(folder), lambda: peft.rules(config, base(), names=NAMES)):
            try:
                use()
            except (ValueError, KeyError, TypeError):
                continue
