"""The whole job on a tiny model, its errors, and (slow) on the real one."""

import json
import shutil
from pathlib import Path
from typing import Any

import begin
import data
import finetune
import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import states
import training
import weights
from evaluation import make_apply

import jlora
from jlora import checkpoint

KEYS = [
    "loss_before",
    "loss_after",
    "phoneme_error_rate_before",
    "phoneme_error_rate_after",
    "steps",
    "step_of_adapter",
    "seconds_per_step",
    "device",
    "trainable",
    "total",
    "adapter_bytes",
    "merged_max_abs_diff",
    "restored_max_abs_diff",
    "peak_memory_bytes",
    "settings",
    "data_sha256",
    "base_sha256",
    "data",
    "versions",
]


def flags(model: Path, file: Path, out: Path, *more: str) -> list[str]:
    common = ["--model", str(model), "--data", str(file), "--out", str(out)]
    common += [] if "--adapter" in more else ["--rank", "4"]
    return [*common, "--steps", "6", "--lr", "0.02", *more]


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_the_job(finished: Any, capsys: Any) -> None:
    report = report_of(finished.out)
    assert list(report) == KEYS
    assert report["loss_after"] < report["loss_before"]
    assert report["phoneme_error_rate_before"] is None
    assert report["restored_max_abs_diff"] == 0 and report["merged_max_abs_diff"] < 1e-3
    assert report["steps"] == 6 and report["adapter_bytes"] > 4 * report["trainable"]
    assert report["settings"]["lr"] == 0.02 and report["versions"]["jax"] == jax.__version__
    assert report["settings"]["out"] == str(finished.out) and report["settings"]["log"] == []
    assert (finished.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = {}
    for kind in ("base", "adapted", "merged"):
        more = ("--generate", "3 + 1 =", "--weights", kind, "--out", str(finished.out))
        assert finetune.main([*finished.flags, *more]) == 0
        said[kind] = capsys.readouterr().out
    assert said["adapted"] == said["merged"] != said["base"]


def test_an_adapter_over_a_residual_is_restored(finished: Any, tmp_path: Path) -> None:
    """The base of PiSSA is not that of the files."""
    args = finetune.parse([*finished.flags, "--init", "pissa", "--out", str(tmp_path)])
    params = begin.adapt(args, begin.load_model(args)[1])
    checkpoint.save(tmp_path / "adapter", params)
    restored = begin.restore(args, begin.load_model(args)[1])
    for a, b in zip(*map(jax.tree.leaves, (params, restored)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_text_is_generated_with_the_base_of_the_adapter(
    finished: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Another one would give other text, without an error."""
    model = shutil.copytree(finished.flags[1], tmp_path / "model")
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    more = [*finished.flags, "--generate", "x", "--out", str(finished.out)]
    for wrong, match in (
        (["--smoke"], "was trained with smoke=False (now True). Give the same flags"),
        (["--model", str(model)], f"was trained over other files than those of `--model {model}`"),
    ):
        assert finetune.main([*more, *wrong]) == 2
        assert match in " ".join(capsys.readouterr().err.split())
    args = finetune.parse(more)
    monkeypatch.setattr(begin.report, "load_notes", lambda _: None)
    for begun, match in (
        ({"init": "pissa", "rank": 8, "seed": 0}, r"rank=8 \(now 4\), init=pissa \(now None\)"),
        ({"init": "loftq", "quantize": "nf4"}, r"init=loftq \(.*, quantize=nf4 \(now None\)"),
    ):
        (finished.out / "sweep.json").write_text(json.dumps({"settings": begun}))
        with pytest.raises(ValueError, match=f"was trained with {match}"):
            begin.check_generation(args)
    (finished.out / "sweep.json").unlink()
    begin.check_generation(args)


def test_metrics_have_every_step_and_every_evaluation(finished: Any) -> None:
    lines = [json.loads(x) for x in (finished.out / "metrics.jsonl").read_text().splitlines()]
    evals = {x["step"]: x["held_out_loss"] for x in lines if "held_out_loss" in x}
    steps = [x for x in lines if "loss" in x]
    assert list(evals) == [0, 2, 4, 6] and [x["step"] for x in steps] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines] == sorted(x["step"] for x in lines)
    report = report_of(finished.out)
    assert evals[0] == report["loss_before"] and min(evals.values()) == report["loss_after"]
    assert all(x["tokens_per_second"] > 0 and x["learning_rate"] >= 0 for x in steps)
    notes = states.load_notes(finished.out / "state")
    assert notes is not None and [x["loss"] for x in steps] == notes["losses"]


def test_the_best_adapter_is_kept_and_patience_ends_a_run(
    job: Any, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out losses are told: the best is that of step 2, and nothing is better after it."""
    told, true = iter([9.0, 8.0, 5.0, 5.5, 5.0]), []
    evaluate = finetune.evaluate

    def as_told(*args: Any) -> Any:
        score = evaluate(*args)
        true.append(score["loss"])
        return {**score, "loss": next(told)}

    monkeypatch.setattr(finetune, "evaluate", as_told)
    assert job(tmp_path, "--eval-every", "1", "--patience", "2") == 0
    report = report_of(tmp_path)
    assert (report["steps"], report["step_of_adapter"], report["loss_after"]) == (4, 2, 5.0)
    params = checkpoint.restore(tmp_path / "adapter", weights.load(finished.flags[1])[1])
    job_of = begin.prepare(finetune.parse([*finished.flags, "--out", str(tmp_path)]))
    loss = jax.jit(training.make_loss(jlora.lora(make_apply(job_of.config))))
    (batch,) = job_of.held_out
    np.testing.assert_allclose(loss(params, batch), true[2], rtol=1e-5)
    assert true[2] != pytest.approx(true[4], rel=1e-3)


def test_plain_text(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    args = finetune.parse(flags(tiny_path, tmp_path / "t.txt", tmp_path / "out"))
    job = begin.prepare(args)
    apply = jlora.lora(make_apply(job.config))
    trainable, frozen = jlora.partition(job.params)
    with jax.numpy_dtype_promotion("standard"):
        tx = training.make_optimizer(args.lr, args.steps)
        step = training.make_step(training.make_loss(apply), tx)
        state = training.State(trainable, tx.init(trainable), [], [])
        state = training.fit(step, state, frozen, job.batches)
    assert state.step == 6 and state.losses[-1] < state.losses[0]


def wide(vocab: int, width: int) -> tuple[Any, Any]:
    """A model that is almost all vocabulary: (plain apply, what makes its adapted params)."""
    model = llama.Llama(llama.Config(vocab, width, 16, 1, 2, 1, 8, 64))

    def make() -> Any:
        base = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        rules = {r".*_proj/kernel": jlora.LoraSpec(rank=2)}
        return jlora.attach(base, rules, key=jax.random.key(0))

    return lambda p, *args: model.apply({"params": p}, *args), make


def packed(start: int) -> training.Batch:
    """Four rows of 64 tokens, of which those from `start` on are learned."""
    tokens = [list(np.random.default_rng(n).integers(0, 500, 64)) for n in range(4)]
    examples = [data.Example("", "", row, start, start) for row in tokens]
    return data.batches(data.pack(iter(examples), 64), 4)[0]


def test_the_head_is_computed_where_the_loss_is_and_held_once() -> None:
    vocab = 49152
    apply, make = wide(vocab, 16)
    loss = training.make_loss(jlora.lora(apply))
    trainable, frozen = jlora.partition(jax.eval_shape(make))

    def compiled(start: int) -> Any:
        # As in a step, which reports the loss: it is the value that would keep a second array.
        grad = jax.value_and_grad(lambda t, f, b: loss(jlora.combine(t, f), b))
        return jax.jit(grad).lower(trainable, frozen, packed(start)).compile()

    assert f"[256,{vocab}]" not in compiled(48).as_text()
    assert f"[4,64,{vocab}]" not in compiled(48).as_text()
    # Every position has a loss: one array of logits, and their gradient lies over them.
    logits = 256 * vocab * 4
    assert logits <= compiled(1).memory_analysis().temp_size_in_bytes < 1.1 * logits


@pytest.mark.nightly
@pytest.mark.parametrize("start", [1, 48])
def test_loss_and_gradient_are_those_of_the_whole_logits(start: int) -> None:
    apply, make = wide(503, 16)
    trainable, frozen = jlora.partition(make())
    keys = iter(jax.random.split(jax.random.key(3), 20))
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trainable)
    batch = packed(start)

    def direct(params: Any) -> jax.Array:
        logits = apply(jlora.merge(params), batch["tokens"], batch["positions"], batch["segments"])
        logp = jax.nn.log_softmax(logits)[:, :-1]  # (B, T-1, V)
        picked = jnp.take_along_axis(logp, batch["tokens"][:, 1:, None], axis=2)[..., 0]
        return -picked[:, start - 1 :].mean()

    loss = training.make_loss(jlora.lora(apply))
    got, want = (
        jax.jit(jax.value_and_grad(lambda t, f=f, b=b: f(jlora.combine(t, frozen), *b)))(trainable)
        for f, b in ((loss, (batch,)), (direct, ()))
    )
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.any(x != 0)), want[1]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--data", "nowhere.jsonl"], "`--data nowhere.jsonl`: there is no such file"),
        (["--model", "nowhere"], "`--model nowhere`: there is no such file or directory"),
        (["--rank", "17"], "`--rank 17 --alpha 16.0`: "),
        (["--rank", "17", "--plan"], "`--rank 17 --alpha 16.0`: "),
        (["--length", "97", "--plan"], "`--length 97`: the model's context has 96 tokens"),
        (["--quantize", "nf4", "--plan"], "`--plan --quantize nf4`: `jlora.quantize`: "),
        (["--resume"], "`--resume`: there is no saved state"),
        (["--generate", "x" * 96], "the prompt has 96 tokens; the model takes 1 to 95"),
        (["--generate", ""], "the prompt has 0 tokens"),
        (["--generate", "x"], "there is no adapter in it"),
        (["--adapter", "nowhere"], "`--adapter nowhere`: `jlora.peft.load('nowhere', params)`: "),
    ],
)
def test_errors_are_one_paragraph(
    tiny_dir: Path, pairs: Path, tmp_path: Path, capsys: Any, more: list[str], match: str
) -> None:
    out = tmp_path / "out"
    assert finetune.main(flags(tiny_dir, pairs, out, *more)) == 2
    error = capsys.readouterr().err.split("finetune.py: error: ")[1]
    assert match in " ".join(error.split())
    assert "Traceback" not in error and "\n\n" not in error.strip()
    assert not out.exists()


def test_out_must_not_be_a_file(tiny_dir: Path, pairs: Path, tmp_path: Path, capsys: Any) -> None:
    assert finetune.main(flags(tiny_dir, pairs, pairs)) == 2
    assert "this is a file. Name a directory" in " ".join(capsys.readouterr().err.split())
    more = ("--export-peft", str(pairs))
    assert finetune.main(flags(tiny_dir, pairs, tmp_path / "out", *more)) == 2
    assert "--export-peft" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (["--steps", "0"], "--steps: 0 is not above 0"),
        (["--steps", "two"], "--steps: invalid"),
        (["--rank", "0"], "--rank: 0 is not above 0"),
        (["--lr", "nan"], "--lr: nan is not a finite number above 0"),
        (["--lr", "inf"], "--lr: inf is not"),
        (["--alpha", "-1"], "--alpha: -1 is not"),
        (["--seed", "-1"], "--seed: -1 is not in 0 to 4294967295"),
        (["--seed", str(2**32)], "--seed: 4294967296 is not in 0 to 4294967295"),
        (
            ["--lora-plus", "4", "--form", "mica"],
            "raises the rate of B, which --form mica does not",
        ),
        (["--adapter", "a", "--plan"], "instead of --adapter, give its --rank and --targets"),
        (["--adapter", "a", "--rank", "4"], "the one of --adapter has its own"),
        (["--generate", "x", "--export-peft", "a"], "--generate trains nothing"),
        (["--resume", "--overwrite"], "--resume continues the run that --overwrite removes"),
        (["--patience", "2"], "--patience counts the evaluations of --eval-every"),
        (["--save-every", "0"], "--save-every: 0 is not a number of steps or, as in 5min, minutes"),
        (["--save-every", "1.5"], "--save-every: 1.5 is not"),
        (["--save-every", "5h"], "--save-every: 5h is not"),
    ],
)
def test_flags_that_make_no_sense(wrong: list[str], match: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune.main(wrong)
    assert match in capsys.readouterr().err


def test_one_step_and_where_a_smoke_test_writes() -> None:
    schedule = training.make_schedule(0.1, 1)
    assert float(schedule(0)) == 0 and float(schedule(1)) == pytest.approx(0.1)
    assert finetune.parse(["--smoke"]).out != finetune.parse([]).out == Path("runs/finetune")


@pytest.mark.nightly
@pytest.mark.slow
def test_the_capital_of_france(capsys: Any) -> None:
    text = "The capital of France is"
    # Scanned, 30 layers compile in a few seconds.
    assert finetune.main(["--generate", text, "--weights", "base", "--scan"]) == 0
    assert capsys.readouterr().out.startswith(f"{text} Paris.")


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    assert finetune.main(["--smoke", "--out", str(tmp_path)]) == 0
    report = report_of(tmp_path)
    assert list(report) == KEYS and report["steps"] == 4
    assert report["loss_after"] < report["loss_before"]
    assert report["restored_max_abs_diff"] == 0 and report["merged_max_abs_diff"] < 1e-3
    assert np.isfinite(report["phoneme_error_rate_before"])
