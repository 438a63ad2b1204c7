"""How does the ratio to the limit change with the tokens of a step, and with the rank?

    python benchmarks/plots.py [--rounds 7] [--out benchmarks/results]

Two of the decoder blocks of benchmarks/step.py: a sweep over the tokens of a step at rank 8, then
over the rank at 4 x 128 tokens. Writes sweep.json, ratio_tokens.png and ratio_rank.png.
"""

import argparse
from pathlib import Path
from typing import Any

import step
from blocks import PRESETS, Sizes
from matplotlib.figure import Figure
from measure import surroundings, write_json

BASIS = PRESETS["smollm2"]._replace(blocks=2)
TOKENS = [BASIS._replace(time=time) for time in (8, 16, 32, 64, 128, 256)]
RANKS = [BASIS._replace(rank=rank) for rank in (1, 2, 4, 8, 16, 32, 64)]
SHOWN = ("jlora", "naive", "merged", "full", "qwix", "peft")


def sweep(points: list[Sizes], rounds: int) -> list[dict[str, Any]]:
    """The ratios of every variant at every point."""
    found = []
    for sizes in points:
        rows = step.measure(step.variants(sizes), rounds)
        ratios = {name: row["ratio"] for name, row in rows.items()}
        found.append({"tokens": sizes.batch * sizes.time, "rank": sizes.rank, "ratios": ratios})
        print(found[-1])
    return found


def draw(path: Path, points: list[dict[str, Any]], axis: str, title: str) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    xs = [point[axis] for point in points]
    for name in SHOWN:
        if name in points[0]["ratios"]:
            wide = 2.5 if name == "jlora" else 1
            axes.plot(xs, [p["ratios"][name] for p in points], "o-", ms=3, lw=wide, label=name)
    axes.axhline(1.0, color="black", lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.set(xlabel=axis, ylabel="seconds / its limit's seconds", title=title)
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    result = {**surroundings(), "sizes": BASIS._asdict(), "rounds": args.rounds}
    result |= {"tokens": sweep(TOKENS, args.rounds), "ranks": sweep(RANKS, args.rounds)}
    write_json(args.out / "sweep.json", result)
    where = f"{result['device']}, {result['cores']} cores, {result['date']}"
    draw(args.out / "ratio_tokens.png", result["tokens"], "tokens", f"rank 8; {where}")
    draw(args.out / "ratio_rank.png", result["ranks"], "rank", f"512 tokens; {where}")


if __name__ == "__main__":
    main()
