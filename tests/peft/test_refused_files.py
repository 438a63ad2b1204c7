"""Files that are refused: what is wrong, in which key, and what was meant."""

import json

import numpy as np
import pytest
from helpers import says
from peft_cases import PREFIX, SMALL_NAMES, base, entries, load, tensors, write, zeros

from jlora import peft

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
        says("1 keys are unexpected", "m.q_proj.lora_magnitude_vector"),
    ),
    "bias_of_b": (
        tensors(m__q_proj__lora_B__bias=zeros(4)),
        {},
        says("1 keys are unexpected", "m.q_proj.lora_B.bias"),
    ),
    "bias_of_a": (tensors(m__q_proj__lora_A__bias=zeros(2)), {}, says("is of a bias on lora_A")),
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
        says("1 keys are unexpected"),
    ),
    "peft_type_missing": (tensors(), {"peft_type": None}, says('has no "peft_type"')),
    "peft_type": (tensors(), {"peft_type": "LOHA"}, says("peft_type 'LOHA' is another method")),
    "dora": (
        tensors(),
        {"use_dora": True},
        says("2 keys are missing", "m.q_proj.lora_magnitude_vector"),
    ),
    "qalora": (tensors(), {"use_qalora": True}, says("uses QALoRA")),
    "lora_bias": (tensors(), {"lora_bias": True}, says("2 keys are missing", "q_proj.lora_B.bias")),
    "alora": (tensors(), {"alora_invocation_tokens": [3]}, says("uses activated LoRA")),
    "arrow": (tensors(), {"arrow_config": {"top_k": 3}}, says("uses Arrow")),
    "bdlora": (tensors(), {"use_bdlora": {"nblocks": 2}}, says("uses block-diagonal LoRA")),
    "kasa_config": (tensors(), {"kasa_config": {"beta": 1e-4}}, says("uses KaSA")),
    "monte": (tensors(), {"monteclora_config": {"num_samples": 8}}, says("uses MonteCLoRA")),
    "velora_config": (tensors(), {"velora_config": {"scale": 1.0}}, says("uses VeLoRA")),
    "megatron": (tensors(), {"megatron_config": {"a": 1}}, says("uses Megatron's")),
    "replication": (tensors(), {"layer_replication": [[0, 2]]}, says("uses layers replicated")),
    "token_indices": (
        tensors(),
        {"trainable_token_indices": [1]},
        says("1 keys are missing", "<the input embedding>.token_adapter.trainable_tokens_delta"),
    ),
    "token_indices_by_name": (
        tensors(),
        {"trainable_token_indices": {"q_proj": [1]}},
        says('1 keys are missing: "q_proj.token_adapter.trainable_tokens_delta"'),
    ),
    "unknown_key": (
        tensors(),
        {"use_rslora2": True},
        says('sets "use_rslora2" to True', "Closest", "use_rslora"),
    ),
    "pissa": (tensors(), {"init_lora_weights": "pissa_niter_4"}, says("moves the base weights")),
    "no_init": (tensors(), {"init_lora_weights": "magic"}, says("init_lora_weights='magic'")),
    "pissa_alpha": (
        tensors(),
        {"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 0}},
        says('"pissa" and "olora" on linear layers alone', '"q/kernel" is linear with', "0.0"),
    ),
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
    "regex_inside": (
        tensors(),
        {"alpha_pattern": {"(?i)q": 3}},
        says("'(?i)q' is not a regular expression here"),
    ),
    "slow": (
        tensors(),
        {"alpha_pattern": {"(a+)+": 3}},
        says("'(a+)+' repeats a group"),
    ),
    "slow_2": (
        tensors(),
        {"alpha_pattern": {"a*" * 9: 3}},
        says("has too many repeats and alternatives"),
    ),
    "slow_3": (
        tensors(),
        {"alpha_pattern": {"(m|m|m)" * 20: 3}},
        says("has too many repeats and alternatives"),
    ),
    "not_json": (tensors(), "{", says("adapter_config.json is not JSON")),
    "deep": (tensors(), "[" * 100_000, says("adapter_config.json is not JSON")),
    "no_object": (tensors(), "[1]", says("not a JSON object but a list")),
}


@pytest.mark.parametrize(("file", "config", "match"), FILES.values(), ids=FILES)
def test_a_file_is_refused(tmp_path, file, config, match):
    names = (
        {**SMALL_NAMES, "q/bias": "m.bias_proj.weight"}
        if "m.bias_proj" in str(file)
        else SMALL_NAMES
    )
    config = config if isinstance(config, str) else entries(**config)
    write(tmp_path, file, config)
    with pytest.raises(ValueError, match=match):
        load(tmp_path, names)


def test_an_error_lists_keys_in_alphabetical_order(tmp_path):
    more = {f"{PREFIX}m.{letter}.lora_A.weight": zeros(2, 5) for letter in "dbeac"}
    write(tmp_path, {**tensors(), **more}, entries())
    with pytest.raises(ValueError, match=says("m.a.lora", "m.b.lora", "m.c.lora", "m.d.lora")):
        load(tmp_path)


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
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors is not a complete safetensors"
    ):
        load(tmp_path)


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries()))
    with pytest.raises(
        ValueError, match=says("is a pickle", 'map_location="cpu", weights_only=True')
    ):
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
        peft.rules(tmp_path, base(), names=SMALL_NAMES)
