"""The command line, `jlora VERB ...` or `python -m jlora VERB ...`: one file a verb.

    jlora merge BASE ADAPTER [ADAPTER=0.3 ...] OUT

The verbs work on Hugging Face checkpoints and PEFT folders by the names in the files; no model is
built. Exit status: 0 if every key of every adapter was used, 2 with one paragraph otherwise.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jlora.cli import merge

VERBS: dict[str, Any] = {"merge": merge}

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
    parser = argparse.ArgumentParser("jlora", description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.HELP, description=verb.__doc__))
    args = parser.parse_args(arguments)
    try:
        VERBS[args.verb].run(args)
    except (ValueError, TypeError, KeyError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0
