"""Which variant learns best in the same number of steps? Loss, phoneme error rate, time, bytes.

    python benchmarks/quality.py [--seeds 0 1 2] [--only NAME ...]    # runs what is missing
    python benchmarks/quality.py --time [--rounds 5]                  # times a step of each
    python benchmarks/quality.py --table                              # prints the results

Every variant does the job of examples/finetune.py: SmolLM2-135M learns to pronounce words from
CMUdict in 120 steps. The model, the batches of a seed, the schedule and the evaluation are the
job's own; a row of variants.py lists what differs from its defaults. The seed determines A and B
and the order of the data.

Each variant and seed runs in its own process and is written to benchmarks/results/quality.json when
it finishes; Ctrl-C loses only the run in progress. Results with other settings, or of a variant
that has changed, raise an error. Runs may share a machine, so the time of a step is measured
separately: `--time` interleaves the steps of all variants in one process. Expected, after "LoRA
Without Regret" (Schulman et al. 2025): `lora` beats `lora_qv`, and learns as well as
`full`, whose best learning rate is a tenth of its own.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from measure import cores, surroundings, take_turns
from memory import nbytes
from tqdm import tqdm

import jlora

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import training
from begin import SCORED, prepare
from data import LENGTH
from evaluation import Apply, Job, compile_all, evaluate, make_apply
from flags import parse as parse_job
from flags import positive
from states import write_beside
from variants import VARIANTS, Variant

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
RESULTS = Path(__file__).parent / "results" / "quality.json"
SMOKE = Path("runs") / "quality_smoke.json"


def recipe(variant: Variant) -> dict[str, Any]:
    """What a variant's results depend on, as JSON; of a spec, what differs from the defaults."""

    def said(rule: Any) -> Any:
        if not isinstance(rule, jlora.LoraSpec):
            return rule
        pairs = [(f.name, getattr(rule, f.name), f.default) for f in dataclasses.fields(rule)]
        return {name: getattr(v, "__name__", str(v)) for name, v, old in pairs if v != old}

    names = {k: getattr(getattr(variant, k), "__name__", None) for k in ("optimizer", "begin")}
    return {"rules": {k: said(v) for k, v in variant.rules.items()}, "lr": variant.lr, **names}


# ---------------------------------------------------------------------------------------- one run


class Run(NamedTuple):
    """A job adapted by a variant, and what is needed to train it."""

    job: Job
    frozen: Any
    state: training.State
    tx: optax.GradientTransformation
    apply: Apply


def begin(variant: Variant, job: Job, args: argparse.Namespace) -> Run:
    """Adapt the job of examples/finetune.py, and build its optimizer and state."""
    base = jlora.detach(job.params)[0]
    params = jlora.attach(base, variant.rules, key=jax.random.key(args.seed))
    job = job._replace(params=params)
    job = job if variant.begin is None else job._replace(params=variant.begin(job))
    trainable, frozen = jlora.partition(job.params)
    tx = variant.optimizer(variant.lr, args.steps)
    state = training.State(trainable, tx.init(trainable), [], [])
    model = jlora.lora(make_apply(job.config))
    # `untie` returns untied parameters unchanged.
    return Run(job, frozen, state, tx, lambda params, *rest: model(jlora.untie(params), *rest))


def train(name: str, flags: list[str]) -> dict[str, Any]:
    """Train one variant on one seed and evaluate it."""
    args = parse_job(flags)
    job, frozen, state, tx, apply = begin(VARIANTS[name], prepare(args), args)
    trained, adapter = nbytes(state.trainable), nbytes(jlora.detach(job.params)[1])
    programs = compile_all(job, tx, state, frozen, apply)
    state = training.fit(programs.step, state, frozen, job.batches)
    score = evaluate(job, programs, jlora.combine(state.trainable, frozen))
    return {
        "loss": score["loss"],
        "rate": score["rate"],
        "trained_bytes": trained,
        "adapter_bytes": adapter,
        "date": datetime.date.today().isoformat(),
    }


def stepper(variant: Variant, job: Job, args: argparse.Namespace) -> Callable[[], Any]:
    """Compile a variant's step; each call runs the next one."""
    job, frozen, state, tx, apply = begin(variant, job, args)
    step = training.make_step(training.make_loss(apply), tx)
    # A step donates what it trains, and `full` trains the shared base.
    now = [jax.tree.map(jnp.copy, state.trainable), state.opt_state]
    step = step.lower(*now, frozen, job.batches[0]).compile()

    def run() -> None:
        *now[:], loss = step(*now, frozen, job.batches[0])
        jax.block_until_ready(loss)

    return run


# --------------------------------------------------------------------------------------- all runs


