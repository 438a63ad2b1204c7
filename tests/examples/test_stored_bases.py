"""`--quantize` and `--init loftq`: the base of the main job in fewer bits."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import begin
import finetune
import flags
import gguf
import jax
import numpy as np
import pytest
import states
import weights
from helpers import bits
from param_tree import expected, stacked
from safetensors.numpy import load_file
from tiny_gguf import write_gguf
from tiny_llama import TINY, tiny_tensors, write_model

import jlora
from jlora import quant

WIDE = {**TINY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sides divide by the blocks of every format."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="session")
def wide_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a GGUF file: Q4_1, and Q8_0 for the embedding."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "wide.gguf", WIDE)


def parsed(model: Path, *more: str) -> Any:
    return flags.parse(["--model", str(model), *more])


def leaves(params: Any) -> dict[str, Any]:
    is_quant = lambda x: isinstance(x, quant.QuantArray)
    found = jax.tree.leaves_with_path(params, is_leaf=is_quant)
    return {"/".join(str(k.key) for k in path): x for path, x in found}


def test_keep_leaves_the_blocks_of_the_file(
    wide_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = weights.load(str(wide_gguf))[1]
    monkeypatch.setattr(gguf, "dequantize", lambda *_: 1 / 0)
    config, params, _, _ = begin.load_model(parsed(wide_gguf, "--quantize", "keep"))
    stored, plain = leaves(params), leaves(dense)
    assert stored.keys() == plain.keys() == {path for path, *_ in expected(config)}
    for path, x in stored.items():
        value = x.dequantize() if path.endswith(("kernel", "embedding")) else x
        assert bits(value) == bits(plain[path]), path
    assert stored["embed/embedding"].format == quant.Q8_0
    assert stored["layers_0/attn/q_proj/kernel"].format == quant.Q4_1
    args = parsed(wide_gguf, "--quantize", "keep", "--scan", "--dtype", "bfloat16")
    scanned = leaves(begin.load_model(args)[1])["layers/mlp/up_proj/kernel"]
    assert scanned.shape == (1, 64, 64) and scanned.dtype == "bfloat16"
    assert bits(scanned.parts["qs"][0]) == bits(stored["layers_0/mlp/up_proj/kernel"].parts["qs"])


def test_one_weight_at_a_time_is_stored(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is quantized before the next is read."""
    order: list[str] = []
    quantize = jlora.quantize

    def noting(params: Any, rules: Any) -> Any:
        order.extend(params)
        return quantize(params, rules)

    monkeypatch.setattr(jlora, "quantize", noting)
    monkeypatch.setattr("param_tree.tqdm", lambda x, **_: (order.append("read") or y for y in x))
    params = begin.load_model(parsed(wide, "--quantize", "nf4"))[1]
    assert ["read", "read"] in [order[k : k + 2] for k in range(len(order))]  # a norm between
    assert all(order[k - 1] == "read" for k, x in enumerate(order) if x != "read")
    dense = weights.load(str(wide))[1]
    is_quant = lambda x: isinstance(x, quant.QuantArray)
    found = {path: x.format for path, x in leaves(params).items() if is_quant(x)}
    assert {str(x) for x in found.values()} == {"NF4(block=64, double=True)", "Int8()"}
    assert {p for p, x in found.items() if x == quant.Int8()} == {
        "embed/embedding",
        "lm_head/kernel",
    }
    error = quant.errors(dense, params)
    assert error.keys() == found.keys() and 0 < max(error.values()) < 0.13


JOB = ("--quantize", "nf4", "--init", "loftq", "--steps", "6", "--lr", "0.02", "--rank", "4")


def run(wide: Path, sums: Path, out: Path, *more: str) -> int:
    common = ["--model", str(wide), "--data", str(sums), "--out", str(out)]
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam promotes
        return finetune.main([*common, *JOB, *more])


