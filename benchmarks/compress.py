"""What does `arithmetic.compress` save over an SVD of the dense update, and is it as near?

    python benchmarks/compress.py [--rounds 3] [--size 4096] [--rank 64] [--to 16] [--json FILE]

One update of SIZE x SIZE and of rank RANK, float32, is truncated to rank TO: from the factors, and
by the SVD of s·A·B, by NumPy's LAPACK. The error is ‖near - s·A·B‖ / ‖s·A·B‖ in float64. Runs take
turns.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measure import ratio, surroundings, take_turns, write_json

from jlora import LoraArray
from jlora.arithmetic import compress

Factors = tuple[np.ndarray, np.ndarray]


def adapter(size: int, rank: int) -> LoraArray:
    """An update whose singular values fall, as those of trained ones do."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(size, rank)), draw.normal(size=(rank, size))
    parts = (a * 0.9 ** np.arange(rank), b, 0.5)
    return LoraArray(None, *(jax.numpy.asarray(x, jax.numpy.float32) for x in parts), "io")


def update(node: LoraArray, dtype: Any) -> np.ndarray:
    a, b, s = (np.asarray(x, dtype) for x in (node.lora_a, node.lora_b, node.scaling))
    return s * (a @ b)


def truncations(node: LoraArray, to: int) -> dict[str, Callable[[], Factors]]:
    """The truncation from the factors, and from the dense update."""

    def factored() -> Factors:
        near = compress({"w": node}, rank=to)[0]["w"]
        return np.asarray(near.lora_a * near.scaling), np.asarray(near.lora_b)

    def dense() -> Factors:
        u, s, vt = np.linalg.svd(update(node, np.float32), full_matrices=False)
        return u[:, :to] * s[:to], vt[:to]

    return {"factored": factored, "dense": dense}


def error(found: Factors, node: LoraArray) -> float:
    """The distance of `a b` from the update, relative to it."""
    a, b = (x.astype(np.float64) for x in found)
    want = update(node, np.float64)
    return float(np.linalg.norm(a @ b - want) / np.linalg.norm(want))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    around, node = surroundings(), adapter(args.size, args.rank)
    runs = truncations(node, args.to)
    seconds = take_turns(runs, args.rounds)
    times = ratio(seconds["dense"], seconds["factored"])
    errors = {name: error(run(), node) for name, run in runs.items()}
    print(f"dense / factored: {times:.1f} x the time")
    print("relative errors:", ", ".join(f"{name} {x:.8f}" for name, x in errors.items()))
    if args.json:
        sizes = {"size": args.size, "rank": args.rank, "to": args.to}
        write_json(args.json, {**around, **sizes, "seconds": seconds, "errors": errors})


if __name__ == "__main__":
    main()
