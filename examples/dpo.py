"""Direct preference optimization: teach a model which of two answers is preferred.

    python examples/dpo.py                          # SmolLM2-135M learns to write numbers as words
    python examples/dpo.py --smoke                  # the same path: a few layers and steps
    python examples/dpo.py --data pairs.jsonl --beta 0.2 --out runs/preferences

`--data` takes .jsonl lines of {"prompt": ..., "chosen": ..., "rejected": ...}. The reference is the
same base without the adapter, so there is no second model:

    loss = -log sigmoid(beta ((log p(c) - log p_base(c)) - (log p(r) - log p_base(r))))

Rafailov et al. 2023, arXiv:2305.18290, equation 7. All else is the job of finetune.py: its flags,
states, reports and exports. `--batch` counts pairs. The margin, the argument of the sigmoid, and
the share of pairs in which it is above 0 are measured on held-out pairs.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import begin
import data
import finetune
import jax
import jax.numpy as jnp
import numpy as np
from data import Example
from evaluation import SHOWN, Apply, Job
from llama import cross_entropy
from records import check_file, decoded
from training import Batch

import jlora

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES = (ONES + " fifteen sixteen seventeen eighteen nineteen").split()
TENS = ["", "", "twenty", "thirty", "forty"]


class Pair(NamedTuple):
    """Two answers to a prompt."""

    chosen: Example
    rejected: Example


def made() -> list[tuple[str, str, str]]:
    """Sums of two numbers up to 20: the sum in words is preferred to digits."""
    ask = "Question: What is {} + {}?\nAnswer:"
    numbers = itertools.product(range(1, 21), repeat=2)
    return [(ask.format(a, b), f" {words(a + b)}", f" {a + b}") for a, b in numbers]


def words(n: int) -> str:
    """A number below 50 in words."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def read(paths: Sequence[str]) -> list[tuple[str, str, str]]:
    """Prompts with their chosen and rejected answers; errors name the line."""
    found = []
    for path in map(Path, paths):
        check_file(path)
        for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
            line = decoded(path, raw)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                texts = [record[key] for key in ("prompt", "chosen", "rejected")]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                texts = [error]
            if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"`--data {path}`: line {number} lacks a string for `prompt`, `chosen` or "
                    '`rejected`. Write a line as {"prompt": "2 + 2 =", "chosen": " 4", "rejected": '
                    '" 5"}.'
                )
            if not texts[1] or not texts[2] or texts[1] == texts[2]:
                raise ValueError(
                    f"`--data {path}`: the answers of line {number} are the same, or one is empty."
                )
            found.append((texts[0], texts[1], texts[2]))
    return found


# -------------------------------------------------------------------------------------------- loss


def log_probabilities(apply: Apply, params: Any, batch: Batch) -> jax.Array:
    """The log-probability of the answer in each row, (R,)."""
    inputs = (batch["tokens"], batch["positions"], batch["segments"], None, batch["at"])
    each = -cross_entropy(apply(params, *inputs), batch["target"]) * batch["weight"]  # (N,)
    rows, length = batch["tokens"].shape
    return jnp.zeros(rows, each.dtype).at[batch["at"] // length].add(each)


def margins(apply: Apply, beta: float, params: Any, batch: Batch) -> jax.Array:
    """beta times how much more than the base the model prefers each chosen answer, (pairs,).

    The first half of the rows is chosen, the second half rejected.
    """
    base, _ = jlora.detach(params)
    gain = log_probabilities(apply, params, batch)
    gain -= jax.lax.stop_gradient(log_probabilities(apply, base, batch))
    chosen, rejected = jnp.split(gain, 2)
    return beta * (chosen - rejected)


def make_loss(beta: float) -> Callable[[Apply], Callable[[Any, Batch], jax.Array]]:
    """The mean of -log sigmoid(margin) over the pairs, as a function of the adapted model."""

    def of(apply: Apply) -> Callable[[Any, Batch], jax.Array]:
        return lambda params, batch: -jax.nn.log_sigmoid(margins(apply, beta, params, batch)).mean()

    return of


def make_measures(beta: float) -> Callable[[Apply], Callable[[Any, Batch], dict[str, jax.Array]]]:
    """The mean margin, and the share of pairs in which it is above 0."""

    def of(apply: Apply) -> Callable[[Any, Batch], dict[str, jax.Array]]:
        def measure(params: Any, batch: Batch) -> dict[str, jax.Array]:
            found = margins(apply, beta, params, batch)
            return {"margin": found.mean(), "accuracy": (found > 0).mean()}

        return measure

    return of


# --------------------------------------------------------------------------------------------- job


def pairs_of(args: argparse.Namespace, tokenizer: Any, stop: int, context: int) -> list[Pair]:
    """The pairs as tokens; those that are longer than a row are dropped, and counted."""
    texts = made() if args.data is None else read(args.data)
    answers = [
        data.encode([(text[0], text[which]) for text in texts], tokenizer, stop) for which in (1, 2)
    ]
    found = [Pair(*pair) for pair in zip(*answers, strict=True)]
    limit = args.length or context
    kept = [pair for pair in found if max(len(e.tokens) for e in pair) <= limit]
    longest = max((len(e.tokens) for pair in kept for e in pair), default=0)
    dropped = len(found) - len(kept)
    print(
        f"data: {len(kept)} pairs; the longest answer with its prompt has {longest} tokens; "
        f"{dropped} pairs are dropped, since one has more than {limit}"
    )
    if len(kept) < 2 * args.batch:
        raise ValueError(
            f"`--data`: there are {len(kept)} pairs, and two batches of {args.batch} are needed, "
            "one of them to hold out. Give more, or a smaller --batch."
        )
    return kept


def prepare(args: argparse.Namespace) -> Job:
    """Load, attach, and make batches of pairs."""
    config, base, tokenizer, stop = begin.load_model(args)
    params = begin.adapt(args, base)
    pairs = pairs_of(args, tokenizer, stop, config.context)
    order = np.random.default_rng(0).permutation(len(pairs))  # whatever the seed
    cut = max(1, min(64, len(pairs) // 10) // args.batch) * args.batch
    held_out, train = ([pairs[i] for i in part] for part in (order[:cut], order[cut:]))
    longest = max(len(e.tokens) for pair in pairs for e in pair)
    length = args.length or -(-longest // 16) * 16
    taken = itertools.islice(data.shuffled(train, args.seed), args.steps * args.batch)
    flat = lambda some: [example for pair in some for example in pair]
    return Job(
        config=config,
        params=params,
        tokenizer=tokenizer,
        stop=stop,
        dataset=data.Dataset(flat(train), flat(held_out), False, length),
        batches=data.Listed(batches(list(taken), length, args.batch)),
        held_out=batches(held_out, length, args.batch),
        prompts=[pair.chosen for pair in held_out[:SHOWN]],
        loss=make_loss(args.beta),
        measures=make_measures(args.beta),
    )


def batches(pairs: Sequence[Pair], length: int, size: int) -> list[Batch]:
    """Batches of `size` pairs, each answer in a row of its own: first those chosen."""
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    rows = [[e] for group in groups for part in zip(*group, strict=True) for e in part]
    return data.batches(data.fill(rows, length), 2 * size)


if __name__ == "__main__":
    sys.exit(finetune.main(None, __doc__, prepare))
