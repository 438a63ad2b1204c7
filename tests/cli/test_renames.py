"""Adapters with the names of a model in memory, over files that name its tensors otherwise."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import D, adapter, checkpoint, pair, read, run, tensors_of, update

from jlora.cli._checkpoint import Checkpoint
from jlora.cli._renames import renaming
from jlora.cli._safetensors import Entry

PAIRS = {
    "vit": {
        "vit.encoder.layer.0.attention.attention.query": "vit.layers.0.attention.q_proj",
        "vit.encoder.layer.0.attention.attention.value": "vit.layers.0.attention.v_proj",
        "vit.encoder.layer.0.attention.output.dense": "vit.layers.0.attention.o_proj",
        "vit.encoder.layer.0.intermediate.dense": "vit.layers.0.mlp.fc1",
        "vit.encoder.layer.0.output.dense": "vit.layers.0.mlp.fc2",
    },
    "vit without a prefix": {
        "encoder.layer.0.attention.attention.key": "vit.layers.0.attention.k_proj"
    },
    "dinov2": {
        "dinov2.encoder.layer.0.attention.attention.query": (
            "dinov2.encoder.layer.0.attention.q_proj"
        ),
        "dinov2.encoder.layer.0.mlp.weights_out": "dinov2.encoder.layer.0.mlp.down_proj",
    },
    "swin": {
        "swin.encoder.layers.0.blocks.0.attention.self.query": (
            "swin.encoder.layers.0.blocks.0.attention.q_proj"
        ),
        "swin.encoder.layers.0.blocks.0.output.dense": ("swin.encoder.layers.0.blocks.0.mlp.fc2"),
    },
    "segformer": {
        "segformer.encoder.block.1.0.attention.self.value": (
            "segformer.stages.1.blocks.0.attention.v_proj"
        ),
        "segformer.encoder.block.1.0.mlp.dense1": "segformer.stages.1.blocks.0.mlp.fc1",
        "decode_head.linear_c.0.proj": "decode_head.linear_projections.0.proj",
    },
    "llava": {
        "language_model.model.layers.0.mlp.up_proj": "model.language_model.layers.0.mlp.up_proj",
        "language_model.lm_head": "lm_head",
        "multi_modal_projector.linear_1": "model.multi_modal_projector.linear_1",
    },
    "gemma 3": {
        "language_model.model.layers.0.mlp.up_proj": "model.language_model.layers.0.mlp.up_proj",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1": (
            "model.vision_tower.encoder.layers.0.mlp.fc1"
        ),
    },
    "qwen-vl": {
        "model.layers.0.mlp.up_proj": "model.language_model.layers.0.mlp.up_proj",
        "visual.blocks.0.attn.qkv": "model.visual.blocks.0.attn.qkv",
    },
    "text of qwen 3.5": {"model.language_model.layers.0.mlp.up_proj": "model.layers.0.mlp.up_proj"},
    "gpt-neox": {"gpt_neox.layers.0.dense": "gpt_neox.layers.0.dense", "embed_out": "lm_head"},
    "detr": {
        "model.encoder.layers.0.self_attn.out_proj": "model.encoder.layers.0.self_attn.o_proj",
        "model.decoder.layers.0.fc1": "model.decoder.layers.0.mlp.fc1",
    },
}


@pytest.mark.parametrize("family", PAIRS)
def test_a_family_is_told_by_its_names(family):
    one = Entry(Path("x"), "F32", (1, 1), 8, 4)
    entries = {f"{key}.weight": one for key in PAIRS[family]}
    rename = renaming(PAIRS[family].values(), Checkpoint(Path("x"), entries, {}, {}, {}), "call")
    assert [rename(key) for key in entries] == [f"{x}.weight" for x in PAIRS[family].values()]


def test_the_merged_files_keep_their_names(tmp_path):
    stored = "vit.encoder.layer.0.attention.attention.query"
    base = tensors_of({f"{stored}.weight": (D, D), "vit.encoder.layer.0.output.dense.bias": (D,)})
    lora = pair("vit.layers.0.attention.q_proj", D, D)
    folder = checkpoint(tmp_path / "base", base)
    run("merge", folder, adapter(tmp_path / "a", lora, target_modules=["q_proj"]), tmp_path / "out")
    got, w = read(tmp_path / "out"), base[f"{stored}.weight"]
    assert set(got) == set(base)
    want = np.float32(w) + update(lora, "vit.layers.0.attention.q_proj")
    assert np.array_equal(got[f"{stored}.weight"], want.astype(w.dtype))


def test_a_part_of_a_stored_tensor_is_refused(tmp_path, capsys):
    stored = "dinov2.encoder.layer.0.mlp.weights_in"
    folder = checkpoint(tmp_path / "base", tensors_of({f"{stored}.weight": (2 * D, D)}))
    lora = pair("dinov2.encoder.layer.0.mlp.up_proj", D, D)
    path = adapter(tmp_path / "a", lora, target_modules=["up_proj"])
    run("merge", folder, path, tmp_path / "out", code=2)
    err = capsys.readouterr().err
    assert f'BASE stores it as a part of another tensor, such as "{stored}.weight"' in err
    assert "save_original_format=False" in err


def both_kinds(tmp_path, encoder):
    """An encoder's square Linear and a decoder's square Conv1D, and what tells them apart."""
    shapes = {"encoder.q.weight": (D, D), "decoder.c_proj.weight": (D, D)}
    shapes |= {f"{encoder}.fc.weight": (2 * D, D), f"{encoder}.fc.bias": (2 * D,)}
    shapes |= {"decoder.c_fc.weight": (D, 2 * D), "decoder.c_fc.bias": (2 * D,)}
    base = tensors_of(shapes, np.float32)
    lora = pair("encoder.q", D, D) | pair("decoder.c_proj", D, D, seed=1)
    said = {"fan_in_fan_out": True, "target_modules": ["q", "c_proj"]}
    folder = checkpoint(tmp_path / "base", base)
    return base, lora, [folder, adapter(tmp_path / "lora", lora, **said), tmp_path / "out"]


def test_a_square_weight_has_the_orientation_of_its_neighbors(tmp_path):
    """PEFT saves `fan_in_fan_out` as true for a model that has Linear and Conv1D."""
    base, lora, words = both_kinds(tmp_path, "encoder")
    run("merge", *words)
    got = read(tmp_path / "out")
    want = {
        "encoder.q": update(lora, "encoder.q"),
        "decoder.c_proj": update(lora, "decoder.c_proj").T,
    }
    for name, delta in want.items():
        assert np.array_equal(got[f"{name}.weight"], base[f"{name}.weight"] + delta), name


def test_a_square_weight_between_both_kinds_is_refused(tmp_path, capsys):
    _, _, words = both_kinds(tmp_path, "decoder")
    run("merge", *words, code=2)
    err = capsys.readouterr().err
    assert '"decoder.c_proj.weight" [8, 8] is square, and near it are' in err
