"""The command line of finetune.py."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

# What the results of a run depend on, so --resume requires the same values.
SETTINGS = ("model", "data", "adapter", "rank", "alpha", "steps", "lr", "seed", "smoke")
SETTINGS += ("eval_every", "patience")


def parse(argv: Sequence[str] | None, about: str = "") -> argparse.Namespace:
    """Read the command line; `about` is what --help says first."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
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
    add("--save-every", type=period, default=60.0, metavar="N", help="steps, or minutes as in 5min")
    add("--eval-every", type=positive, metavar="N", help="steps; keeps the best adapter")
    add("--patience", type=positive, metavar="N", help="stop after N evaluations without progress")
    add("--resume", action="store_true", help="continue a run that was stopped or killed")
    add("--overwrite", action="store_true", help="remove the run that is in --out")
    add("--generate", metavar="TEXT", help="continue TEXT instead of training")
    kinds = ("base", "adapted", "merged")
    add("--weights", choices=kinds, default="adapted", help="which model --generate runs")
    args = parser.parse_args(argv)
    if args.adapter is not None and (args.rank or args.alpha):
        parser.error("--rank and --alpha describe a new adapter; the one of --adapter has its own")
    if args.patience is not None and args.eval_every is None:
        parser.error("--patience counts the evaluations of --eval-every: give both")
    if args.resume and args.overwrite:
        parser.error("--resume continues the run that --overwrite removes: give one of them")
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


def period(text: str) -> int | float:
    """An argparse type: steps as an int, or minutes, `5min`, as a float in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?) ?(steps?|m|min|minutes?)?", text)
    minutes = found is not None and (found[2] or "").startswith("m")
    if found is None or float(found[1]) == 0 or not (minutes or found[1].isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a number of steps or, as in 5min, minutes")
    return 60 * float(found[1]) if minutes else int(found[1])
