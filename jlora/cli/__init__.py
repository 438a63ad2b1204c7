"""The command line, `jlora VERB ...` or `python -m jlora VERB ...`: one file a verb.

    jlora merge BASE ADAPTER [ADAPTER=0.3 ...] OUT      merge into a checkpoint, streamed
    jlora combine A=0.7 B=0.3 OUT --method add           one adapter of several
    jlora resize ADAPTER OUT --rank 8                    lower ranks
    jlora inspect ADAPTER --base BASE                    norms, spectra, intruder dimensions
    jlora extract BASE TUNED OUT --rank 16               an adapter from two checkpoints
    jlora check ADAPTER --base BASE --for vllm           is every key known, and who takes it?
    jlora convert ADAPTER OUT --to gguf --base BASE      from and to GGUF, MLX, kohya, diffusers
    jlora quantize BASE OUT --format nf4                 or int8, or q4_1 of a GGUF model

The verbs work on Hugging Face checkpoints and PEFT folders by the names in the files; no model is
built. Exit status: 0 if every key of every adapter was used, 2 with one paragraph otherwise.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = ("merge", "extract", "combine", "resize", "inspect", "check", "convert", "quantize")

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: the words after `jlora`; by default those of the process.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.

    Example:
        >>> main(["merge", "no_base", "no_adapter", "out"])
        2
    """
    try:
        verbs = {name: import_module(f"jlora.cli.{name}") for name in VERBS}
    except ModuleNotFoundError as error:
        print(f"error: `jlora` needs {error.name}: `pip install 'jlora[peft]'`.", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser("jlora", description=(__doc__ or "").partition("\n")[0])
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in verbs.items():
        verb.add_arguments(parsers.add_parser(name, help=verb.HELP, description=verb.__doc__))
    args = parser.parse_args(arguments)
    try:
        verbs[args.verb].run(args)
    except (ValueError, TypeError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0
