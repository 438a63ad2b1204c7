"""The command line of finetune.py."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
FROZEN_B = ("lora_xs", "mica")  # those that do not train B
UNFIT = ("accumulate", "chunk", "plan", "sweep", "window")  # what dpo.py does not implement
UNSWEPT = ("resume", "eval_every", "log", "export_peft", "export_gguf", "merge", "generate")
UNSWEPT += ("plan", "mesh")
# What differs between finetune.py and dpo.py: defaults, and what --help says.
USUAL = {"out": "finetune", "smoke": "smoke", "steps": 120, "lr": 2e-3, "batch": 2}
USUAL |= {"files": ".jsonl and .txt files", "data": "CMUdict", "rows": "of packed tokens"}
USUAL |= {"length": "128, or the longest"}
PREFERENCES = {"out": "dpo", "smoke": "dpo-smoke", "steps": 30, "lr": 5e-4, "batch": 4}
PREFERENCES |= {"files": ".jsonl files", "data": "sums in words", "rows": "pairs of answers"}
PREFERENCES |= {"length": "the longest; longer pairs are dropped"}
PREFERENCES |= dict.fromkeys(UNFIT, argparse.SUPPRESS)


def parse(
    argv: Sequence[str] | None, about: str = "", preferences: bool = False
) -> argparse.Namespace:
    """Read the command line; `about` is what --help says first. `preferences`: that of dpo.py."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = PREFERENCES if preferences else USUAL
    add_model_and_adapter(parser, usual)
    add_training(parser, usual)
    add_machines(parser, usual)
    parser.set_defaults(beta=None)
    if preferences:
        add = parser.add_argument_group("preferences").add_argument
        add("--beta", type=above_zero, default=0.1, help="of the loss, as DPO has it; default: 0.1")
    args = parser.parse_args(argv)
    unfit = [name for name in UNFIT if getattr(args, name) != parser.get_default(name)]
    if preferences and unfit:
        parser.error(f"--{unfit[0]} is not implemented for preferences: leave it out")
    check_adapter(parser, args)
    check_purpose(parser, args)
    check_mesh(parser, args)
    for name, default in ADAPTER.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    args.steps = args.steps or (4 if args.smoke else usual["steps"])
    args.out = args.out or Path("runs") / usual["smoke" if args.smoke else "out"]
    return args


def add_model_and_adapter(parser: argparse.ArgumentParser, usual: dict[str, Any]) -> None:
    """Add the flags of the model, the data and the adapter."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="a Hugging Face directory or a .gguf file (default: SmolLM2-135M-Instruct)")
    add("--data", nargs="+", metavar="FILE", help=f"{usual['files']} (default: {usual['data']})")
    window_help = usual.get("window", "examples shuffled at a time; default: 4096")
    add("--window", type=positive, default=4096, metavar="N", help=window_help)
    out_help = f"default: runs/{usual['out']}, or runs/{usual['smoke']} with --smoke"
    add("--out", type=Path, help=out_help)
    add("--smoke", action="store_true", help="the first 4 layers and 4 steps, to try the path")
    add("--seed", type=seed, default=0, help="of A and the order of the data; default: 0")
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


def add_training(parser: argparse.ArgumentParser, usual: dict[str, Any]) -> None:
    """Add the flags of training, memory and time."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, help=f"default: {usual['steps']}, or 4 with --smoke")
    lr_help = f"the peak learning rate; default: {usual['lr']}"
    add("--lr", type=above_zero, default=usual["lr"], help=lr_help)
    sweep_help = usual.get("sweep", "train one adapter per rate, all at once")
    add("--sweep", type=rates, metavar="lr=A,B,...", help=sweep_help)
    add("--lora-plus", type=above_zero, metavar="RATIO", help="B's learning rate over A's, as 16")
    batch_help = f"{usual['rows']}; default: {usual['batch']}"
    add("--batch", type=positive, default=usual["batch"], metavar="ROWS", help=batch_help)
    add("--length", type=positive, metavar="TOKENS", help=f"of a row; default: {usual['length']}")
    parts_help = usual.get("accumulate", "parts of a batch, one by one; default: 1")
    add("--accumulate", type=positive, default=1, metavar="N", help=parts_help)
    add("--eval-every", type=positive, metavar="N", help="steps; keeps the best adapter")
    add("--log", nargs="+", choices=("tensorboard", "wandb"), default=[], help="where, as well")
    add("--patience", type=positive, metavar="N", help="stop after N evaluations without progress")
    add = parser.add_argument_group("memory and time").add_argument
    dtype_help = "of the base weights; default: float32"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    kinds = ("keep", "nf4", "int8")
    add("--quantize", choices=kinds, help="store the base in fewer bits; keep: as the file does")
    add("--remat", action="store_true", help="compute layers again instead of keeping their values")
    chunk_help = usual.get("chunk", "logits a token at once, in the loss")
    add("--chunk", type=positive, default=0, metavar="N", help=chunk_help)
    add("--scan", action="store_true", help="one program for all layers, which compiles sooner")
    plan_help = usual.get("plan", "print what a step needs, from shapes; train nothing")
    add("--plan", action="store_true", help=plan_help)


