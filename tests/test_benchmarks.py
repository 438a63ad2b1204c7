"""The benchmarks: what they compute is right; each runs, at tiny sizes and without its peers."""

import json
import sys

import blocks
import decode
import jax
import llama
import memory
import peers
import plots
import pytest
import step

TINY = blocks.Sizes(2, 32, 48, 4, 2, 8, 2, 16, 2, "float32")


def test_the_account_of_gpt3_is_that_of_its_shapes():
    d, layers = 12288, 96
    # 12 d^2 a layer, 13 d of biases and norms; two embeddings; the last norm.
    weights = layers * (12 * d * d + 13 * d) + (50257 + 2048) * d + 2 * d
    adapter = layers * 2 * (d * 4 + 4 * d)
    found = memory.account(memory.gpt3())
    assert (found["parameters"], found["trainable"]) == (weights, adapter)
    scalings = 2 * 4  # one float32 for query, one for value
    count = 4  # Adam's, of steps
    full, lora = found["full"], found["lora"]
    assert full["weights"] == full["gradients"] == full["checkpoint"] == lora["weights"]
    assert full["weights"] == 2 * weights
    assert full["adam"] == 4 * weights + count
    assert lora["adapter"] - lora["gradients"] in (scalings, layers * scalings)
    assert lora["gradients"] == 2 * adapter and lora["adam"] == 4 * adapter + count
    assert full["total"] == 8 * weights + count
    assert lora["total"] == sum(lora[k] for k in ("weights", "adapter", "gradients", "adam"))
    # The paper's 350 GB and 35 MB, of which the latter are MiB.
    assert round(full["checkpoint"] / 1e9) == 349 and round(lora["checkpoint"] / 2**20) == 36


@pytest.mark.parametrize(
    ("name", "parameters", "trainable"),
    [  # the first as published; then rank 4 times in and out of q and of v, by hand
        ("Llama-3 8B", 8_030_261_248, 32 * 4 * (4096 + 4096 + 4096 + 1024)),
        ("Llama-3 70B", 70_553_706_496, 80 * 4 * (8192 + 8192 + 8192 + 1024)),
    ],
)
def test_the_account_of_llama3(name, parameters, trainable):
    found = memory.account(memory.MODELS[name]())
    assert (found["parameters"], found["trainable"]) == (parameters, trainable)


@pytest.fixture
def no_peers(monkeypatch):
    """As where the libraries are not installed."""
    for library in ("qwix", "torch", "peft"):
        monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.usefixtures("no_peers")
def test_step_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(blocks.PRESETS, "smollm2", TINY)
    step.main(["--rounds", "1", "--json", str(tmp_path / "step.json")])
    printed = capsys.readouterr().out
    assert "left out: qwix" in printed and "left out: peft" in printed
    result = json.loads((tmp_path / "step.json").read_text())
    assert {"jax", "jaxlib", "torch", "peft", "qwix"} <= set(result["versions"])
    assert result["device"] and result["date"] and result["sizes"]["width"] == 32
    rows = result["variants"]
    assert list(rows) == ["limit", "jlora", "naive", "merged", "full"]
    for row in rows.values():
        assert {"ratio", "seconds", "temp_bytes", "flops"} <= set(row)
    assert rows["limit"]["ratio"] == 1


@pytest.mark.usefixtures("no_peers")
def test_plots_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "TOKENS", [TINY, TINY._replace(time=32)])
    monkeypatch.setattr(plots, "RANKS", [TINY])
    plots.main(["--rounds", "1", "--out", str(tmp_path)])
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["tokens"] for point in swept["tokens"]] == [32, 64]
    for name in ("ratio_tokens.png", "ratio_rank.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("library", ["peft", "qwix"])
def test_a_peer_computes_the_same(library):
    base, x = blocks.weights(TINY)
    params = blocks.attached(TINY, base)
    own = step.own_variants(TINY, params, x)
    losses = {name: float(variant.run()) for name, variant in own.items()}
    found = {"peft": peers.with_peft, "qwix": peers.with_qwix}[library](TINY, params, x)
    assert float(found[library].run()) == pytest.approx(losses["jlora"], rel=1e-5)
    assert losses["naive"] == pytest.approx(losses["merged"], rel=1e-5)
    assert losses["jlora"] != pytest.approx(losses["limit"], rel=1e-4)
    for variant in found.values():
        assert variant.temp_bytes > 0 and variant.flops > 0
    if library == "peft":
        assert float(found["peft_limit"].run()) == pytest.approx(losses["limit"], rel=1e-5)


def test_decode_runs():
    rows = decode.measure(llama.Config(64, 16, 32, 2, 2, 1, 8, 128), rounds=1)
    assert list(rows) == ["base", "jlora", "merged"] and rows["base"]["ratio"] == 1


def test_presets_compile_abstractly():
    for sizes in blocks.PRESETS.values():
        base, x = jax.eval_shape(lambda sizes=sizes: blocks.weights(sizes))
        params = jax.eval_shape(lambda p, sizes=sizes: blocks.attached(sizes, p), base)
        loss = jax.eval_shape(lambda p, x, d=sizes.head_dim: blocks.loss(p, x, head_dim=d), base, x)
        assert len(params) == sizes.blocks and loss.shape == ()
