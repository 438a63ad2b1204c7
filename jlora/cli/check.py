"""`jlora check ADAPTER [--base BASE] [--for vllm|llama.cpp]`: is every key known, who takes it?"""

import argparse
from pathlib import Path
from typing import Any

from jlora.cli._adapter import Adapter, changes_of, open_adapter
from jlora.cli._changes import describe
from jlora.cli._checkpoint import open_checkpoint
from jlora.cli._folder import ranks_of, tree_of
from jlora.cli._output import report

HELP = "check a PEFT folder, against a checkpoint and for a program"
_MOST = 16  # vLLM's default of max_lora_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", type=Path, help="a PEFT folder")
    parser.add_argument("--base", type=Path, help="the checkpoint that it adapts")
    parser.add_argument("--for", dest="program", choices=["vllm", "llama.cpp"])
    parser.add_argument("--max-lora-rank", type=int, default=_MOST, help="vLLM's own option")
    parser.add_argument("--json", action="store_true", help="report as JSON")


def run(args: argparse.Namespace) -> None:
    """Check."""
    call = "jlora check ADAPTER"
    adapter = open_adapter(args.adapter, call)
    said: dict[str, Any] = {"adapter": str(args.adapter), "keys": len(adapter.tensors)}
    tied: list[str] = []
    if args.base is not None:
        changes, places = changes_of(adapter, 1.0, open_checkpoint(args.base, call), call)
        tied = [name for name, source in places.added.items() if source is not None]
        said |= {"base": str(args.base), "changes": describe(changes)}
    elif not adapter.config.target_parameters and not adapter.config.trainable_token_indices:
        tree, _ = tree_of(adapter, call)
        said |= {"weights": len(tree), "ranks": ranks_of(tree)}
    if args.program is not None:
        found = problems(adapter, args.program, args.max_lora_rank)
        if tied and args.program == "llama.cpp":
            found.append(f"{tied[0]} is the embedding in this model (merge it, `jlora merge`)")
        if found:
            raise ValueError(f"`{call}`: {args.program} does not take it: {'; '.join(found)}.")
        said["for"] = f"{args.program}: nothing found that it does not take"
    report(said, args.json)


def problems(adapter: Adapter, program: str, most: int) -> list[str]:
    """Return what a program does not take, and what to do about it."""
    config = adapter.config
    found = []
    if config.form != "lora":
        found.append(f"peft_type {adapter.said.get('peft_type')!r} is not LoRA (convert it)")
    if config.use_dora:
        found.append("DoRA has no form there (merge it, `jlora merge`)")
    if config.lora_bias:
        found.append("biases of lora_B have no form there (merge it)")
    if config.modules_to_save:
        found.append(f"whole tensors, modules_to_save={sorted(config.modules_to_save)} (merge it)")
    if config.trainable_token_indices:
        found.append("trained rows of an embedding (merge it)")
    ranks = [config.r, *config.rank_pattern.values()]
    if program == "vllm":
        if max(ranks) > most:
            found.append(
                f"rank {max(ranks)} is above max_lora_rank {most} (start it with "
                f"`--max-lora-rank {max(ranks)}`, or `jlora resize ADAPTER OUT --rank {most}`)"
            )
        if config.alpha_pattern or config.rank_pattern:
            found.append(
                "rank_pattern and alpha_pattern are not read: one alpha / r scales all weights "
                "(`jlora convert ADAPTER OUT --to vllm` folds them into B)"
            )
    elif config.use_rslora or config.alpha_pattern:
        found.append(
            "one alpha scales all weights, by alpha / r (`jlora convert ADAPTER OUT --to gguf` "
            "folds rsLoRA and alpha_pattern into B)"
        )
    return found
