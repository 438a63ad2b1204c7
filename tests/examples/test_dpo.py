"""Preferences: the formula, the batches, and a run on a tiny model."""

import itertools
import json
import re
import signal
from pathlib import Path
from typing import Any

import data
import dpo
import finetune
import jax
import numpy as np
import pytest
import training
from evaluation import make_apply
from flags import parse
from tiny_llama import byte_tokenizer

import jlora


def flags_of(model: Path, file: Path, out: Path, *more: str) -> list[str]:
    flags = ["--model", str(model), "--data", str(file), "--rank", "4", "--out", str(out)]
    return [*flags, "--steps", "8", "--lr", "0.02", *more]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sums with the answer in letters rather than in digits."""
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    lines = [
        {"prompt": f"{n} =", "chosen": f" {dpo.words(n % 50)}", "rejected": f" {n}"}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def prepared(tiny_path: Path, preferences: Path) -> Any:
    args = parse(flags_of(tiny_path, preferences, Path("nowhere")), preferences=True)
    return dpo.prepare(args)


def test_the_loss_is_that_of_trl(prepared: Any) -> None:
    """TRL's loss_type="sigmoid", in NumPy, over the merged model's and the base's logits."""
    params, batch = prepared.params, prepared.batches[0]
    keys = map(jax.random.key, itertools.count())
    moved = lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape)
    trainable, frozen = jlora.partition(params)
    params = jlora.combine(jax.jit(lambda x: jax.tree.map(moved, x))(trainable), frozen)
    apply, beta = make_apply(prepared.config), 0.3
    plain = jax.jit(apply)

    def log_probabilities(weights: Any) -> np.ndarray:
        """Those of the tokens of each answer, summed, as `get_batch_logps` did in TRL."""
        inputs = (batch["tokens"], batch["positions"], batch["segments"])
        logits = np.asarray(plain(weights, *inputs), np.float64)[:, :-1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logps, batch["tokens"][:, 1:, None], axis=2)[..., 0]
        answers = np.zeros(batch["tokens"].shape, bool)
        rows, at = np.divmod(batch["at"][batch["weight"] > 0], batch["tokens"].shape[1])
        answers[rows, at] = True
        return (picked * answers[:, :-1]).sum(1)

    policy, reference = (
        log_probabilities(w) for w in (jlora.merge(params), jlora.detach(params)[0])
    )
    half = len(policy) // 2
    chosen_logratios = policy[:half] - reference[:half]
    rejected_logratios = policy[half:] - reference[half:]
    rewards = beta * chosen_logratios - beta * rejected_logratios
    want = np.mean(np.log1p(np.exp(-rewards)))
    adapted = jlora.lora(apply)
    made = (dpo.make_loss(beta)(adapted), dpo.make_measures(beta)(adapted))
    loss, measured = jax.jit(lambda params, batch: [of(params, batch) for of in made])(
        params, batch
    )
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_allclose(measured["margin"], rewards.mean(), rtol=1e-3, atol=1e-5)
    assert float(measured["accuracy"]) == (rewards > 0).mean()
    assert abs(want - np.log(2)) > 0.01


def test_batches_are_of_pairs(prepared: Any) -> None:
    tokenizer = byte_tokenizer()
    assert len(prepared.batches) == 8 and prepared.batches[0]["tokens"].shape[0] == 8
    assert len({b["at"].shape for b in [*prepared.batches, *prepared.held_out]}) <= 2
    for batch in [*prepared.batches, *prepared.held_out]:
        texts = [tokenizer.decode([*row]) for row in batch["tokens"]]
        for chosen, rejected in zip(texts[:4], texts[4:], strict=True):
            number, answer = rejected.split("!")[0].split(" =")
            assert chosen.startswith(f"{number} = {dpo.words(int(number) % 50)}")
            assert answer == f" {number}"
    seen = {e.prompt for e in prepared.dataset.train}
    assert len(seen) == 56 and not seen & {e.prompt for e in prepared.dataset.held_out}
    assert isinstance(prepared.batches, data.Listed)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
