"""How close is a training step to its limit, the frozen forward and the gradient of its input?

    python benchmarks/step.py [--rounds 15] [--json FILE]

Six decoder blocks of SmolLM2-135M's shapes, batch 4 x 128 tokens, rank 8 on all 7 projections,
float32. Every variant runs once a round, in turn; each ratio is a median over the rounds, so the
machine's drift cancels. Expected: `jlora` near 1.1, `naive` near 1.6.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

import jlora

BLOCKS, WIDTH, MLP, HEADS, KV_HEADS, BATCH, TIME, RANK = 6, 576, 1536, 9, 3, 4, 128, 8
KV = WIDTH // HEADS * KV_HEADS
SHAPES = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, KV),
    "v": (WIDTH, KV),
    "o": (WIDTH, WIDTH),
    "gate": (WIDTH, MLP),
    "up": (WIDTH, MLP),
    "down": (MLP, WIDTH),
}


def product(x, w):
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def naive_product(x, node):
    if not isinstance(node, jlora.LoraArray):
        return product(x, node)
    return product(x, node.base) + product(product(x, node.lora_a), node.lora_b) * node.scaling


def block(p, x, mul):
    def norm(x):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    h = norm(x)
    split = (BATCH, TIME, KV_HEADS, -1, WIDTH // HEADS)
    q = mul(h, p["q"]).reshape(split)
    k, v = (mul(h, p[n]).reshape(BATCH, TIME, KV_HEADS, -1) for n in "kv")
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / 8
    scores = jnp.where(jnp.tril(jnp.ones((TIME, TIME), bool)), scores, -1e30)
    mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
    x = x + mul(mixed.reshape(BATCH, TIME, WIDTH), p["o"])
    h = norm(x)
    return x + mul(jax.nn.silu(mul(h, p["gate"])) * mul(h, p["up"]), p["down"])


def loss(params, x, mul=product):
    for p in params:
        x = block(p, x, mul)
    return jnp.mean(x * x)


def variants(params, x):
    """Return, per variant, a jitted gradient and its arguments."""
    base, _ = jlora.detach(params)
    trainable, frozen = jlora.partition(params)
    adapted = jlora.lora(loss, fallback="error")

    def of(fn):
        def value(t, x, frozen):
            return fn(jlora.combine(t, frozen), x)

        # The input's gradient too: in a model there are layers below.
        return jax.jit(jax.grad(value, argnums=(0, 1)))

    return {
        "limit": (jax.jit(jax.grad(loss, argnums=1)), (base, x)),
        "jlora": (of(adapted), (trainable, x, frozen)),
        "naive": (of(lambda p, x: loss(p, x, naive_product)), (trainable, x, frozen)),
        "merged": (of(lambda p, x: loss(jlora.merge(p), x)), (trainable, x, frozen)),
        "full": (jax.jit(jax.grad(loss, argnums=(0, 1))), (base, x)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keys = iter(jax.random.split(jax.random.key(0), BLOCKS * len(SHAPES) + 1))
    base = [
        {n: jax.random.normal(next(keys), s) / s[0] ** 0.5 for n, s in SHAPES.items()}
        for _ in range(BLOCKS)
    ]
    x = jax.random.normal(next(keys), (BATCH, TIME, WIDTH))
    params = jlora.attach(base, {".*": jlora.LoraSpec(RANK)}, key=jax.random.key(1))
    compiled = {name: (fn.lower(*a).compile(), a) for name, (fn, a) in variants(params, x).items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for n in range(args.rounds + 1):
        for name, (fn, a) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*a))
            if n:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    rows = {
        name: {
            "ratio": statistics.median(
                s / limit for s, limit in zip(seconds[name], seconds["limit"], strict=True)
            ),
            "seconds": statistics.median(seconds[name]),
            "temp_bytes": fn.memory_analysis().temp_size_in_bytes,
            "flops": fn.cost_analysis()["flops"],
        }
        for name, (fn, _) in compiled.items()
    }
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.rounds} rounds")
    for name, row in rows.items():
        print(
            f"{name:8} {row['ratio']:5.2f} x limit  {row['seconds']:6.3f} s  "
            f"temp {row['temp_bytes'] / 1e6:6.0f} MB  {row['flops'] / 1e9:6.1f} GFLOP"
        )
    if args.json:
        result = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "variants": rows}
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