@pytest.mark.nightly
def test_the_job_over_nf4_from_loftq(
    wide: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Trained, stopped and resumed, evaluated, saved, exported, merged."""
    saved, compile_all, programs = states.Saver.save, finetune.compile_all, []

    def compiled(*args: Any) -> Any:
        programs.append(compile_all(*args))
        return programs[0]

    def stop(self: Any, state: Any) -> None:
        saved(self, state)
        if state.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "compile_all", compiled)
    monkeypatch.setattr(states.Saver, "save", stop)
    assert run(wide, sums, tmp_path / "out", "--save-every", "3") == 130
    monkeypatch.undo()
    monkeypatch.setattr(finetune, "compile_all", lambda *_: programs[0])
    exports = ("--export-peft", str(tmp_path / "peft"), "--merge", str(tmp_path / "merged"))
    assert run(wide, sums, tmp_path / "out", "--resume", *exports) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"] and report["restored_max_abs_diff"] == 0
    assert report["total"] == report["trainable"] + sum(x.size for x in tiny_tensors(WIDE).values())
    assert report["merged_max_abs_diff"] < 1e-3 and report["settings"]["quantize"] == "nf4"
    # The exported adapter over the same stored base, and the merged weights.
    args = parsed(wide, "--quantize", "nf4", "--adapter", str(tmp_path / "peft"))
    params = begin.adapt(args, begin.load_model(args)[1])
    want = jlora.merge(params)["layers_0"]["mlp"]["up_proj"]["kernel"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(merged["model.layers.0.mlp.up_proj.weight"].T, want, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["keep", "int8"])
def test_the_job(how: str, wide: Path, wide_gguf: Path, sums: Path, tmp_path: Path) -> None:
    model = wide_gguf if how == "keep" else wide
    more = ("--quantize", how, "--init", "kaiming", "--scan", "--remat")
    assert run(model, sums, tmp_path, *more) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"] and report["restored_max_abs_diff"] == 0
    assert report["merged_max_abs_diff"] is None  # that would take a dense model


def test_loftq_begins_nearer(wide: Path) -> None:
    dense = weights.load(str(wide))[1]
    near = {}
    for init in ("kaiming", "loftq"):
        args = parsed(wide, "--quantize", "nf4", "--init", init)
        params = jlora.merge(begin.adapt(args, begin.load_model(args)[1]))
        difference = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)), params, dense)
        near[init] = leaves(difference)
    for path, error in near["loftq"].items():
        assert error < 0.9 * near["kaiming"][path] or not path.endswith("_proj/kernel"), path


@pytest.mark.nightly
def test_a_plan_over_stored_weights(wide: Path, capsys: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam promotes
        for more in ([], ["--quantize", "nf4"]):
            assert finetune.main(["--model", str(wide), "--plan", "--length", "16", *more]) == 0
    dense, stored = capsys.readouterr().out.split("from shapes alone")[1:]
    line = lambda text, name: next(x for x in text.splitlines() if name in x)
    assert line(dense, "parameters") == line(stored, "parameters")
    assert line(dense, "base weights") != line(stored, "base weights")


BAD: dict[str, tuple[Callable[[Any, Any], list[str]], str]] = {
    "block": (
        lambda tiny, wide: ["--model", tiny, "--quantize", "nf4"],
        r'`--model .* --quantize nf4`: .*"layers_0/attn/q_proj/kernel" float32\[32,32\].*'
        r"does not divide.*`NF4\(block=32\)`",
    ),
    "nothing": (
        lambda tiny, wide: ["--model", tiny, "--quantize", "keep"],
        "`--quantize keep`: no weight of .* is quantized. Give `--quantize nf4` or `int8`",
    ),
    "format": (lambda *_: ["--quantize", "nf5"], "invalid choice: 'nf5'.*keep.*nf4.*int8"),
    "loftq": (
        lambda tiny, wide: ["--quantize", "keep", "--init", "loftq"],
        "--init loftq starts at the error of --quantize nf4 or int8",
    ),
    "scan": (
        lambda *_: ["--quantize", "nf4", "--init", "loftq", "--scan"],
        "--init loftq reads the weights one by one: leave --scan out",
    ),
    "pissa": (
        lambda *_: ["--quantize", "nf4", "--init", "pissa"],
        "--init pissa changes the base, and --quantize stores it: use loftq",
    ),
    "plan": (lambda *_: ["--quantize", "keep", "--plan"], "--plan reads no weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tiny_path: Path, wide: Path, sums: Path, tmp_path: Path, capsys: Any):
    make, match = BAD[case]
    more = ["--data", str(sums), "--out", str(tmp_path / "out")]
    try:
        status = finetune.main([*make(str(tiny_path), str(wide)), *more])
    except SystemExit as error:  # argparse's
        status = error.code
    text = " ".join(capsys.readouterr().err.split())
    assert status == 2 and re.search(match, text), text
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_layers_in_several_formats_have_no_stack() -> None:
    w = np.ones((64, 4), np.float32)
    layer = lambda name: {"kernel": jlora.quantize({"w": jax.numpy.asarray(w)}, {"w": name})["w"]}
    match = r"`--scan`: the layers' kernel are .*Int8\(\), NF4.*Leave"
    with pytest.raises(ValueError, match=match):
        stacked({"layers_0": layer("nf4"), "layers_1": layer("int8")}, 2)