def test_the_margin_grows_on_held_out_pairs(
    tiny_path: Path, preferences: Path, tmp_path: Path
) -> None:
    flags = flags_of(tiny_path, preferences, tmp_path / "out", "--export-peft", str(tmp_path / "p"))
    assert finetune.main(flags, "", dpo.prepare) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["margin_before"] == 0 and report["loss_before"] == pytest.approx(np.log(2))
    assert report["margin_after"] > 0.1 and report["accuracy_after"] == 1
    assert report["loss_after"] < 0.65 and report["settings"]["beta"] == 0.1
    assert report["restored_max_abs_diff"] == 0
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_margin"] == report["margin_after"]
    assert (tmp_path / "p" / "adapter_model.safetensors").exists()


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
def test_a_run_that_was_stopped_continues_with_the_same_pairs(
    tiny_path: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, calls = training.advance, []

    def stopping(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return advance(*args)

    found = []
    for name in ("once", "twice"):
        flags = flags_of(tiny_path, preferences, tmp_path / name)
        if name == "twice":
            monkeypatch.setattr(training, "advance", stopping)
            assert finetune.main(flags, "", dpo.prepare) == 130
            flags.append("--resume")
        assert finetune.main(flags, "", dpo.prepare) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        found.append([report[key] for key in ("loss_after", "margin_after", "steps")])
    assert found[0] == found[1] and found[0][2] == 8


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([GOOD, "{oops"], "line 2 lacks a string for `prompt`, `chosen` or `rejected`"),
        ([GOOD, "[1]"], "line 2 lacks a string"),
        ([GOOD, '{"prompt": "a", "chosen": "b"}'], "line 2 lacks a string"),
        ([GOOD, '{"prompt": "a", "chosen": [], "rejected": "c"}'], "line 2 lacks a string"),
        ([GOOD.replace("c", "b")], "lacks a string"),
        ([GOOD, GOOD.replace('"c"', '"b"')], "answers of line 2 are the same, or one is empty"),
        ([GOOD, GOOD.replace("c", "é")], "this is not UTF-8 text"),
        ([GOOD] * 7, "there are 7 pairs, and two batches of 4 are needed"),
    ],
)
def test_complaints(
    tiny_path: Path, tmp_path: Path, capsys: Any, lines: list[str], match: str
) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="latin-1")
    flags = flags_of(tiny_path, tmp_path / "d.jsonl", tmp_path / "out")
    assert finetune.main(flags, "", dpo.prepare) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "dpo.py: error: `--data" in error and match in error
    assert not (tmp_path / "out").exists()


def test_flags_of_preferences(capsys: Any) -> None:
    args = parse(["--smoke"], preferences=True)
    assert (args.batch, args.beta, args.out) == (4, 0.1, Path("runs/dpo-smoke"))
    unfit = ("--accumulate=2", "--chunk=4", "--plan", "--sweep=lr=1,2", "--window=8")
    for wrong in unfit:
        with pytest.raises(SystemExit, match="2"):
            parse([wrong], preferences=True)
        name = wrong.partition("=")[0]
        assert f"{name} is not implemented for preferences" in capsys.readouterr().err
    for preferences in (True, False):
        with pytest.raises(SystemExit, match="0"):
            parse(["--help"], preferences=preferences)
        said, usual = " ".join(capsys.readouterr().out.split()), parse([], preferences=preferences)
        for name in ("steps", "batch", "lr", "out", "seed"):
            assert re.search(rf"--{name} [^-]*default: {getattr(usual, name)}\b", said), name
        for name in unfit:
            assert (name.partition("=")[0] in said) != preferences
    with pytest.raises(SystemExit, match="2"):
        parse(["--beta", "1"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_made_pairs() -> None:
    made = dpo.made()
    assert len(made) == 400 == len({prompt for prompt, *_ in made})
    assert ("Question: What is 13 + 8?\nAnswer:", " twenty-one", " 21") in made
    assert [dpo.words(n) for n in (0, 19, 20, 40)] == ["zero", "nineteen", "twenty", "forty"]
