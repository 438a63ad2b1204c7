"""What do many adapters over one base cost? Serving and training from a bank, against the base.

    python benchmarks/bank.py [--rounds 20] [--only NAME ...] [--json FILE]

One product of 576 x 1536 and two decoder blocks of SmolLM2-135M's shapes, rank 8, float32. `bank`
is `jlora.bank.each`, whose examples use different adapters; `base` is the same program on plain
weights. `peft` is PEFT's mixed batch (`adapter_names=`) over PyTorch's base, with the same sizes.
Training: eight adapters, each with a batch of its own and Adam, together (`each` under `grad`, or
`lax.map` over the slots) and in eight separate steps. Runs take turns; a ratio is the median over
the rounds.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from measure import cores, ratio, surroundings, take_turns, write_json

import jlora

SIZES = blocks.PRESETS["smollm2"]._replace(blocks=2, batch=16, time=32)
SLOTS, FEW_SLOTS, TOKENS, TRAINED = 64, 16, 512, 8
Runs = dict[str, Callable[[], Any]]


def decoder(params: Any, x: jax.Array) -> jax.Array:
    for p in params:
        x = blocks.block(p, x, SIZES.head_dim, blocks.product)
    return x


def product(params: Any, x: jax.Array) -> jax.Array:
    return blocks.product(x, params["w"])


def banked(base: Any, slots: int) -> jlora.bank.Bank:
    """A bank of distinct adapters on every weight of the base."""
    spec = jlora.LoraSpec(SIZES.rank)
    one = jlora.detach(jlora.attach(base, {".*": spec}, key=jax.random.key(0)))[1]
    trainable, frozen = jlora.partition(jlora.bank.stack([one] * slots))
    draw = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(draw.normal(size=x.shape, scale=0.1), x.dtype)
    return jlora.combine(jax.tree.map(noise, trainable), frozen)


def model(name: str, batch: int, time: int) -> tuple[Callable[..., jax.Array], Any, jax.Array]:
    """The function, its base weights and its input."""
    base, x = blocks.weights(SIZES._replace(batch=batch, time=time))
    return (product, {"w": base[0]["gate"]}, x) if name == "product" else (decoder, base, x)


def timed(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    program = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def forward(name: str, batch: int, time: int, slots: int) -> Runs:
    fn, base, x = model(name, batch, time)
    ids = jnp.asarray(np.random.default_rng(0).integers(slots, size=batch))
    each = functools.partial(jlora.bank.each, fn)
    return {"base": timed(fn, base, x), "bank": timed(each, base, banked(base, slots), ids, x)}


def by_token(batch: int, time: int, slots: int) -> Runs:
    """One id for each token of a packed batch."""
    fn, base, x = model("product", batch, time)
    ids = jnp.asarray(np.random.default_rng(0).integers(slots, size=(batch, time)))
    each = functools.partial(jlora.bank.each, fn)
    return {"base": timed(fn, base, x), "bank": timed(each, base, banked(base, slots), ids, x)}


def gradient(name: str, batch: int, time: int, slots: int) -> Runs:
    """The gradient of the input, and with a bank also of all adapters."""
    fn, base, x = model(name, batch, time)
    ids = jnp.asarray(np.random.default_rng(0).integers(slots, size=batch))

    def of_base(x: jax.Array, base: Any) -> jax.Array:
        return jnp.mean(fn(base, x) ** 2)

    def of_bank(x: jax.Array, bank: Any, base: Any) -> jax.Array:
        return jnp.mean(jlora.bank.each(fn, base, bank, ids, x) ** 2)

    return {
        "base": timed(jax.grad(of_base), x, base),
        "bank": timed(jax.grad(of_bank, (0, 1)), x, banked(base, slots), base),
    }


def training(tokens: int) -> tuple[Runs, dict[str, float]]:
    """A step of eight adapters, together and one by one; and the temporary memory over one's."""
    base, _ = blocks.weights(SIZES)
    bank = banked(base, TRAINED)
    shape = (TRAINED, 1, tokens, SIZES.width)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    loss = functools.partial(blocks.loss, head_dim=SIZES.head_dim)
    solo, tx = jlora.freeze(optax.adam(1e-3)), jlora.bank.per_slot(optax.adam(1e-3))

    def step(one: Any, state: Any, x: jax.Array, base: Any) -> Any:
        f = lambda one: jlora.lora(loss)(jlora.bank.bind(base, one), x)
        updates, state = solo.update(jax.grad(f)(one), state, one)
        return optax.apply_updates(one, updates), state

    def together(bank: Any, state: Any, x: jax.Array, base: Any) -> Any:
        f = lambda bank: jlora.bank.each(loss, base, bank, jnp.arange(TRAINED), x[:, 0]).sum()
        updates, state = tx.update(jax.grad(f)(bank), state, bank)
        return optax.apply_updates(bank, updates), state

    def mapped(bank: Any, state: Any, x: jax.Array, base: Any) -> Any:
        return jax.lax.map(lambda t: step(*t, base), (bank, state, x))

    states = tx.init(bank)
    at = lambda tree, n: jax.tree.map(lambda leaf: leaf[n], tree)
    slots = [(at(bank, n), at(states, n), x[n]) for n in range(TRAINED)]
    one = jax.jit(step).lower(*slots[0], base).compile()
    programs = {
        name: jax.jit(fn).lower(bank, states, x, base).compile()
        for name, fn in (("each", together), ("map", mapped))
    }
    runs: Runs = {"separate": lambda: jax.block_until_ready([one(*t, base) for t in slots])}
    for name, program in programs.items():
        runs[name] = lambda program=program: jax.block_until_ready(program(bank, states, x, base))
    temp = lambda program: program.memory_analysis().temp_size_in_bytes
    return runs, {name: temp(program) / temp(one) for name, program in programs.items()}