def flags_of(args: argparse.Namespace, seed: int) -> list[str]:
    """The command line of examples/finetune.py for one seed; the variant sets the rest."""
    flags = ["--seed", str(seed), *(["--smoke"] if args.smoke else [])]
    given = {"--model": args.model, "--data": args.data, "--steps": args.steps}
    return flags + [str(x) for k, v in given.items() if v is not None for x in (k, v)]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings shared by all results of a file."""
    around, job = surroundings(), parse_job(flags_of(args, 0))
    shared = {k: getattr(job, k) for k in ("model", "data", "steps", "smoke")}
    shared |= {"rows": job.batch, "length": LENGTH, "scored": SCORED}
    shared["device"] = around["device"]
    return shared | {k: around["versions"][k] for k in LIBRARIES}


def load(path: Path, common: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Read a file; raise if it has results with other settings, or of variants that changed."""
    if not path.exists():
        return {"settings": common, "variants": {}}
    found = json.loads(path.read_text())
    begun = found["settings"]
    other = [k for k in {**begun, **common} if begun.get(k) != common.get(k)]
    if other:
        differ = ", ".join(f"{k}={begun.get(k)} (now {common.get(k)})" for k in other)
        raise ValueError(
            f"{path} holds results of other settings: {differ}. Results are comparable only with "
            "equal settings: pass the same ones, or another file to --json."
        )
    for name in set(names) & set(found["variants"]):
        before, now = found["variants"][name]["recipe"], recipe(VARIANTS[name])
        if before != now:
            raise ValueError(
                f'{path} holds results of another "{name}": {before}, now {now}. Give the variant '
                "another name, or remove its results from the file."
            )
    return found


def save(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2) + "\n"
    write_beside(path, text)


def run(args: argparse.Namespace, found: dict[str, Any]) -> int:
    """Run what is missing, seed by seed; a failed run does not stop the others."""
    failed = []
    todo = [(seed, name) for seed in args.seeds for name in args.only]
    done = {name: row["seeds"] for name, row in found["variants"].items()}
    todo = [(seed, name) for seed, name in todo if str(seed) not in done.get(name, {})]
    print(f"{len(todo)} runs to do")
    for n, (seed, name) in enumerate(todo, 1):
        print(f"\n{n} of {len(todo)}: {name}, seed {seed}", flush=True)
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                row = alone.submit(train, name, flags_of(args, seed)).result()
        except Exception as error:
            failed.append(f"{name}, seed {seed}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr)
            continue
        fresh = {"recipe": recipe(VARIANTS[name]), "seeds": {}}
        found["variants"].setdefault(name, fresh)["seeds"][str(seed)] = row
        save(args.json, found)
        print(row)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def measure_time(args: argparse.Namespace, found: dict[str, Any]) -> int:
    """Time a step of each variant, interleaved, over one base model."""
    job_args = parse_job(flags_of(args, 0))
    job, runs = prepare(job_args), {}
    for name in tqdm(args.only, desc="compile", unit="variant"):
        runs[name] = stepper(VARIANTS[name], job, job_args)
    load = round(os.getloadavg()[0], 2)
    seconds = take_turns(runs, args.rounds)
    about = {"date": datetime.date.today().isoformat(), "cores": cores(), "load_before": load}
    found["time"] = {
        **about,
        "rounds": args.rounds,
        "seconds": {name: median(times) for name, times in seconds.items()},
    }
    save(args.json, found)
    print(f"\n{table(found)}")
    return 0


def table(found: dict[str, Any]) -> str:
    """A Markdown row for each variant: mean over the seeds ± standard deviation."""
    heads = ["variant", "learning rate", "held-out loss", "phoneme error rate"]
    heads += ["s / step", "trained", "adapter", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    times = found.get("time", {"seconds": {}})["seconds"]
    for name, row in found["variants"].items():
        runs = list(row["seeds"].values())
        if not runs:
            continue
        time = f"{times[name]:.2f}" if name in times else "–"

        def cell(key: str, digits: int, runs: list[dict[str, Any]] = runs) -> str:
            values = [run[key] for run in runs]
            if None in values:
                return "–"
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{mean(values):.{digits}f}{spread}"

        sizes = [f"{runs[0][k] / 1e6:.2f} MB" for k in ("trained_bytes", "adapter_bytes")]
        cells = [name, f"{row['recipe']['lr']:g}", cell("loss", 3), cell("rate", 3), time, *sizes]
        lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add("--steps", type=positive, help="default: the job's, 120, or 4 with --smoke")
    add("--smoke", action="store_true", help="4 layers and 4 steps, to try the path")
    add("--model", help="as of examples/finetune.py")
    add("--data", help="as of examples/finetune.py")
    add("--json", type=Path, help=f"default: benchmarks/results/{RESULTS.name}, or {SMOKE}")
    add("--time", action="store_true", help="time a step of each variant; train nothing")
    add("--rounds", type=positive, default=5, help="of --time (default: 5)")
    add("--table", action="store_true", help="print the results as Markdown; run nothing")
    args = parser.parse_args(argv)
    args.json = args.json or (SMOKE if args.smoke else RESULTS)
    return args, parser


def main(argv: list[str] | None = None) -> int:
    args, parser = parse(argv)
    if args.table:
        if not args.json.exists():
            parser.error(f"there is no {args.json} yet: run without --table first")
        print(table(json.loads(args.json.read_text())))
        return 0
    try:
        found = load(args.json, settings(args), args.only)
    except ValueError as error:
        parser.error(str(error))
    try:
        status = (measure_time if args.time else run)(args, found)
    except KeyboardInterrupt:
        print(f"stopped; finished runs are in {args.json}", file=sys.stderr)
        return 130
    print(f"\n{table(found)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
