"""Which variant learns best in the same steps? Loss and phoneme error rate, beside time and bytes.

    python benchmarks/quality.py [--seeds 0 1 2] [--only NAME ...]    # does what is missing
    python benchmarks/quality.py --table                              # what there is, as Markdown

Every variant does the job of examples/finetune.py: SmolLM2-135M learns to pronounce words from
CMUdict in 120 steps. The model, the batches of a seed, the schedule and the evaluation are the
job's own, and a row of variants.py says what differs from its defaults. A seed is that of A and B
and of the order of the data.

Each run of a variant and a seed has a process of its own, so that no memory outlives it, and is
written to benchmarks/results/quality.json as soon as it is done; Ctrl-C loses the one in progress.
Results of other settings, or of a variant that was changed, are refused. Expected, after "LoRA
Without Regret" (Schulman et al. 2025): `lora` beats `lora_qv`, and learns as well as `full`, whose
best learning rate is a tenth of its own.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import jax
from measure import surroundings
from memory import nbytes

import jlora

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import finetune
import training
from evaluation import Job, compile_all, evaluate, make_apply
from variants import VARIANTS, Variant

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
RESULTS = Path(__file__).parent / "results" / "quality.json"
SMOKE = Path("runs") / "quality_smoke.json"


def recipe(variant: Variant) -> dict[str, Any]:
    """What a variant's numbers hang on, as JSON: of a spec what differs from the defaults."""

    def said(rule: Any) -> Any:
        if not isinstance(rule, jlora.LoraSpec):
            return rule
        pairs = [(f.name, getattr(rule, f.name), f.default) for f in dataclasses.fields(rule)]
        return {name: getattr(v, "__name__", str(v)) for name, v, old in pairs if v != old}

    names = {k: getattr(getattr(variant, k), "__name__", None) for k in ("optimizer", "begin")}
    return {"rules": {k: said(v) for k, v in variant.rules.items()}, "lr": variant.lr, **names}


# ---------------------------------------------------------------------------------------- one run


def adapted(variant: Variant, flags: list[str]) -> Job:
    """The job of examples/finetune.py, its model adapted as the variant has it."""
    args = finetune.parse(flags)
    job = finetune.prepare(args)
    base = jlora.detach(job.params)[0]
    params = jlora.attach(base, variant.rules, key=jax.random.key(args.seed))
    job = job._replace(params=params)
    return job if variant.begin is None else job._replace(params=variant.begin(job))


def train(name: str, flags: list[str]) -> dict[str, Any]:
    """Train one variant on one seed and evaluate it."""
    load, variant = round(os.getloadavg()[0], 2), VARIANTS[name]
    job, steps = adapted(variant, flags), finetune.parse(flags).steps
    model = jlora.lora(make_apply(job.config))
    trainable, frozen = jlora.partition(job.params)
    trained, adapter = nbytes(trainable), nbytes(jlora.detach(job.params)[1])
    tx = variant.optimizer(variant.lr, steps)
    state = training.State(trainable, tx.init(trainable), [], [])
    # What is not tied, `untie` leaves as it is.
    apply = lambda params, *rest: model(jlora.untie(params), *rest)  # noqa: E731
    programs = compile_all(job, tx, state, frozen, apply)
    state = training.fit(programs.step, state, frozen, job.batches)
    if state.step < steps:
        raise KeyboardInterrupt
    start = time.perf_counter()
    score = evaluate(job, programs, jlora.combine(state.trainable, frozen))
    return {
        "loss": score["loss"],
        "rate": score["rate"],
        "seconds_per_step": median(state.seconds),
        "trained_bytes": trained,
        "adapter_bytes": adapter,
        "evaluation_seconds": time.perf_counter() - start,
        "load_before": load,
        "date": datetime.date.today().isoformat(),
    }


# --------------------------------------------------------------------------------------- all runs


def flags_of(args: argparse.Namespace, seed: int) -> list[str]:
    """The command line of examples/finetune.py for one seed; the variant has the rest."""
    flags = ["--seed", str(seed), *(["--smoke"] if args.smoke else [])]
    given = {"--model": args.model, "--data": args.data, "--steps": args.steps}
    return flags + [str(x) for k, v in given.items() if v is not None for x in (k, v)]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all results of a file have in common."""
    around, job = surroundings(), finetune.parse(flags_of(args, 0))
    shared = {k: getattr(job, k) for k in ("model", "data", "steps", "smoke")}
    shared |= {"rows": finetune.ROWS, "length": finetune.LENGTH, "scored": finetune.SCORED}
    shared |= {k: around[k] for k in ("device", "cores")}
    return shared | {k: around["versions"][k] for k in LIBRARIES}


def load(path: Path, common: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Read what is there; refuse results of other settings, and of variants that were changed."""
    if not path.exists():
        return {"settings": common, "variants": {}}
    found = json.loads(path.read_text())
    begun = found["settings"]
    other = [k for k in {**begun, **common} if begun.get(k) != common.get(k)]
    if other:
        differ = ", ".join(f"{k}={begun.get(k)} (now {common.get(k)})" for k in other)
        raise ValueError(
            f"{path} holds results of other settings: {differ}. Results are only compared under "
            "the same ones: give those, or another file to --json."
        )
    for name in set(names) & set(found["variants"]):
        before, now = found["variants"][name]["recipe"], recipe(VARIANTS[name])
        if before != now:
            raise ValueError(
                f'{path} holds results of another "{name}": {before}, now {now}. Give the variant '
                "another name, or take its results out of the file."
            )
    return found


def save(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2) + "\n"
    finetune.write_beside(path, lambda part: part.write_text(text))


def run(args: argparse.Namespace, found: dict[str, Any]) -> int:
    """Do what is missing, all variants of a seed before the next; a failure stops no other run."""
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


def table(found: dict[str, Any]) -> str:
    """A row of Markdown for each variant: means over the seeds, ± the standard deviation."""
    heads = ["variant", "held-out loss", "phoneme error rate", "s / step", "trained", "adapter"]
    lines = ["| " + " | ".join([*heads, "seeds"]) + " |", "|---" * 7 + "|"]
    for name, row in found["variants"].items():
        runs = list(row["seeds"].values())

        def cell(key: str, digits: int, runs: list[dict[str, Any]] = runs) -> str:
            values = [run[key] for run in runs]
            if None in values:
                return "–"
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{mean(values):.{digits}f}{spread}"

        sizes = [f"{runs[0][k] / 1e6:.2f} MB" for k in ("trained_bytes", "adapter_bytes")]
        cells = [name, cell("loss", 3), cell("rate", 3), cell("seconds_per_step", 2), *sizes]
        lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add("--steps", type=finetune.positive, help="default: the job's, 120, or 4 with --smoke")
    add("--smoke", action="store_true", help="4 layers, 4 steps: the path, not the result")
    add("--model", help="as of examples/finetune.py")
    add("--data", help="as of examples/finetune.py")
    add("--json", type=Path, help=f"default: benchmarks/results/{RESULTS.name}, or {SMOKE}")
    add("--table", action="store_true", help="print what is there as Markdown, and run nothing")
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
        status = run(args, found)
    except KeyboardInterrupt:
        print(f"stopped; what was finished is in {args.json}", file=sys.stderr)
        return 130
    print(f"\n{table(found)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
