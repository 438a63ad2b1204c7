"""The command line of finetune.py."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

# What the results of a run depend on, so --resume requires the same values.
SETTINGS = ("model", "data", "adapter", "rank", "alpha", "steps", "lr", "seed", "smoke")
SETTINGS += ("eval_every", "patience", "batch", "length", "accumulate", "dtype", "remat", "chunk")
SETTINGS += ("scan", "window", "quantize", "beta")
SETTINGS += ("targets", "form", "init", "dora", "rslora", "lora_plus")
# The flags of a new adapter, and what they are by default.
ADAPTER = {"rank": 8, "alpha": 16.0, "targets": [r".*_proj/kernel"], "form": "lora", "init": None}
ADAPTER |= {"dora": False, "rslora": False}
FORMS = ("lora", "lora_fa", "lora_xs", "mica")  # those that the optimizer of this job trains
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "milora", "loftq")
RESIDUAL = ("pissa", "olora", "milora")  # A and B start as a part of the weight


def parse(
    argv: Sequence[str] | None, about: str = "", preferences: bool = False
) -> argparse.Namespace:
    """Read the command line; `about` is what --help says first. `preferences`: that of dpo.py."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="a Hugging Face directory or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", nargs="+", metavar="FILE", help=".jsonl and .txt files (default: CMUdict)")
    add("--window", type=positive, default=4096, metavar="N", help="examples shuffled at a time")
    add("--out", type=Path, help="default: runs/finetune, or runs/smoke with --smoke")
    add("--smoke", action="store_true", help="the first 4 layers and 4 steps, to try the path")
    add("--seed", type=not_below_zero, default=0, help="of A and the order of the data; default: 0")
    add = parser.add_argument_group("the adapter").add_argument
    add("--rank", type=positive, help="default: 8")
    add("--alpha", type=above_zero, help="default: 16")
    add("--targets", nargs="+", metavar="REGEX", help="paths to adapt; default: .*_proj/kernel")
    add("--form", choices=FORMS, help="the variant; default: lora")
    add("--init", choices=INITS, help="how A and B start; default: the form's")
    add("--dora", action="store_true", default=None, help="train magnitudes as well")
    add("--rslora", action="store_true", default=None, help="scale by alpha / sqrt(rank)")
    add("--adapter", metavar="DIR", help="start from, or --generate with, a PEFT adapter")
    add("--export-peft", type=Path, metavar="DIR", help="write the adapter there as PEFT files")
    add("--export-gguf", type=Path, metavar="FILE", help="write the adapter there for llama.cpp")
    add("--merge", type=Path, metavar="DIR", help="write the merged model there, for transformers")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, help="default: 120, or 4 with --smoke")
    add("--lr", type=above_zero, default=2e-3, help="the peak learning rate; default: 0.002")
    add("--sweep", type=rates, metavar="lr=A,B,...", help="train one adapter per rate, all at once")
    add("--lora-plus", type=above_zero, metavar="RATIO", help="B's learning rate over A's, as 16")
    add("--batch", type=positive, default=2, metavar="ROWS", help="of packed tokens; default: 2")
    add("--length", type=positive, metavar="TOKENS", help="of a row; default: 128, or the longest")
    add("--accumulate", type=positive, default=1, metavar="N", help="parts of a batch, one by one")
    add("--eval-every", type=positive, metavar="N", help="steps; keeps the best adapter")
    add("--log", nargs="+", choices=("tensorboard", "wandb"), default=[], help="where, as well")
    add("--patience", type=positive, metavar="N", help="stop after N evaluations without progress")
    add = parser.add_argument_group("memory and time").add_argument
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base weights")
    kinds = ("keep", "nf4", "int8")
    add("--quantize", choices=kinds, help="store the base in fewer bits; keep: as the file does")
    add("--remat", action="store_true", help="compute layers again instead of keeping their values")
    add(
        "--chunk", type=positive, default=0, metavar="N", help="logits a token at once, in the loss"
    )
    add("--scan", action="store_true", help="one program for all layers, which compiles sooner")
    add("--plan", action="store_true", help="print what a step needs, from shapes; train nothing")
    add = parser.add_argument_group("several devices").add_argument
    add("--mesh", type=mesh, metavar="fsdp=A,tp=B", help="devices for the batch (dp, fsdp), heads")
    hosts_help = "one of several processes; without a value, the cluster tells which"
    known = {"nargs": "?", "const": "auto", "type": hosts, "metavar": "HOST:PORT,COUNT,INDEX"}
    add("--distributed", **known, help=hosts_help)
    add = parser.add_argument_group("stopping and continuing").add_argument
    add("--save-every", type=period, default=60.0, metavar="N", help="steps, or minutes as in 5min")
    add("--resume", action="store_true", help="continue a run that was stopped or killed")
    add("--overwrite", action="store_true", help="remove the run that is in --out")
    add = parser.add_argument_group("generation").add_argument
    add("--generate", metavar="TEXT", help="continue TEXT instead of training")
    kinds = ("base", "adapted", "merged")
    add("--weights", choices=kinds, default="adapted", help="which model --generate runs")
    others = {"beta": 0.1, "batch": 4, "lr": 5e-4} if preferences else {"beta": None}
    parser.set_defaults(**others)
    if preferences:
        add = parser.add_argument_group("preferences").add_argument
        add("--beta", type=above_zero, help="how close to the base to stay; default: 0.1")
    args = parser.parse_args(argv)
    unfit = {"accumulate": args.accumulate > 1, "chunk": args.chunk, "plan": args.plan}
    for name in (name for name, given in unfit.items() if given and preferences):
        parser.error(f"--{name} is not implemented for preferences: leave it out")
    new = [name for name in ADAPTER if getattr(args, name) is not None]
    if args.adapter is not None and new:
        parser.error(f"--{new[0]} describes a new adapter; the one of --adapter has its own")
    for flag in ("export_peft", "export_gguf"):
        if getattr(args, flag) is not None and args.init in RESIDUAL:
            flag = flag.replace("_", "-")
            parser.error(f"--{flag} writes plain LoRA, and --init {args.init} changes the base")
    if args.export_gguf is not None and args.dora:
        parser.error("--export-gguf: llama.cpp has no DoRA. Use --merge or --export-peft")
    if args.init == "loftq" and args.quantize not in ("nf4", "int8"):
        parser.error("--init loftq starts at the error of --quantize nf4 or int8: give one of them")
    if args.init == "loftq" and args.scan:
        parser.error("--init loftq reads the weights one by one: leave --scan out")
    if args.init in RESIDUAL and args.quantize is not None:
        parser.error(f"--init {args.init} changes the base, and --quantize stores it: use loftq")
    if args.plan and args.quantize == "keep":
        parser.error("--plan reads no weights, and --quantize keep depends on them: give nf4, int8")
    if args.batch % args.accumulate:
        parser.error(f"--batch {args.batch} is not a multiple of --accumulate {args.accumulate}")
    check_mesh(parser, args)
    if args.patience is not None and args.eval_every is None:
        parser.error("--patience counts the evaluations of --eval-every: give both")
    if args.resume and args.overwrite:
        parser.error("--resume continues the run that --overwrite removes: give one of them")
    unfit = (
        "resume",
        "eval_every",
        "log",
        "export_peft",
        "export_gguf",
        "merge",
        "generate",
        "plan",
        "mesh",
    )
    unfit = [name for name in unfit if getattr(args, name)]
    unfit += ["accumulate"] if args.accumulate > 1 else ["beta"] if preferences else []
    if args.sweep and unfit:
        flag = unfit[0].replace("_", "-")
        parser.error(f"--sweep finds a learning rate and does no more: leave --{flag} out")
    exports = {args.export_peft, args.export_gguf, args.merge} != {None}
    if args.generate is not None and (args.resume or exports):
        parser.error("--generate trains nothing: leave --resume and all exports out")
    for name, default in ADAPTER.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    args.steps = args.steps or (4 if args.smoke else 30 if preferences else 120)
    names = ("dpo-smoke", "dpo") if preferences else ("smoke", "finetune")
    args.out = args.out or Path("runs") / names[0 if args.smoke else 1]
    return args