def add_machines(parser: argparse.ArgumentParser, usual: dict[str, Any]) -> None:
    """Add the flags of several devices, of stopping and continuing, and of generation."""
    add = parser.add_argument_group("several devices").add_argument
    add("--mesh", type=mesh, metavar="fsdp=A,tp=B", help="devices for the batch (dp, fsdp), heads")
    hosts_help = "one of several processes; without a value, the cluster tells which"
    known = {"nargs": "?", "const": "auto", "type": hosts, "metavar": "HOST:PORT,COUNT,INDEX"}
    add("--distributed", **known, help=hosts_help)
    add = parser.add_argument_group("stopping and continuing").add_argument
    every_help = "steps, or minutes as in 5min; default: 1min"
    add("--save-every", type=period, default=60.0, metavar="N", help=every_help)
    add("--resume", action="store_true", help="continue a run that was stopped or killed")
    add("--overwrite", action="store_true", help="remove the run that is in --out")
    add = parser.add_argument_group("generation").add_argument
    add("--generate", metavar="TEXT", help="continue TEXT instead of training")
    kinds = ("base", "adapted", "merged")
    weights_help = "which model --generate runs; default: adapted"
    add("--weights", choices=kinds, default="adapted", help=weights_help)


def check_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if the flags of the adapter, or of the base under it, do not fit."""
    new = [name for name in ADAPTER if getattr(args, name) is not None]
    if args.adapter is not None and new:
        parser.error(f"--{new[0]} describes a new adapter; the one of --adapter has its own")
    if args.adapter is not None and args.plan:
        parser.error("--plan reads no weights: instead of --adapter, give its --rank and --targets")
    for flag in ("export_peft", "export_gguf"):
        if getattr(args, flag) is not None and args.init in RESIDUAL:
            flag = flag.replace("_", "-")
            parser.error(f"--{flag} writes plain LoRA, and --init {args.init} changes the base")
    if args.export_gguf is not None and args.dora:
        parser.error("--export-gguf: llama.cpp has no DoRA. Use --merge or --export-peft")
    if args.lora_plus is not None and args.form in FROZEN_B:
        parser.error(f"--lora-plus raises the rate of B, which --form {args.form} does not train")
    if args.init == "loftq" and args.quantize not in ("nf4", "int8"):
        parser.error("--init loftq starts at the error of --quantize nf4 or int8: give one of them")
    if args.init == "loftq" and args.scan:
        parser.error("--init loftq reads the weights one by one: leave --scan out")
    if args.init in RESIDUAL and args.quantize is not None:
        parser.error(f"--init {args.init} changes the base, and --quantize stores it: use loftq")
    if args.plan and args.quantize == "keep":
        parser.error("--plan reads no weights, and --quantize keep depends on them: give nf4, int8")


def check_purpose(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if the flags ask for things that exclude each other."""
    if args.batch % args.accumulate:
        parser.error(f"--batch {args.batch} is not a multiple of --accumulate {args.accumulate}")
    if args.patience is not None and args.eval_every is None:
        parser.error("--patience counts the evaluations of --eval-every: give both")
    if args.resume and args.overwrite:
        parser.error("--resume continues the run that --overwrite removes: give one of them")
    unfit = [name for name in UNSWEPT if getattr(args, name)]
    unfit += ["accumulate"] if args.accumulate > 1 else []
    if args.sweep and unfit:
        flag = unfit[0].replace("_", "-")
        parser.error(f"--sweep finds a learning rate and does no more: leave --{flag} out")
    exports = {args.export_peft, args.export_gguf, args.merge} != {None}
    if args.generate is not None and (args.resume or exports):
        parser.error("--generate trains nothing: leave --resume and all exports out")


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


def seed(text: str) -> int:
    """An argparse type: an integer from 0 to 2^32 - 1, of which JAX makes different keys."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to {2**32 - 1}")
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
