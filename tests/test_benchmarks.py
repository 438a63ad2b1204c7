"""The benchmarks: what they compute is right; each runs, at tiny sizes and without its peers."""

import gc
import json
import subprocess
import sys

import bank
import blocks
import compare
import compress
import decode
import factored
import finetune
import forms
import jax
import llama
import measure
import memory
import numpy as np
import peers
import plots
import pytest
import quality
import quant
import step
import tiny_llama
import tracing

from jlora.quant import NF4

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
    for library in ("qwix", "quax", "torch", "peft"):
        monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.nightly
@pytest.mark.usefixtures("no_peers")
def test_step_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(blocks.PRESETS, "smollm2", TINY)
    step.main(["--rounds", "1", "--json", str(tmp_path / "step.json")])
    printed = capsys.readouterr().out
    assert all(f"left out: {library}" in printed for library in ("qwix", "quax", "peft"))
    result = json.loads((tmp_path / "step.json").read_text())
    assert {"jax", "jaxlib", "torch", "peft", "qwix"} <= set(result["versions"])
    assert result["device"] and result["date"] and result["sizes"]["width"] == 32
    rows = result["variants"]
    assert list(rows) == ["limit", "jlora", "lora_fa", "naive", "merged", "full"]
    for row in rows.values():
        assert {"ratio", "seconds", "temp_bytes", "flops"} <= set(row)
    assert rows["limit"]["ratio"] == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
