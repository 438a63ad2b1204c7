"""Fine-tune a language model with LoRA on two CPU cores, and show that it learned.

    python examples/finetune.py                         # SmolLM2-135M learns to pronounce words
    python examples/finetune.py --smoke                 # the same path: a few layers and steps
    python examples/finetune.py --resume                # continue after Ctrl-C or kill, bit for bit
    python examples/finetune.py --generate "Say j a x →"                      # the adapted model
    python examples/finetune.py --generate "The capital of France is" --weights base
    python examples/finetune.py --model DIR --data pairs.jsonl --rank 16 --out runs/pairs
    python examples/finetune.py --export-peft DIR       # PEFT files; --export-gguf for llama.cpp
    python examples/finetune.py --adapter DIR           # start from a PEFT adapter
    python examples/finetune.py --quantize keep         # train over the blocks of a GGUF file
    python examples/finetune.py --sweep lr=1e-3,2e-3    # which rate is best? all in one program
    python examples/finetune.py --plan --batch 64       # what a step needs, from shapes alone
    python examples/finetune.py --mesh fsdp=4,tp=2      # on eight devices; with --plan, on none

`--model` takes a Hugging Face directory or a .gguf file (models: README.md). `--data` takes .jsonl
files, with lines of {"prompt": ..., "completion": ...}, where only the completion is learned, of
{"messages": [...]}, where only what the assistant says is, or of {"text": ...}; and plain .txt.
The output directory gets adapter/ (the adapter alone), metrics.jsonl, loss.png, report.json, and
state/, from which --resume continues. Ctrl-C and SIGTERM save the state and end the run.
"""

import argparse
import functools
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import formats
import jax
import llama
import numpy as np
import placing
import report
import states
import training
import watch
from begin import (
    Start,
    adapt,
    check_generation,
    check_run,
    load_model,
    prepare,
    remove_run,
    restore,
    start,
)
from evaluation import Apply, Job, Programs, compile_all, evaluate, make_apply, show
from exports import check_export, export
from flags import parse
from outputs import check_outputs
from plan import show_plan
from states import write_beside
from stopping import Stopping, stoppable
from sweep import sweep
from tqdm import tqdm
from training import State, make_schedule

import jlora
from jlora import checkpoint


def train(
    args: argparse.Namespace,
    job: Job,
    programs: Programs,
    frozen: Any,
    state: State,
    saver: states.Saver,
    asked: Stopping,
    logs: Sequence[watch.Log] = (),
) -> State:
    """Train until the run is finished or a signal asks to stop; evaluate and save when due."""
    flops = watch.flops_of_token(state.trainable, frozen, job.config.tied)
    record = functools.partial(report.record, make_schedule(args.lr, args.steps), flops)
    log = args.out / "metrics.jsonl"
    write_beside(log, report.lines(report.records(state, record)))
    bar = tqdm(total=args.steps, initial=state.step, desc="train", unit="step")
    stop = lambda: placing.agreed(asked.asked)
    target = log if placing.is_first() else Path(os.devnull)
    with asked.noting(), bar, target.open("a") as metrics:
        while not (stop() or finished(args, state)):
            if evaluation_due(args, state):
                saver.save(state)
                params = jlora.combine(state.trainable, frozen)
                score = evaluate(job, programs, params, stop)
                if score is None:
                    break
                state = training.scored(state, score, keep_best=args.eval_every is not None)
                show(job, state.evals[-1])
                line = report.evaluation(state.evals[-1])
                bar.unpause()  # its steps per second are those of training
            else:
                batch = job.batches[state.step]
                state = training.advance(programs.step, state, frozen, batch, job.batches.position)
                line = record(state, state.step)
                speed = int(line["tokens_per_second"])
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed} tokens/s")
                bar.update()
            metrics.write(report.lines([line]))
            metrics.flush()
            for send in logs:
                send(state.step, line)
            if saver.due(state):
                saver.save(state)
    saver.save(state)
    saver.wait()
    return state


def evaluation_due(args: argparse.Namespace, state: State) -> bool:
    """Whether the state should be evaluated and is not: first, last, and every --eval-every."""
    every = args.eval_every or args.steps
    done = bool(state.evals) and state.evals[-1]["step"] == state.step
    return not done and (state.step == args.steps or state.step % every == 0)


def finished(args: argparse.Namespace, state: State) -> bool:
    """Whether all steps are done and evaluated, or --patience is exhausted."""
    if args.patience is not None and training.stale(state) >= args.patience:
        return True
    return state.step == args.steps and not evaluation_due(args, state)