def check_mesh(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if --mesh or --distributed do not fit the other flags."""
    sizes, rows = args.mesh or {}, args.batch // args.accumulate
    split = sizes.get("dp", 1) * sizes.get("fsdp", 1)
    if rows % split:
        over = f" over --accumulate {args.accumulate}" if args.accumulate > 1 else ""
        parser.error(
            f"--mesh splits the rows of a batch over {split} devices, which does not divide the "
            f"{rows} of --batch {args.batch}{over}: give --batch {split * args.accumulate} or a "
            "multiple of it"
        )
    if args.distributed is None:
        return
    if args.mesh is None:
        parser.error("--distributed: give --mesh too, with all devices of all processes")
    for name in ("generate", "plan"):
        if getattr(args, name):
            parser.error(f"--{name} is for one process: leave --distributed out")


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


def rates(text: str) -> list[float]:
    """An argparse type: `lr=1e-4,1e-3`, two learning rates or more."""
    name, _, values = text.partition("=")
    try:
        found = [above_zero(value) for value in values.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        found = []
    if name != "lr" or len({*found}) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not lr= and two learning rates or more")
    return found


def mesh(text: str) -> dict[str, int]:
    """An argparse type: `fsdp=4,tp=2`, numbers of devices for some of the axes."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("dp", "fsdp", "tp") or name in found:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no axis, or there twice; the axes are dp and fsdp, which split the "
                "batch, and tp, as in fsdp=4,tp=2"
            )
        if not re.fullmatch(r"[1-9]\d*", size):
            raise argparse.ArgumentTypeError(f"{part} is not a number of devices, as in fsdp=4")
        found[name] = int(size)
    return found


def hosts(text: str) -> str | tuple[str, int, int]:
    """An argparse type: `auto`, or HOST:PORT of process 0, how many there are, and which it is."""
    found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", text)
    if text != "auto" and (found is None or int(found[3]) >= int(found[2])):
        raise argparse.ArgumentTypeError(
            f"{text} is not HOST:PORT,COUNT,INDEX with INDEX below COUNT"
        )
    return (found[1], int(found[2]), int(found[3])) if found else "auto"


def period(text: str) -> int | float:
    """An argparse type: steps as an int, or minutes, `5min`, as a float in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?) ?(steps?|m|min|minutes?)?", text)
    minutes = found is not None and (found[2] or "").startswith("m")
    if found is None or float(found[1]) == 0 or not (minutes or found[1].isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a number of steps or, as in 5min, minutes")
    return 60 * float(found[1]) if minutes else int(found[1])