def test_quant_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(blocks.PRESETS, "smollm2", TINY._replace(blocks=1))
    formats = {"float32": None, "nf4": NF4(16)}
    monkeypatch.setattr(quant, "FORMATS", formats)
    monkeypatch.setattr(quant, "TOKENS", (8,))
    monkeypatch.setattr(quant, "PEERS", {})
    quant.main(["--rounds", "1", "--json", str(tmp_path / "quant.json")])
    found = json.loads((tmp_path / "quant.json").read_text())["cases"]
    assert list(found) == ["step, 8 tokens", "token"]
    assert "step, 8 tokens" in capsys.readouterr().out
    for rows in found.values():
        assert list(rows) == ["float32", "nf4"] and rows["float32"]["ratio"] == 1
        assert 4 * rows["nf4"]["base_bytes"] < rows["float32"]["base_bytes"]


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bank_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bank, "SIZES", TINY._replace(blocks=1, time=8))
    for name, value in {"SLOTS": 3, "FEW_SLOTS": 2, "TOKENS": 8, "TRAINED": 2}.items():
        monkeypatch.setattr(bank, name, value)
    bank.main(["--rounds", "1", "--json", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert len(found) == len(bank.cases()) == capsys.readouterr().out.count("base") + 1
    for case, rows in found.items():
        kinds = {"separate", "each", "map"} if "training" in case else {"base", "bank"}
        assert set(rows) == ({"base", "peft"} if "PEFT" in case else kinds)
        assert all(row["ratio"] > 0 for row in rows.values())
    assert found["training 2, 8 tokens each"]["map"]["memory over one"] > 0


def test_compress_writes_what_it_promises(tmp_path):
    words = ["--size", "40", "--rank", "6", "--to", "2", "--rounds", "1"]
    compress.main([*words, "--json", str(tmp_path / "c.json")])
    found = json.loads((tmp_path / "c.json").read_text())
    errors = found["errors"]
    assert abs(errors["factored"] - errors["dense"]) < 1e-6 < errors["dense"] < 1
    assert all(len(seconds) == 1 for seconds in found["seconds"].values())


@pytest.mark.nightly
@pytest.mark.usefixtures("no_peers")
def test_plots_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "TOKENS", [TINY, TINY._replace(time=32)])
    monkeypatch.setattr(plots, "RANKS", [TINY])
    plots.main(["--rounds", "1", "--out", str(tmp_path)])
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["tokens"] for point in swept["tokens"]] == [32, 64]
    for name in ("ratio_tokens.png", "ratio_rank.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly
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
    for variant in (own["jlora"], own["naive"], found[library]):
        assert compare.worst_error(variant.gradients(), own["merged"].gradients()) < 1e-4
    assert len(own["jlora"].gradients()) == 2 * TINY.blocks * len(TINY.shapes) + 1
    if library == "peft":
        assert float(found["peft_limit"].run()) == pytest.approx(losses["limit"], rel=1e-5)


@pytest.mark.nightly
@pytest.mark.usefixtures("no_peers")
def test_compare_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(blocks.PRESETS, "smollm2", TINY)
    counts = {"jlora": {"cases": 62, "right": 61, "factored": 60}}
    (tmp_path / "cases.json").write_text(json.dumps({"summary": counts, "cases": {"jlora": {}}}))
    flags = ["--rounds", "1", "--out", str(tmp_path), "--cases", str(tmp_path / "cases.json")]
    compare.main(flags)
    result = json.loads((tmp_path / "compare.json").read_text())
    assert list(result["step"]) == ["jlora", "naive"] and result["summary"] == counts
    assert all(0 < row["error"] < 1e-4 for row in result["step"].values())
    table = compare.markdown(result["step"], counts)
    assert table in capsys.readouterr().out and "| 61 of 62 | 60 of 62 |" in table
    assert table.splitlines()[-1].startswith("| by hand") and "| – | – |" in table
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_has_the_table_of_compare():
    result = json.loads((compare.RESULTS / "compare.json").read_text())
    table = compare.markdown(result["step"], result["summary"])
    assert table in (compare.RESULTS.parents[1] / "README.md").read_text()


def judged(library, *names):
    return {name: factored.best(factored.table()[name], library) for name in names}


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
def test_cases_are_judged():
    found = judged(factored.LIBRARIES["jlora"], "matmul", "tied", "nnx_linear", "normalized")
    assert all(row["right"] and row["error"] < factored.FLOAT32 for row in found.values())
    assert [row["factored"] for row in found.values()] == [True, True, True, False]
    assert found["normalized"]["reason"].startswith("builds float32[11,7]")


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_qwix_is_judged():
    found = judged(factored.LIBRARIES["qwix"], "matmul", "linen_dense", "nnx_linear", "tied")
    assert [row["factored"] for row in found.values()] == [True, True, True, False]
    assert "without an adapter, silently: embedding" in found["tied"]["reason"]


@pytest.mark.sample(4)
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("case", ["matmul", "scan_stacked", "cond", "nnx_linear", "scan_carried"])
def test_a_dense_update_is_seen_and_a_wrong_one(case):
    def dense(case):
        adapted = factored.with_jlora(case)

        def fn(factors, *args):
            pairs = zip(adapted.paths, factors["a"], factors["b"], strict=True)
            base = factored.named(case.params)
            new = {path: base[path] + adapted.product(path, a, b) for path, a, b in pairs}
            return case.fn(factored.replaced(case.params, new), *args)

        return adapted._replace(fn=fn)

    def wrong(case):
        adapted = factored.with_jlora(case)
        return adapted._replace(product=lambda *args: 2 * adapted.product(*args))

    (row,) = judged([dense], case).values()
    assert row["right"] and not row["factored"] and row["reason"].startswith("builds")
    (row,) = judged([wrong], case).values()
    assert not row["right"] and row["reason"].startswith("differs from the merged model")


@pytest.mark.nightly
def test_decode_runs():
    rows = decode.measure(llama.Config(64, 16, 32, 2, 2, 1, 8, 128), rounds=1)
    assert list(rows) == ["base", "jlora", "merged"] and rows["base"]["ratio"] == 1


def test_every_form_computes_the_same():
    compiled, args = forms.programs(12, (5, 7), 3)
    assert set(compiled) == {"limit", *forms.FORMS}
    want, *got = (jax.tree.leaves(compiled[name](*args)) for name in forms.FORMS)
    assert [x.shape for x in want] == [(4, 3, 7), (4, 3, 5), (5, 3), (3, 7)]
    for leaves in got:
        for x, y in zip(leaves, want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
def test_forms_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    for name, value in {"TOKENS": (8,), "SHAPES": ((5, 7),), "RANKS": (2, 3)}.items():
        monkeypatch.setattr(forms, name, value)
    monkeypatch.setattr(forms, "repeats", lambda tokens, shape: 1)
    monkeypatch.setattr(sys, "argv", ["forms", "--rounds", "1", "--json", str(tmp_path / "f.json")])
    forms.main()
    found = json.loads((tmp_path / "f.json").read_text())
    assert [row["rank"] for row in found["rows"]] == [2, 3]
    assert all(
        set(row[of]) == set(forms.FORMS) for row in found["rows"] for of in ("ratios", "apart")
    )
    assert found["one form, slowest copy over fastest"]["worst"] >= 1
    assert "jlora over the best factored form: " in capsys.readouterr().out


@pytest.mark.nightly
def test_tracing_writes_what_it_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracing, "LAYERS", 1)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the other tests keep theirs
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a second each, of all that they have made
    monkeypatch.setattr(sys, "argv", ["tracing", "--rounds", "1", "--json", str(tmp_path / "t")])
    tracing.main()
    found = json.loads((tmp_path / "t").read_text())["programs"]
    kinds = [f"{of} {what}" for of in ("flax", "plain") for what in ("forward", "gradient")]
    assert list(found) == kinds and all(row["ratio"] > 0 for row in found.values())
    assert capsys.readouterr().out.count("x base") == 4


def test_turns_are_taken_in_another_order_each_round():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abcdef"}
    seconds = measure.take_turns(runs, 3)
    rounds = [tuple(order[n : n + 6]) for n in range(0, 24, 6)]
    assert all(sorted(turn) == list("abcdef") for turn in rounds) and len(set(rounds)) == 4
    assert all(len(times) == 3 for times in seconds.values())


def test_presets_compile_abstractly():
    for sizes in blocks.PRESETS.values():
        base, x = jax.eval_shape(lambda sizes=sizes: blocks.weights(sizes))
        params = jax.eval_shape(lambda p, sizes=sizes: blocks.attached(sizes, p), base)
        loss = jax.eval_shape(lambda p, x, d=sizes.head_dim: blocks.loss(p, x, head_dim=d), base, x)
        assert len(params) == sizes.blocks and loss.shape == ()


def test_the_default_variant_is_the_main_jobs():
    args = finetune.parse([])
    (spec,), variant = quality.VARIANTS["lora"].rules.values(), quality.VARIANTS["lora"]
    assert (spec.rank, spec.alpha, variant.lr) == (args.rank, args.alpha, args.lr)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Optax counts in integers
def test_quality_does_what_is_missing(tmp_path, capsys):
    model = tiny_llama.write_model(tmp_path / "tiny", tiny_llama.TINY)
    data, results = tmp_path / "sums.jsonl", tmp_path / "quality.json"
    sums = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in sums))
    paths = {"--model": model, "--data": data, "--json": results}
    job = [str(x) for pair in paths.items() for x in pair] + ["--seeds", "0", "--steps", "2"]
    job += ["--only", "lora", "full"]
    command = [sys.executable, quality.__file__, *job]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0 and "2 runs to do" in first.stdout, first.stderr
    found = json.loads(results.read_text())
    lora, full = (found["variants"][name]["seeds"]["0"] for name in ("lora", "full"))
    assert lora["trained_bytes"] < full["trained_bytes"] == full["adapter_bytes"]
    assert 0 < lora["loss"] != full["loss"] > 0
    assert not list(tmp_path.glob("*.part"))
    assert quality.main([*job, "--time", "--rounds", "1"]) == 0
    found = json.loads(results.read_text())
    assert all(found["time"]["seconds"][name] > 0 for name in ("lora", "full"))
    assert found["variants"]["lora"]["seeds"] == {"0": lora}
    written = results.read_bytes()
    assert quality.main(job) == 0 and "0 runs to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quality.main([*job, "--steps", "3"])
    assert "other settings: steps=2 (now 3)" in capsys.readouterr().err
    assert results.read_bytes() == written


