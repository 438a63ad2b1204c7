"""The main job's adapter for llama.cpp: the second command is `jlora convert`."""

import json
from pathlib import Path

import gguf
import numpy as np
from conftest import Run

import jlora.gguf
from jlora.cli import main
from jlora.cli._source import open_source


def test_the_adapter_of_the_main_job(finished: Run, tiny_path: Path, tmp_path: Path) -> None:
    """Every trained matrix, under GGUF's names, with q and k in its order."""
    file = tmp_path / "adapter.gguf"
    assert (
        main(
            ["convert", str(finished.exported), str(file), "--to", "gguf", "--base", str(tiny_path)]
        )
        == 0
    )
    config = json.loads((tiny_path / "config.json").read_text())
    read = {m.name: m for m in jlora.gguf.load(file, config)}
    trained = open_source(finished.exported, None, "read").modules
    assert len(trained) == 7 * config["num_hidden_layers"] == len(read)
    for module in trained:
        found = read[module.name]
        assert np.abs(module.b).max() > 0
        np.testing.assert_array_equal(found.a, module.a)
        np.testing.assert_array_equal(found.b, module.b)
        np.testing.assert_allclose(found.scaling, module.scaling, rtol=1e-6)
    name = "blk.0.attn_q.weight.lora_b"
    (q,) = (x.data for x in gguf.GGUFReader(file).tensors if x.name == name)
    own = read["model.layers.0.self_attn.q_proj"].b
    assert not np.array_equal(q, own)
    np.testing.assert_array_equal(np.sort(q, 0), np.sort(own, 0))
