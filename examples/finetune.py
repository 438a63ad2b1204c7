"""Fine-tune a language model with LoRA on two CPU cores, and show that it learned.

    python examples/finetune.py                         # SmolLM2-135M learns to pronounce words
    python examples/finetune.py --smoke                 # the same path: a few layers and steps
    python examples/finetune.py --resume                # continue after Ctrl-C, bit for bit
    python examples/finetune.py --generate "Say j a x →"                      # the adapted model
    python examples/finetune.py --generate "The capital of France is" --weights base
    python examples/finetune.py --model DIR --data pairs.jsonl --rank 16 --out runs/pairs
    python examples/finetune.py --export-peft DIR       # write the adapter as PEFT files as well
    python examples/finetune.py --adapter DIR           # start from a PEFT adapter

`--model` takes a Hugging Face directory of the Llama family or a .gguf file. `--data` takes .jsonl
lines of {"prompt": ..., "completion": ...}, where only the completion is learned, or plain .txt.
The output directory gets adapter/ (the adapter alone), loss.png, report.json, and state/ to resume.
"""

import argparse
import functools
import json
import math
import shutil
import statistics
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data
import jax
import llama
import numpy as np
import optax
import training
import weights
from evaluation import SHOWN, Job, compile_all, evaluate, make_apply, show
from matplotlib.figure import Figure

import jlora
from jlora import checkpoint, peft

ROWS, LENGTH = 2, 128  # packed rows a step, tokens a row
SCORED = 256  # held-out words that are generated and scored
# What the results of a run depend on, so --resume requires the same values.
SETTINGS = ("model", "data", "adapter", "rank", "alpha", "steps", "lr", "seed", "smoke")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a Hugging Face directory or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", help="a .jsonl or .txt file (default: CMUdict)")
    add("--adapter", metavar="DIR", help="start from, or --generate with, a PEFT adapter")
    add("--export-peft", type=Path, metavar="DIR", help="write the adapter there as PEFT files")
    add("--rank", type=positive, help="of a new adapter; default: 8")
    add("--alpha", type=above_zero, help="of a new adapter; default: 16")
    add("--steps", type=positive, help="default: 120, or 4 with --smoke")
    add("--lr", type=above_zero, default=2e-3, help="the peak learning rate; default: 0.002")
    add("--seed", type=not_below_zero, default=0, help="of A and the order of the data; default: 0")
    add("--out", type=Path, help="default: runs/finetune, or runs/smoke with --smoke")
    add("--smoke", action="store_true", help="the first 4 layers and 4 steps, to try the path")
    add("--resume", action="store_true", help="continue a run stopped by Ctrl-C")
    add("--generate", metavar="TEXT", help="continue TEXT instead of training")
    kinds = ("base", "adapted", "merged")
    add("--weights", choices=kinds, default="adapted", help="which model --generate runs")
    args = parser.parse_args(argv)
    if args.adapter is not None and (args.rank or args.alpha):
        parser.error("--rank and --alpha describe a new adapter; the one of --adapter has its own")
    if args.generate is not None and (args.resume or args.export_peft is not None):
        parser.error("--generate trains nothing: leave --resume and --export-peft out")
    args.rank, args.alpha = args.rank or 8, args.alpha or 16.0
    args.steps = args.steps or (4 if args.smoke else 120)
    args.out = args.out or Path("runs/smoke" if args.smoke else "runs/finetune")
    return args


def positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def not_below_zero(text: str) -> int:
    """An argparse type: a non-negative integer."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return float(text)


def prepare(args: argparse.Namespace) -> Job:
    """Load, attach and pack. Invalid input raises here, before any file is written."""
    for flag, folder in (("--out", args.out), ("--export-peft", args.export_peft)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"`{flag} {folder}`: this is a file. Name a directory.")
    config, base, tokenizer, stop = load_model(args)
    params = adapt(args, base)
    dataset = data.load(args.data, tokenizer, stop, config.context)
    longest = max(len(e.tokens) for e in dataset.train + dataset.held_out)
    length = max(LENGTH, -(-longest // 64) * 64)
    examples = data.shuffled(dataset.train, args.seed)
    rows = data.pack(examples, length, args.steps * ROWS)
    scored = dataset.held_out[: 16 if args.smoke else SCORED]
    return Job(
        config=config,
        params=params,
        tokenizer=tokenizer,
        stop=stop,
        dataset=dataset,
        batches=data.batches(rows, ROWS),
        held_out=data.batches(data.pack(iter(scored), length), ROWS),
        prompts=scored if dataset.phonemes else scored[:SHOWN],
    )


def adapt(args: argparse.Namespace, base: Any) -> Any:
    """Attach a new adapter, or the PEFT adapter that --adapter names."""
    if args.adapter is not None:
        try:
            return peft.load(args.adapter, base, names=peft.llama_names)
        except (ValueError, OSError) as error:
            raise ValueError(f"`--adapter {args.adapter}`: {error}") from error
    try:
        spec = jlora.LoraSpec(rank=args.rank, alpha=args.alpha)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a rank above min(in, out) costs more than the weight
            return jlora.attach(base, {r".*_proj/kernel": spec}, key=jax.random.key(args.seed))
    except (ValueError, UserWarning) as error:
        raise ValueError(f"`--rank {args.rank} --alpha {args.alpha}`: {error}") from error


def load_model(args: argparse.Namespace) -> weights.Model:
    """The plain model; for a smoke test, its first layers."""
    return weights.load(args.model, 4 if args.smoke else None)


# ---------------------------------------------------------------------------------------- the run


class Start(NamedTuple):
    """The optimizer, and the state to start from."""

    tx: optax.GradientTransformation
    state: training.State
    notes: dict[str, Any]


def start(args: argparse.Namespace, job: Job) -> Start:
    """A new state or, with --resume, the last intact one."""
    trainable, _ = jlora.partition(job.params)
    tx = training.make_optimizer(args.lr, args.steps)
    state = training.State(trainable, tx.init(trainable), [], [])
    found = training.load_state(args.out / "state", state) if args.resume else None
    return Start(tx, *(found or (state, {})))


def run(args: argparse.Namespace, job: Job, begun: Start) -> int:
    """Evaluate, train, evaluate, save, check, report. Returns the exit status."""
    print(jlora.summary(job.params))
    _, frozen = jlora.partition(job.params)
    tx, state, notes = begun
    programs = compile_all(job, tx, state, frozen)
    before = notes.get("before") or evaluate(job, programs, job.params)
    show(job, before, "before")
    if not args.resume:
        shutil.rmtree(args.out / "state", ignore_errors=True)
    state = training.fit(programs.step, state, frozen, job.batches)
    if not args.resume or state.step > begun.state.step:
        notes = {"before": before, "settings": settings(args)}
        training.save_state(args.out / "state", state, notes)
    if state.step < args.steps:
        print(f"stopped after step {state.step} of {args.steps}; continue with --resume")
        return 130
    params = jlora.combine(state.trainable, frozen)
    after = evaluate(job, programs, params)
    show(job, after, "after")
    if args.export_peft is not None:
        entries = {"base_model_name_or_path": args.model, "task_type": "CAUSAL_LM"}
        peft.save(args.export_peft, params, names=peft.llama_names, **entries)
        print(f"exported to {args.export_peft}")
    report = {
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "phoneme_error_rate_before": before["rate"],
        "phoneme_error_rate_after": after["rate"],
        **save_and_check(args, job, params),
        "seconds_per_step": statistics.median(state.seconds),
        "steps": state.step,
    }
    plot(args.out / "loss.png", state.losses, before["loss"], after["loss"])
    text = json.dumps(report, indent=2) + "\n"
    write_beside(args.out / "report.json", lambda path: path.write_text(text))
    print(f"\n{text}written to {args.out / 'report.json'}")
    return 0


def save_and_check(args: argparse.Namespace, job: Job, params: Any) -> dict[str, Any]:
    """Save the adapter, and compare the logits with those of the restored and the merged model."""
    folder = args.out / "adapter"
    checkpoint.save(folder, params)
    plain = make_apply(job.config)
    adapted, merged = jax.jit(jlora.lora(plain)), jax.jit(plain)
    batch = job.held_out[0]
    inputs = (batch["tokens"], batch["positions"], batch["segments"], None, batch["at"])
    logits = adapted(params, *inputs)
    restored = checkpoint.restore(folder, load_model(args)[1])
    # NumPy's maximum propagates NaN.
    differ = lambda other: float(np.max(np.abs(np.asarray(logits - other))))
    trainable = sum(leaf.size for leaf in jax.tree.leaves(jlora.partition(params)[0]))
    base = sum(leaf.size for leaf in jax.tree.leaves(jlora.detach(params)[0]))
    return {
        "trainable": trainable,
        "total": base + trainable,
        "adapter_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "merged_max_abs_diff": differ(merged(jlora.merge(params), *inputs)),
        "restored_max_abs_diff": differ(adapted(restored, *inputs)),
    }


def plot(path: Path, losses: list[float], before: float, after: float) -> None:
    """Draw the training loss and the held-out loss before and after."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, lw=1, label="training")
    axes.plot([0, len(losses)], [before, after], "o", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend()
    write_beside(path, lambda part: figure.savefig(part, format="png", dpi=150))


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary sibling and rename, so that `path` is never half-written."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that must not change when a run is resumed."""
    return {name: getattr(args, name) for name in SETTINGS}


def check_resume(args: argparse.Namespace) -> None:
    """Raise if there is nothing to resume, or if the run was started with other flags."""
    notes = training.load_notes(args.out / "state")
    if notes is None:
        raise FileNotFoundError(
            f"`--resume`: there is no saved state in {args.out / 'state'}. Run without --resume."
        )
    # States written before --adapter existed do not have the key: those runs used none.
    begun, now = {"adapter": None, **notes["settings"]}, settings(args)
    other = [name for name in SETTINGS if begun.get(name) != now[name]]
    if other:
        raise ValueError(
            "`--resume`: the run was started with "
            + ", ".join(f"{name}={begun.get(name)} (now {now[name]})" for name in other)
            + ". Give the same flags, or start again without --resume."
        )


# --------------------------------------------------------------------------------------- generation


def continue_text(args: argparse.Namespace) -> int:
    """Continue --generate's text with the base, the adapted or the merged model."""
    config, params, tokenizer, stop = load_model(args)
    ids = tokenizer.encode(args.generate).ids
    if not 0 < len(ids) < config.context:
        raise ValueError(
            f"`--generate`: the prompt has {len(ids)} tokens; the model takes 1 to "
            f"{config.context - 1}: its context of {config.context}, less one for the answer."
        )
    apply = make_apply(config)
    if args.weights != "base" and args.adapter is not None:
        params, apply = adapt(args, params), jlora.lora(apply)
    elif args.weights != "base":
        if not (args.out / "adapter").is_dir():
            raise FileNotFoundError(
                f"`--out {args.out}`: there is no adapter in it yet. Train one first, or give "
                "`--weights base`."
            )
        params = checkpoint.restore(args.out / "adapter", params)
        apply = jlora.lora(apply)
    if args.weights == "merged":
        params, apply = jlora.merge(params), make_apply(config)
    steps = min(32, config.context - len(ids))
    answer = functools.partial(llama.generate, apply, config, steps=steps, stop=stop)
    tokens = np.asarray([ids], np.int32)
    said = jax.jit(answer)(params, tokens, np.ones_like(tokens))
    print(tokenizer.decode([*ids, *np.asarray(said)[0].tolist()]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; invalid input ends in a one-paragraph error and status 2."""
    args = parse(argv)
    try:
        if args.generate is not None:
            return continue_text(args)
        if args.resume:
            check_resume(args)
        job = prepare(args)
        begun = start(args, job)
    except (ValueError, OSError) as error:
        text = f"finetune.py: error: {error}"
        print(textwrap.fill(text, 100, break_long_words=False), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    try:
        return run(args, job, begun)
    except KeyboardInterrupt:
        print("stopped outside training: only saved states are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
