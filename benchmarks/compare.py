"""How does jlora compare with PEFT, qwix, quax and LoRA written by hand? One table and one plot.

    python benchmarks/compare.py [--rounds 15] [--out benchmarks/results] [--cases FILE]

Three questions, one column each:

1. Step: the time of a training step over its limit's, on the blocks of benchmarks/step.py, all
   libraries in turn. PEFT is measured against PyTorch's limit.
2. Cases: how many programs of tests/cases.py a library adapts without building W + A B, by
   benchmarks/factored.py. PEFT adapts PyTorch modules, and `naive` is written by hand, so neither
   has a number. `--cases` takes the JSON of an earlier run instead of running it again.
3. Error: the worst relative error of the loss and of every gradient of the step, against the same
   blocks on the merged weights W + s A B.

Writes compare.json and compare.png, and prints the table as Markdown. Libraries that are not
installed are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import step
from blocks import PRESETS, Sizes
from matplotlib.figure import Figure
from measure import ratio, surroundings, take_turns, write_json

SHOWN = {
    "jlora": "jlora",
    "quax": "quax",
    "qwix": "qwix",
    "peft": "PEFT (PyTorch)",
    "naive": "by hand: x W + s (x A) B",
}
RESULTS = Path(__file__).parent / "results"
FACTORED = Path(__file__).with_name("factored.py")
Rows = dict[str, dict[str, Any]]


def measure_steps(sizes: Sizes, rounds: int) -> Rows:
    """The ratio to the limit, the seconds and the worst error of every library."""
    variants = step.variants(sizes)
    shown = {name: variants[name] for name in SHOWN if name in variants}
    limits = {variant.limit: variants[variant.limit] for variant in shown.values()}
    seconds = take_turns({name: v.run for name, v in (limits | shown).items()}, rounds)
    merged = variants["merged"]
    want = [float(merged.run()), *merged.gradients()]
    return {
        name: {
            "ratio": ratio(seconds[name], seconds[variant.limit]),
            "seconds": median(seconds[name]),
            "error": worst_error([float(variant.run()), *variant.gradients()], want),
        }
        for name, variant in shown.items()
    }


def worst_error(got: list[Any], want: list[Any]) -> float:
    """The largest difference, relative to the largest value of its array."""
    pairs = [
        (np.asarray(g, np.float64), np.asarray(x, np.float64))
        for g, x in zip(got, want, strict=True)
    ]
    return max(float(np.abs(g - x).max() / np.abs(x).max()) for g, x in pairs)


def run_cases(only: list[str] | None) -> dict[str, Any]:
    """Run factored.py in a process of its own: its compiler flags would slow the steps down."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factored.json"
        command = [sys.executable, str(FACTORED), "--json", str(path)]
        subprocess.run(command + (["--only", *only] if only else []), check=True)
        return json.loads(path.read_text())


def markdown(rows: Rows, counts: Rows) -> str:
    """The README's table."""
    lines = [
        "| | step / its limit | cases right | cases factored | worst relative error |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        of = counts.get(name)
        cells = [f"{of[k]} of {of['cases']}" if of else "–" for k in ("right", "factored")]
        lines.append(
            f"| {SHOWN[name]} | {row['ratio']:.2f} | {' | '.join(cells)} | {row['error']:.0e} |"
        )
    return "\n".join(lines)


def draw(path: Path, rows: Rows, counts: Rows, where: str) -> None:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [SHOWN[name] for name in rows]
    colors = ["C0" if name == "jlora" else "0.6" for name in rows]
    bars = left.barh(labels, [row["ratio"] for row in rows.values()], color=colors)
    left.bar_label(bars, fmt=" %.2f")
    left.axvline(1.0, color="black", lw=0.8, ls=":")
    left.invert_yaxis()
    left.margins(x=0.12)
    left.set(title="step time / limit (lower is better)", xlabel=where)
    numbers = {name: counts[name]["factored"] if name in counts else None for name in rows}
    bars = right.barh(labels, [n or 0 for n in numbers.values()], color=colors)
    right.bar_label(bars, [" –" if n is None else f" {n}" for n in numbers.values()])
    total = max(of["cases"] for of in counts.values())
    right.set(title=f"factored, of {total} programs", xlim=(0, 1.12 * total))
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cases", type=Path, help="what factored.py wrote, instead of running it")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="some of the cases")
    args = parser.parse_args(argv)
    sizes, around = PRESETS["smollm2"], surroundings()
    rows = measure_steps(sizes, args.rounds)
    found = json.loads(args.cases.read_text()) if args.cases else run_cases(args.only)
    print(f"\n{args.rounds} rounds, {around}\n\n{markdown(rows, found['summary'])}\n")
    result = {**around, "sizes": sizes._asdict(), "rounds": args.rounds, "step": rows}
    kept = {"summary": found["summary"], "cases": found["cases"]}
    write_json(args.out / "compare.json", {**result, **kept})
    where = f"{around['device']}, cores: {around['cores']}, {around['date']}"
    draw(args.out / "compare.png", rows, found["summary"], where)


if __name__ == "__main__":
    main()
