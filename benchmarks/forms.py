"""Which form should an adapted product take? jlora's choice against fixed forms, over a grid.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/forms.py [--rounds 9] [--json FILE]

One product y = x W + (x A)(s B) with the gradients of x, A and B, over tokens x (in, out) x rank.
`limit` is the frozen product with the gradient of x. The fixed forms: `tokens` (batch and time
separate, by autodiff), `flat` (tokens merged, by autodiff), `rank first` (A's gradient computed as
dzᵀ x, enforced by a barrier), `terms` (z B as a sum with one term per rank), `dense` (x W', where
W' = W + s A B is built in the forward and the backward pass; A's and B's gradients are factored).
Runs are interleaved, and a ratio is the median over the rounds.

jlora merges the tokens. With more tokens than ranks it computes A's gradient rank first, with the
scaling in place of the barrier (a batched barrier makes jaxlib 0.10.2's CPU compiler abort). Up to
rank 8 it writes z B as a sum of terms.

The placement of a program's buffers in memory is random and costs several percent with 4 KiB pages,
less with the huge pages that the variable requests. So each form is compiled three times and its
figure is the fastest. The summary compares jlora with the best factored form of each cell, and the
three copies of each form with one another. It also counts the cells where `dense` wins; jlora never
chooses it, because it builds W + s A B in `merge` only.
"""

import argparse
import itertools
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
from blocks import product
from jax import lax
from measure import ratio, surroundings, take_turns, write_json

import jlora

BATCH, TOKENS, RANKS = 4, (32, 128, 512, 2048), (4, 8, 16, 64)
COPIES = 3
SHAPES = ((576, 192), (576, 576), (576, 1536), (1536, 576))


def flattened(form):
    def run(x, w, a, b):
        return form(x.reshape(-1, x.shape[-1]), w, a, b).reshape(*x.shape[:-1], -1)

    return run


def in_terms(z, b):
    return sum(z[:, n : n + 1] * b[n : n + 1] for n in range(len(b)))


def by_hand(weight, last=product):
    """A product with its own gradient, rank first: factored, or through `weight(w, a, b)`."""

    @jax.custom_vjp
    def run(x, w, a, b):
        return forward(x, w, a, b)[0]

    def forward(x, w, a, b):
        z = product(x, a)
        y = product(x, weight(w, a, b)) if weight else product(x, w) + last(z, b)
        return y, (x, w, a, b, None if weight else z)

    def backward(saved, g):
        x, w, a, b, z = saved
        z, dz = product(x, a) if z is None else z, product(g, b.T)
        dx = product(g, weight(w, a, b).T) if weight else product(g, w.T) + product(dz, a.T)
        da = lax.optimization_barrier(product(dz.T, x)).T
        return dx, jnp.zeros_like(w), da, product(z.T, g)

    run.defvjp(forward, backward)
    return run


def factored(x, w, a, b):
    return product(x, w) + product(product(x, a), b)


def by_jlora(x, w, a, b, s):
    return jlora.lora(product)(x, jlora.LoraArray(w, a, b, s, "io"))


def scaled(form):
    return lambda x, w, a, b, s: form(x, w, a, s * b)


FORMS = {
    "jlora": by_jlora,
    "tokens": scaled(factored),
    "flat": scaled(flattened(factored)),
    "rank first": scaled(flattened(by_hand(None))),
    "terms": scaled(flattened(by_hand(None, in_terms))),
    "dense": scaled(flattened(by_hand(lambda w, a, b: w + product(a, b)))),
}


def programs(tokens, shape, rank):
    """Return each form's compiled forward and gradient, and their arguments."""
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((BATCH, tokens // BATCH, shape[0]), shape, (shape[0], rank), (rank, shape[1]))
    x, w, a, b = (jax.random.normal(k, s) for k, s in zip(keys, sizes, strict=False))
    g = jax.random.normal(keys[4], (*x.shape[:2], shape[1]))

    def of(form):
        def run(x, w, a, b, s, g):
            y, pull = jax.vjp(lambda x, a, b: form(x, w, a, b, s), x, a, b)
            return y, pull(g)

        return run

    def limit(x, w, a, b, s, g):
        y, pull = jax.vjp(lambda x: product(x, w), x)
        return y, pull(g)

    runs = {"limit": limit} | {name: of(form) for name, form in FORMS.items()}
    args = (x, w, a, b, jnp.ones(()), g)
    return {name: jax.jit(run).lower(*args).compile() for name, run in runs.items()}, args


def repeats(tokens, shape):
    """Return how often a program runs per turn, so that a turn is long enough to time."""
    return max(1, round(8e9 / (tokens * shape[0] * shape[1] * 4)))


def cell(tokens, shape, rank, rounds):
    """Return each form's time over the limit's, for each compiled copy."""
    times = repeats(tokens, shape)

    def repeated(run, args):
        return lambda: [jax.block_until_ready(run(*args)) for _ in range(times)]

    runs = {}
    for k in range(COPIES):
        compiled, args = programs(tokens, shape, rank)
        runs |= {(name, k): repeated(run, args) for name, run in compiled.items()}
    seconds = take_turns(runs, rounds)
    limits = [seconds["limit", k] for k in range(COPIES)]
    limit = min(limits, key=median)
    return {name: [ratio(seconds[name, k], limit) for k in range(COPIES)] for name in FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    around, rows = surroundings(), []
    print(f"{args.rounds} rounds, {around}; times over the limit's")
    print("tokens       shape rank  " + "  ".join(f"{name:>10}" for name in FORMS))
    for tokens, shape, rank in itertools.product(TOKENS, SHAPES, RANKS):
        copies = cell(tokens, shape, rank, args.rounds)
        ratios = {name: min(of) for name, of in copies.items()}
        apart = {name: max(of) / min(of) for name, of in copies.items()}
        of = {"tokens": tokens, "shape": shape, "rank": rank}
        rows.append({**of, "ratios": ratios, "apart": apart})
        what = f"{tokens:6} {shape[0]:5}x{shape[1]:5} {rank:4}  "
        print(what + "  ".join(f"{r:10.3f}" for r in ratios.values()), flush=True)
    fixed = [name for name in FORMS if name not in ("jlora", "dense")]
    behind = [r["ratios"]["jlora"] / min(r["ratios"][f] for f in fixed) for r in rows]
    noise = [apart for r in rows for apart in r["apart"].values()]
    found = {
        name: {"median": median(of), "worst": max(of), "above_5_percent": sum(x > 1.05 for x in of)}
        for name, of in (
            ("jlora over the best factored form", behind),
            ("one form, slowest copy over fastest", noise),
        )
    }
    dense = sum(r["ratios"]["dense"] < 0.95 * r["ratios"]["jlora"] for r in rows)
    for name, of in found.items():
        print(
            f"{name}: {of['median']:.3f} in the median, {of['worst']:.3f} at worst, "
            f"more than 1.05 in {of['above_5_percent']}"
        )
    print(f"cells of {len(rows)} where `dense` wins by more than 5 %: {dense}")
    if args.json:
        result = {**around, "rounds": args.rounds, "rows": rows}
        write_json(args.json, {**result, **found, "dense_wins": dense})


if __name__ == "__main__":
    main()
