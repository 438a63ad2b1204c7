"""`jlora extract` and `jlora check`."""

import json

import numpy as np
import pytest
from checkpoints import (
    TARGETS,
    UP,
    VOCAB,
    D,
    adapter,
    checkpoint,
    drawn,
    pair,
    q_and_up,
    read,
    run,
    tensors_of,
)


@pytest.fixture
def both(tmp_path):
    """A checkpoint and one that an adapter was merged into, with a new norm."""
    base = tensors_of(dtype=np.float32)
    folder = checkpoint(tmp_path / "base", base, 2)
    path = adapter(tmp_path / "lora", q_and_up(), **TARGETS)
    run("merge", folder, path, tmp_path / "merged")
    tuned = read(tmp_path / "merged") | {"model.norm.weight": drawn(D, seed=50)}
    return folder, checkpoint(tmp_path / "tuned", tuned)


def test_merges_back(tmp_path, both, capsys):
    capsys.readouterr()
    run("extract", *both, tmp_path / "out", "--rank", 2, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["changed and left out"] == ["model.norm.weight"]
    assert report["decomposed"] == 4 and max(report["errors"].values()) < 1e-5
    run("extract", *both, tmp_path / "full", "--rank", 6, "--energy", 0.999999, "--full")
    text = capsys.readouterr().out
    assert "ranks: 2" in text and "whole: 1" in text
    run("merge", both[0], tmp_path / "full", tmp_path / "again")
    got, want = read(tmp_path / "again"), read(both[1])
    assert sorted(got) == sorted(want)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=1e-4)


def test_targets(tmp_path, both, capsys):
    words = ["--rank", 1, "--targets", r".*up_proj\.weight", "--niter", 4]
    run("extract", *both, tmp_path / "out", *words)
    assert "decomposed: 2" in capsys.readouterr().out
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["r"] == 1 and not any("q_proj" in m for m in said["target_modules"])


def test_a_head_that_one_checkpoint_ties(tmp_path, capsys):
    """It is the embedding there; what LoRA of a tied head becomes merges back."""
    tensors = tensors_of(dtype=np.float32, without=["lm_head.weight"])
    tied = checkpoint(tmp_path / "tied", tensors, config={"model_type": "llama"})
    path = adapter(tmp_path / "lora", pair("lm_head", VOCAB, D), target_modules=["lm_head"])
    run("check", path, "--base", tied, "--for", "vllm")
    run("check", path, "--base", tied, "--for", "llama.cpp", code=2)
    assert "lm_head.weight is the embedding in this model (merge it" in capsys.readouterr().err
    run("merge", tied, path, tmp_path / "merged")
    words = ["--rank", 2, "--targets", ".*lm_head.weight"]
    run("extract", tied, tmp_path / "merged", tmp_path / "out", *words)
    run("merge", tied, tmp_path / "out", tmp_path / "again")
    got, want = (read(tmp_path / name) for name in ("again", "merged"))
    assert sorted(got) == sorted(want)
    np.testing.assert_allclose(got["lm_head.weight"], want["lm_head.weight"], atol=1e-4)
    run("extract", tmp_path / "merged", tied, tmp_path / "back", *words)  # the other way


def test_conv1d(tmp_path):
    shapes = {"h.0.c_attn.weight": (D, 3 * D), "h.0.c_proj.weight": (D, D)}
    base = tensors_of(shapes, np.float32)
    grown = lambda x: x + drawn((len(x), 1), seed=9) @ drawn((1, x.shape[1]))
    config = {"model_type": "gpt2"}
    one = checkpoint(tmp_path / "base", base, config=config)
    tuned = {name: grown(x) for name, x in base.items()}
    other = checkpoint(tmp_path / "tuned", tuned, config=config)
    run("extract", one, other, tmp_path / "out", "--rank", 1)
    lora = read(tmp_path / "out")
    assert lora["base_model.model.h.0.c_attn.lora_A.weight"].shape == (1, D)
    run("merge", one, tmp_path / "out", tmp_path / "again")
    for name, x in tuned.items():
        np.testing.assert_allclose(read(tmp_path / "again")[name], x, atol=1e-4)


def test_check(tmp_path, both, capsys):
    path = tmp_path / "lora"
    capsys.readouterr()
    run("check", path)
    assert "weights: 4" in capsys.readouterr().out
    run("check", path, "--base", both[0], "--for", "vllm", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["keys"] == 8 and report["changes"] == {"low-rank": 4}
    run("check", path, "--for", "llama.cpp")
    capsys.readouterr()
    lora = {f"{UP}.lora_A.weight": drawn((20, D)), f"{UP}.lora_B.weight": drawn((12, 20))}
    lora["model.norm.weight"] = drawn(D)
    said = {"use_rslora": True, "modules_to_save": ["norm"], "target_modules": ["up_proj"]}
    wide = adapter(tmp_path / "wide", lora, r=20, **said)
    run("check", wide, "--for", "vllm", code=2)
    err = capsys.readouterr().err
    assert "rank 20 is above max_lora_rank 16" in err and "modules_to_save=['norm']" in err
    run("check", wide, "--for", "llama.cpp", code=2)
    assert "folds rsLoRA and alpha_pattern into B" in capsys.readouterr().err
    run("check", adapter(tmp_path / "odd", pair("model.qproj", D, D)), "--base", both[0], code=2)
    assert "2 keys are unexpected" in capsys.readouterr().err


def other(tmp_path, **changes):
    """The same checkpoint, but for some tensors."""
    tensors = tensors_of(dtype=np.float32) | changes
    return checkpoint(tmp_path / "x", {k: x for k, x in tensors.items() if x is not None})


REFUSED = {
    "lacking": (
        lambda t, b: [b, other(t, **{"model.norm.weight": None}), t / "o", "--rank", 1],
        'TUNED has no "model.norm.weight"',
    ),
    "more": (
        lambda t, b: [b, other(t, extra=drawn(3)), t / "o", "--rank", 1],
        'BASE has no "extra"',
    ),
    "grown": (
        lambda t, b: [
            b,
            other(t, **{"model.embed_tokens.weight": drawn((VOCAB + 1, D))}),
            t / "o",
            "--rank",
            1,
        ],
        "Cut off added rows first",
    ),
    "same": (lambda t, b: [b, other(t), t / "o", "--rank", 1], "no chosen tensor differs"),
    "codes": (
        lambda t, b: [
            b,
            checkpoint(t / "x", tensors_of(), config={"quantization_config": {}}),
            *(t / "o", "--rank", 1),
        ],
        "TUNED is quantized, and codes have no difference",
    ),
    "pattern": (
        lambda t, b: [b, other(t), t / "o", "--rank", 1, "--targets", "("],
        "is no regular expression",
    ),
    "no_match": (
        lambda t, b: [b, other(t), t / "o", "--rank", 1, "--targets", "up_proj"],
        "matches no matrix",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, both, capsys, case):
    words, said = REFUSED[case]
    run("extract", *words(tmp_path, both[0]), code=2)
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()
