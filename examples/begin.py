"""What happens before training: checks, the model, its adapter, the data, the state to start from.

Invalid input raises here, before any file of the run is written.
"""

import argparse
import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import chat
import data
import formats
import jax
import llama
import optax
import placing
import report
import states
import training
import weights
from evaluation import SHOWN, Job
from flags import ADAPTER, RESIDUAL, SETTINGS
from param_tree import stacked, stacked_layouts
from training import State

import jlora
from jlora import checkpoint, peft

SCORED = 256  # held-out words that are generated and scored
# All that a run writes into its directory.
WRITTEN = ("adapter", "metrics.jsonl", "loss.png", "report.json", "sweep.json", "sweep.png")
WRITTEN += ("tensorboard", "state")


def prepare(args: argparse.Namespace) -> Job:
    """Load, attach and pack. Invalid input raises here, before any file is written."""
    config, base, tokenizer, stop = load_model(args)
    params = adapt(args, base)
    template = chat.chat_of(weights.path_of(args.model), tokenizer) if args.data else None
    dataset = data.load(
        args.data, tokenizer, stop, config.context, args.length, template, args.window
    )
    batches = data.training_batches(dataset, args.steps, args.batch, args.accumulate, args.seed)
    scored = dataset.held_out[: 16 if args.smoke else SCORED]
    rows = data.pack(scored, dataset.length)
    return Job(
        config=config,
        params=params,
        tokenizer=tokenizer,
        stop=stop,
        dataset=dataset,
        batches=batches,
        held_out=data.batches(rows, args.batch // args.accumulate),
        prompts=scored if dataset.phonemes else scored[:SHOWN],
        accumulate=args.accumulate,
    )


def adapt(args: argparse.Namespace, base: Any) -> Any:
    """Attach a new adapter, or the PEFT adapter that --adapter names."""
    if args.adapter is not None:
        try:
            whole = placing.replicate(args)
            return peft.load(args.adapter, base, names=peft.llama_names, replicate=whole)
        except (ValueError, OSError) as error:
            raise ValueError(f"`--adapter {args.adapter}`: {error}") from error
    params = attach(args, base)
    return formats.loftq(args, layers_of(args), params) if args.init == "loftq" else params


def restore(args: argparse.Namespace, base: Any) -> Any:
    """The adapter that the run has saved, on the base; PiSSA and its relatives have changed it."""
    base = adapt(args, base) if args.init in RESIDUAL else base
    return checkpoint.restore(args.out / "adapter", base, placing.replicate(args))


def attach(args: argparse.Namespace, base: Any) -> Any:
    """Attach the new adapter that the flags describe."""
    layouts = stacked_layouts(base) if args.scan else None
    key, whole = jax.random.key(args.seed), placing.replicate(args)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a rank above min(in, out) costs more than the weight
            warnings.filterwarnings("default", ".*every device gathers")  # to decompose, once
            return jlora.attach(base, rules(args), key=key, layouts=layouts, replicate=whole)
    except (ValueError, UserWarning) as error:
        targets = "" if args.targets == ADAPTER["targets"] else f" --targets {args.targets}"
        flags = f"--rank {args.rank} --alpha {args.alpha}{targets}"
        raise ValueError(f"`{flags}`: {error}") from error


def rules(args: argparse.Namespace) -> dict[str, jlora.LoraSpec]:
    """The rules of the flags."""
    spec = jlora.LoraSpec(
        rank=args.rank,
        alpha=args.alpha,
        scaling="rslora" if args.rslora else "lora",
        init=None if args.init in (None, "loftq") else getattr(jlora.initializers, args.init),
        dora=args.dora,
        form=args.form,
    )
    return dict.fromkeys(args.targets, spec)


def load_model(args: argparse.Namespace) -> weights.Model:
    """The plain model; for a smoke test, its first layers."""
    config, base, tokenizer, stop = formats.load(args, layers_of(args))
    if args.scan:
        base = placing.place_all(placing.mesh_of(args), stacked(base, config.layers))
    return configured(args, config), base, tokenizer, stop


def layers_of(args: argparse.Namespace) -> int | None:
    return 4 if args.smoke else None


def configured(args: argparse.Namespace, config: llama.Config) -> llama.Config:
    """The sizes, with what the flags say about memory."""
    if args.length is not None and args.length > config.context:
        raise ValueError(
            f"`--length {args.length}`: the model's context has {config.context} tokens. Give at "
            "most as many."
        )
    flags = {"dtype": args.dtype, "remat": args.remat, "chunk": args.chunk, "scan": args.scan}
    return dataclasses.replace(config, **flags, rows=placing.rows(args))


def check_run(args: argparse.Namespace, left: bool) -> None:
    """Raise if there is nothing to resume, or other flags; or a run that must not be replaced.

    `left`: a run was killed here, perhaps before it saved anything.
    """
    folder = args.out / "state"
    if not args.resume:
        kept = states.saved_steps(folder) or [*args.out.glob("adapter")]
        if kept and not args.overwrite:
            raise FileExistsError(
                f"`--out {args.out}`: it has the states or the adapter of another run. Continue "
                "that run with --resume, remove it with --overwrite, or give another --out."
            )
        return
    notes = states.load_notes(folder)
    if notes is None and not left:
        raise FileNotFoundError(
            f"`--resume`: there is no saved state in {folder}. Run without --resume."
        )
    begun, now = (notes or {}).get("settings", settings(args)), settings(args)
    other = [name for name in SETTINGS if begun.get(name) != now[name]]
    if other:
        raise ValueError(
            "`--resume`: the run was started with "
            + ", ".join(f"{name}={begun.get(name)} (now {now[name]})" for name in other)
            + ". Give the same flags, or start again with --overwrite."
        )


def check_generation(args: argparse.Namespace) -> None:
    """Raise if the adapter in --out is not there, or is one over another base."""
    if not (args.out / "adapter").is_dir():
        raise FileNotFoundError(
            f"`--out {args.out}`: there is no adapter in it yet. Train one first, or give "
            "`--weights base`."
        )
    notes = report.notes_of(args.out)
    begun, now = notes.get("settings", {}), settings(args)
    # PiSSA and its relatives change the base, each rank and seed in another way; LoftQ's A and B
    # make up for a quantization.
    over_others = begun.get("init") in (*RESIDUAL, "loftq")
    names = ("smoke", *ADAPTER, "seed", "quantize") if over_others else ("smoke",)
    other = [f"{x}={begun[x]} (now {now[x]})" for x in names if begun.get(x, now[x]) != now[x]]
    if other:
        raise ValueError(
            f"`--generate`: the adapter in {args.out} was trained with {', '.join(other)}. Give "
            "the same flags."
        )
    of_base = report.files_fingerprint(weights.path_of(args.model))
    if notes.get("base_sha256", of_base) != of_base:
        raise ValueError(
            f"`--generate`: the adapter in {args.out} was trained over other files than those of "
            f"`--model {args.model}`, from {begun.get('model')}. Give that model."
        )


class Start(NamedTuple):
    """The optimizer, the state to start from, and what is saved with the states."""

    tx: optax.GradientTransformation
    state: State
    notes: dict[str, Any]


def start(args: argparse.Namespace, job: Job) -> Start:
    """A new state or, with --resume, the last intact one."""
    trainable, _ = jlora.partition(job.params)
    tx = training.make_optimizer(args.lr, args.steps, args.lora_plus)
    state = State(trainable, placing.initial(tx, job.params), [], [])
    notes = {
        "settings": settings(args),
        "data_sha256": report.tokens_fingerprint(job.dataset),
        "base_sha256": report.files_fingerprint(weights.path_of(args.model)),
    }
    if not args.resume:
        return Start(tx, state, notes)
    begun = states.load_notes(args.out / "state") or notes
    for flag, name in (("--data", "data_sha256"), ("--model", "base_sha256")):
        if begun.get(name) != notes[name]:
            raise ValueError(
                f"`--resume`: the files of `{flag} {getattr(args, flag[2:])}` have changed since "
                "the run was started. Restore them, or start again with --overwrite."
            )
    found = states.load_state(args.out / "state", state)
    if found is None:
        print("the run was killed before it saved anything: starting at step 0")
    state = found or state
    job.batches.seek(state.step, state.position)
    return Start(tx, state, notes)


def remove_run(out: Path) -> None:
    """Remove what an earlier run has written, its states last."""
    for name in WRITTEN if placing.is_first() else ():
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that must not change when a run is resumed."""
    return {name: getattr(args, name) for name in SETTINGS}