def with_peft(batch: int, time: int, slots: int) -> Runs:
    """PEFT's mixed batch over the decoder, and PyTorch's base."""
    import peft
    import torch

    torch.set_num_threads(cores())
    sizes = SIZES._replace(batch=batch, time=time)
    plain = peers.torch_decoder(sizes).eval()
    config = peft.LoraConfig(
        r=sizes.rank, target_modules=list(sizes.shapes), init_lora_weights=False
    )
    mixed = peft.get_peft_model(peers.torch_decoder(sizes), config, adapter_name="0").eval()
    for n in range(1, slots):
        mixed.add_adapter(str(n), config)
    names = [str(n) for n in np.random.default_rng(0).integers(slots, size=batch)]
    x = torch.randn(batch, time, sizes.width)

    def of(run: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    return {"base": of(lambda: plain(x)), "peft": of(lambda: mixed(x, adapter_names=names))}


def cases() -> dict[str, Callable[[], Any]]:
    """What is measured, by name; the bars are those of the project."""
    b, t = SIZES.batch, SIZES.time
    found: dict[str, Callable[[], Any]] = {}
    for name in ("product", "decoder"):
        found[f"{name} forward, {b} x {t}, {SLOTS} slots"] = lambda name=name: forward(
            name, b, t, SLOTS
        )
        found[f"{name} gradient, {b} x {t}, {SLOTS} slots"] = lambda name=name: gradient(
            name, b, t, SLOTS
        )
        found[f"{name} forward, {TOKENS} x 1, {FEW_SLOTS} slots"] = lambda name=name: forward(
            name, TOKENS, 1, FEW_SLOTS
        )
    for slots in (FEW_SLOTS, SLOTS):
        found[f"product forward, an id per token, {b} x {t}, {slots} slots"] = lambda slots=slots: (
            by_token(b, t, slots)
        )
    found[f"decoder forward in PEFT, {b} x {t}, {SLOTS} slots"] = lambda: with_peft(b, t, SLOTS)
    for tokens in (8, TOKENS):
        found[f"training {TRAINED}, {tokens} tokens each"] = lambda tokens=tokens: training(tokens)
    return found


def measure(make: Callable[[], Any], rounds: int) -> dict[str, Any]:
    found = make()
    runs, memory = found if isinstance(found, tuple) else (found, {})
    seconds = take_turns(runs, rounds)
    first = next(iter(runs))
    return {
        name: {
            "ratio": ratio(mine, seconds[first]),
            "seconds": median(mine),
            **({"memory over one": memory[name]} if name in memory else {}),
        }
        for name, mine in seconds.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the cases' names")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    around, result = surroundings(), {}
    for case, make in cases().items():
        if not any(part in case for part in args.only):
            continue
        try:
            result[case] = measure(make, args.rounds)
        except ImportError as error:
            print(f"{case}: left out, {error}")
            continue
        for name, row in result[case].items():
            more = "".join(f"  {k} {row[k]:.2f}" for k in row if k not in ("ratio", "seconds"))
            print(f"{case:58} {name:9} {row['ratio']:5.2f}  {row['seconds'] * 1e3:8.2f} ms{more}")
    if args.json:
        write_json(args.json, {**around, "rounds": args.rounds, "cases": result})


if __name__ == "__main__":
    main()