def test_quality_refuses_a_variant_that_was_changed(tmp_path, monkeypatch):
    found = quality.load(tmp_path / "q.json", {"steps": 2}, ["lora"])
    variant = quality.VARIANTS["lora"]
    found["variants"]["lora"] = {"recipe": quality.recipe(variant), "seeds": {}}
    quality.save(tmp_path / "q.json", found)
    assert quality.load(tmp_path / "q.json", {"steps": 2}, ["lora"]) == found
    monkeypatch.setitem(quality.VARIANTS, "lora", variant._replace(lr=1.0))
    with pytest.raises(ValueError, match=r'another "lora": .*0\.002.*, now .*1\.0.*another name'):
        quality.load(tmp_path / "q.json", {"steps": 2}, ["lora"])


def test_the_table_of_quality(tmp_path, capsys):
    run = {"trained_bytes": 2_000_000, "adapter_bytes": 3_000_000}
    two = {"0": {**run, "loss": 1.0, "rate": 0.5}, "1": {**run, "loss": 1.2, "rate": 0.5}}
    one = {"0": {**run, "loss": 1.0, "rate": None}}
    rows = {
        "a": {"recipe": {"lr": 2e-3}, "seeds": two},
        "b": {"recipe": {"lr": 5e-5}, "seeds": one},
    }
    found = {"settings": {}, "variants": rows, "time": {"seconds": {"a": 2.0}}}
    quality.save(tmp_path / "q.json", found)
    assert quality.main(["--table", "--json", str(tmp_path / "q.json")]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | 0.002 | 1.100 ± 0.141 | 0.500 ± 0.000 | 2.00 | 2.00 MB | 3.00 MB | 2 |",
        "| b | 5e-05 | 1.000 | – | – | 2.00 MB | 3.00 MB | 1 |",
    ]
    with pytest.raises(SystemExit):
        quality.main(["--table", "--json", str(tmp_path / "none.json")])
    assert "run without --table first" in capsys.readouterr().err
