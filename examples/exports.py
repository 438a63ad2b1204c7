"""What leaves a run for other programs: PEFT files with a card, a GGUF adapter, a merged model."""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import placing
import weights
from card import write_card
from evaluation import Job
from merged import write_merged

import jlora.cli
from jlora import peft


def check_export(args: argparse.Namespace, job: Job) -> None:
    """Raise before training if llama.cpp's format has no place for this adapter."""
    if args.export_gguf is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        save_gguf(args, job, job.params, Path(scratch) / "adapter.gguf")


def export(args: argparse.Namespace, job: Job, params: Any, found: dict[str, Any]) -> None:
    """Write what the flags ask for; `found` is the report of the run."""
    source = weights.path_of(args.model)
    if args.export_peft is not None:
        save_peft(args, args.export_peft, params)
        if placing.is_first():
            write_card(args.export_peft, source, found)
        print(f"exported to {args.export_peft}")
    if args.export_gguf is not None:
        save_gguf(args, job, params, args.export_gguf)
        print(f"exported to {args.export_gguf}")
    if args.merge is not None:
        write_merged(args.merge, source, job.config, params)
        print(f"merged into {args.merge}")


def save_peft(args: argparse.Namespace, folder: Path, params: Any) -> None:
    entries = {"base_model_name_or_path": args.model, "task_type": "CAUSAL_LM"}
    peft.save(folder, params, names=peft.llama_names, **entries)


def save_gguf(args: argparse.Namespace, job: Job, params: Any, file: Path) -> None:
    """Write the adapter for llama.cpp, by `jlora convert --to gguf`, which uses jlora.gguf.save."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, config = Path(scratch) / "adapter", Path(scratch) / "config.json"
        save_peft(args, folder, params)
        if not placing.is_first():
            return
        config.write_text(json.dumps(config_of(job, weights.path_of(args.model))))
        file.parent.mkdir(parents=True, exist_ok=True)
        command = ["convert", str(folder), str(file), "--to", "gguf", "--overwrite"]
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = jlora.cli.main([*command, "--base", str(config)])
        if status:
            why = said.getvalue().removeprefix("error: ").strip()
            raise OSError(f"`--export-gguf {args.export_gguf}`: {why}")


def config_of(job: Job, source: Path) -> dict[str, Any]:
    """The config.json of the base; for a GGUF file, what its export needs of one."""
    if source.is_dir():
        return json.loads((source / "config.json").read_text(encoding="utf-8"))
    from gguf_file import open_gguf

    kind = open_gguf(source)[0]["general.architecture"]
    return {
        "model_type": {"gemma3": "gemma3_text"}.get(kind, kind),
        "num_hidden_layers": job.config.layers,
        "num_attention_heads": job.config.heads,
        "num_key_value_heads": job.config.kv_heads,
        "tie_word_embeddings": job.config.tied,
    }