def run(args: argparse.Namespace, job: Job, begun: Start, asked: Stopping) -> int:
    """Train, save the adapter, check it, report. Returns the exit status."""
    tx, state, notes = begun
    if args.overwrite:
        remove_run(args.out)
    print(jlora.summary(job.params))
    placing.say_undivided(job.params)
    _, frozen = jlora.partition(job.params)
    programs = compile_all(job, tx, state, frozen)
    saving = states.Saver(args.out / "state", notes, args.save_every)
    with watch.loggers(args) as logs, saving as saver:
        state = train(args, job, programs, frozen, state, saver, asked, logs)
    if not finished(args, state):
        print(f"stopped after step {state.step} of {args.steps}; continue with --resume")
        return asked.status
    params = jlora.combine(state.trainable if state.best is None else state.best, frozen)
    found = {**report.results(state), **save_and_check(args, job, params)}
    found |= {**notes, "settings": report.every_flag(args)}
    found |= {"data": report.counts(job.dataset), "versions": report.versions()}
    export(args, job, params, found)
    report.plot(args.out / "loss.png", state)
    text = json.dumps(found, indent=2) + "\n"
    write_beside(args.out / "report.json", text)
    print(f"\n{text}written to {args.out / 'report.json'}")
    return 0


@functools.cache
def logits_of(config: llama.Config) -> tuple[Apply, Apply]:
    """The adapted and the plain model, compiled once in a process."""
    plain = make_apply(config)
    return jax.jit(jlora.lora(plain)), jax.jit(plain)


def save_and_check(args: argparse.Namespace, job: Job, params: Any) -> dict[str, Any]:
    """Save the adapter, and compare the logits with those of the restored and the merged model."""
    folder = args.out / "adapter"
    checkpoint.save(folder, params)
    adapted, merged = logits_of(job.config)
    batch = job.held_out[0]
    inputs = (batch["tokens"], batch["positions"], batch["segments"], None, batch["at"])
    logits = adapted(params, *inputs)
    restored = restore(args, load_model(args)[1])
    # NumPy's maximum propagates NaN.
    differ = lambda other: float(np.max(np.abs(placing.host(logits - other))))
    # A quantized run holds no dense model, unless one was asked for.
    dense = args.quantize is None or args.merge is not None
    trainable = sum(leaf.size for leaf in jax.tree.leaves(jlora.partition(params)[0]))
    base = formats.count(jlora.detach(params)[0])
    return {
        "trainable": trainable,
        "total": base + trainable,
        "adapter_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "merged_max_abs_diff": differ(merged(jlora.merge(params), *inputs)) if dense else None,
        "restored_max_abs_diff": differ(adapted(restored, *inputs)),
        "peak_memory_bytes": report.peak_memory(),
    }


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
        check_generation(args)
        params = restore(args, params)
        apply = jlora.lora(apply)
    if args.weights == "merged":
        params, apply = jlora.merge(params), make_apply(config)
    steps = min(32, config.context - len(ids))
    answer = functools.partial(llama.generate, apply, config, steps=steps, stop=stop)
    tokens = np.asarray([ids], np.int32)
    said = jax.jit(answer)(params, tokens, np.ones_like(tokens))
    print(tokenizer.decode([*ids, *np.asarray(said)[0].tolist()]))
    return 0


def main(
    argv: Sequence[str] | None = None,
    about: str = __doc__ or "",
    make_job: Callable[[argparse.Namespace], Job] | None = None,
) -> int:
    """Run the command line; invalid input ends in a one-paragraph error and status 2.

    `make_job` is another task's, as that of dpo.py.
    """
    args = parse(argv, about, preferences=make_job is not None)
    running = False
    with stoppable() as asked:
        try:
            if args.generate is not None:
                return continue_text(args)
            if args.plan:
                show_plan(args)
                return 0
            placing.join_processes(args)
            check_outputs(args)
            watch.check(args.log)
            with states.only_run(args.out) as left:
                check_run(args, left)
                job = (make_job or prepare)(args)
                check_export(args, job)
                if args.sweep:
                    return sweep(args, job)
                begun = start(args, job)
                running = True
                return run(args, job, begun, asked)
        except KeyboardInterrupt:
            kept = "outside training: only saved states are kept" if running else "before training"
            print(f"stopped {kept}", file=sys.stderr)
            return asked.status
        except (ValueError, OSError, FloatingPointError) as error:
            if running and isinstance(error, ValueError):
                raise
            program = "finetune.py" if make_job is None else "dpo.py"
            text = f"{program}: error: {error}"
            wrap = {"break_long_words": False, "break_on_hyphens": False}  # those of paths
            print(textwrap.fill(text, 100, **wrap), file=sys.stderr)
            return placing.end_alone(1 if running else 2)


if __name__ == "__main__":
    sys.exit(main())
