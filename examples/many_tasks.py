"""Serve many tasks from one base: every request names an adapter, and a batch mixes tasks.

    python examples/many_tasks.py                    # SmolLM2-135M, eight adapters in four slots
    python examples/many_tasks.py --layers 4 --requests 8

Requests are answered in the order of arrival, a batch at a time, by greedy decoding with a cache.
A bank holds as many adapters as a batch may name; an adapter that is not in it replaces one that
the batch does not need, and nothing recompiles. Tokens per second are compared with the base alone
in the same batches, and with one request at a time, switching the adapter.

This is a demonstration. In production, export the adapters with `jlora.peft.save`, and serve them
with vLLM or llama.cpp, which have paged caches and continuous batching. The adapters here are
random: small and distinct, not trained.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
import weights
from evaluation import make_apply
from flags import positive

import jlora

Request = tuple[int, list[int]]  # the number of the adapter, the prompt's tokens
PROMPTS = ("The capital of France is", "Once upon a time", "The best way to learn is", "Water")
CACHE = {"layers": 0, "positions": 0, "segments": 0, "slot": None}  # the axes of the requests


def make_adapters(base: Any, count: int, rank: int = 8) -> list[Any]:
    """Random adapters on every projection."""
    rules = {r".*_proj/kernel": jlora.LoraSpec(rank)}
    adapter = jlora.detach(jlora.attach(base, rules, key=jax.random.key(0)))[1]

    def of(n: int) -> Any:
        trainable, frozen = jlora.partition(adapter)
        draw = np.random.default_rng(n)
        noise = lambda x: jnp.asarray(draw.normal(size=x.shape, scale=0.02), x.dtype)
        return jlora.combine(jax.tree.map(noise, trainable), frozen)

    return [of(n) for n in range(count)]


class Slots:
    """Which adapter is in which slot of the bank."""

    def __init__(self, adapters: Sequence[Any], slots: int) -> None:
        self.adapters = adapters
        self.bank = jlora.bank.stack(adapters[:slots])
        self.resident = list(range(slots))
        self.replaced = 0

    def of(self, tasks: Sequence[int]) -> tuple[jlora.bank.Bank, np.ndarray]:
        """Return the bank and the slots of these tasks, after putting in those that are missing."""
        for task in dict.fromkeys(tasks):
            if task not in self.resident:
                slot = next(k for k, x in enumerate(self.resident) if x not in tasks)
                self.bank = jlora.bank.put(self.bank, slot, self.adapters[task])
                self.resident[slot] = task
                self.replaced += 1
        return self.bank, np.array([self.resident.index(task) for task in tasks], np.int32)


def banked(config: llama.Config) -> Callable[..., Any]:
    """The model as `llama.generate` takes it, whose params are (base, bank, ids)."""
    plain = make_apply(config)

    def apply(params: Any, tokens: Any, positions: Any, segments: Any, cache: Any, at: Any) -> Any:
        base, bank, ids = params
        at = at % tokens.shape[1]  # in each request's own tokens
        return jlora.bank.each(
            plain, base, bank, ids, tokens, positions, segments, cache, at,
            in_axes=(0, 0, 0, CACHE, 0), out_axes=(0, CACHE),
        )  # fmt: skip

    return apply


def batches(requests: Sequence[Request], size: int) -> Iterator[tuple[list[int], Any, Any]]:
    """Yield tasks, tokens and segments, (size, T); the last batch repeats its last request."""
    longest = max(len(tokens) for _, tokens in requests)
    for n in range(0, len(requests), size):
        group = [*requests[n : n + size]]
        group += [group[-1]] * (size - len(group))
        rows = np.zeros((2, size, longest), np.int32)
        for k, (_, tokens) in enumerate(group):
            rows[:, k, : len(tokens)] = tokens, np.ones(len(tokens))
        yield [task for task, _ in group], *rows


def serve(
    requests: Sequence[Request], size: int, answer: Callable[..., jax.Array], params: Callable
) -> tuple[list[list[int]], float]:
    """Answer all requests in batches of `size`; return the answers, and the seconds that it took.

    `params(tasks)` returns what `answer` needs for these tasks.
    """
    said: list[list[int]] = []
    start = time.perf_counter()
    for tasks, tokens, segments in batches(requests, size):
        said += np.asarray(answer(params(tasks), tokens, segments)).tolist()
    return said[: len(requests)], time.perf_counter() - start


def compare(
    config: llama.Config, base: Any, stop: int, requests: Sequence[Request], slots: int, steps: int
) -> dict[str, tuple[list[list[int]], float]]:
    """Serve the requests in three ways; return the answers and the seconds of each."""
    adapters = make_adapters(base, 1 + max(task for task, _ in requests))
    resident = Slots(adapters, min(slots, len(adapters)))
    generate = functools.partial(llama.generate, steps=steps, stop=stop)
    plain, adapted = make_apply(config), jlora.lora(make_apply(config))
    # For each: the model, the size of a batch, and the parameters for the tasks of a batch.
    ways: dict[str, tuple[Any, int, Callable[[list[int]], Any]]] = {
        "mixed": (banked(config), slots, lambda t: (base, *resident.of(t))),
        "base": (plain, slots, lambda t: base),
        "switching": (adapted, 1, lambda t: jlora.bind(base, adapters[t[0]])),
    }
    found = {}
    for name, (apply, size, params) in ways.items():
        answer = jax.jit(functools.partial(generate, apply, config))
        serve(requests[:size], size, answer, params)  # compiles
        found[name] = serve(requests, size, answer, params)
    print(f"{resident.replaced} adapters were put into slots while it ran")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as in finetune.py")
    add("--layers", type=positive, help="only the first layers")
    add("--adapters", type=positive, default=8)
    add("--slots", type=positive, default=4, help="of the bank, and requests in a batch")
    add("--requests", type=positive, default=32)
    add("--tokens", type=positive, default=24, help="to generate for each request")
    args = parser.parse_args(argv)
    config, base, tokenizer, stop = weights.load(args.model, args.layers)
    draw = np.random.default_rng(0)
    requests = [
        (int(draw.integers(args.adapters)), tokenizer.encode(PROMPTS[n % len(PROMPTS)]).ids)
        for n in range(args.requests)
    ]
    found = compare(config, base, stop, requests, args.slots, args.tokens)
    for (task, tokens), said in [*zip(requests, found["mixed"][0], strict=True)][:8]:
        print(f"adapter {task}: {tokenizer.decode([*tokens, *said])!r}")
    for name, (said, seconds) in found.items():
        count = sum(token != stop for row in said for token in row)
        print(f"{name:9} {count / seconds:7.1f} tokens/s ({count} tokens in {seconds:.2f} s)")
    same = found["mixed"][0] == found["switching"][0]
    print(f"mixed and switching give the same answers: {same}")


if __name__ == "__main__":
    sys.exit(main())
