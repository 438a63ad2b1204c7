"""Flags for memory and time change neither the loss nor its gradient; the plan is what happens."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import begin
import data
import finetune
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import param_tree
import plan
import pytest
import training
from evaluation import make_apply
from flags import parse

import jlora


@pytest.fixture(scope="module")
def layer(tiny: Any) -> tuple[llama.Config, Any]:
    """(config, params) of the tiny model's first layer, with an adapter that has moved."""
    config, base = tiny
    config = dataclasses.replace(config, layers=1)
    base = {name: leaf for name, leaf in base.items() if name != "layers_1"}
    params = jlora.attach(base, {r".*_proj/kernel": jlora.LoraSpec(2)}, key=jax.random.key(0))
    return config, moved(params)


def moved(params: Any) -> Any:
    trainable, frozen = jlora.partition(params)
    draw = np.random.default_rng(0)
    noise = lambda x: x + jnp.asarray(0.1 * draw.normal(size=x.shape), x.dtype)
    return jlora.combine(jax.tree.map(noise, trainable), frozen)


def batch_of(rows: int, start: int = 3) -> training.Batch:
    return data.batches(rows_of(rows, start), rows)[0]


def rows_of(rows: int, start: int) -> data.Rows:
    """Packed rows of 24 tokens, with more targets in some than in others."""
    draw = np.random.default_rng(1)
    tokens = [draw.integers(0, 256, 12 - n % 3).tolist() for n in range(2 * rows)]
    examples = [data.Example("", "", t, start + n % 5, start) for n, t in enumerate(tokens)]
    return data.pack(iter(examples), 24, rows)


def value_and_grad(config: llama.Config, params: Any, batch: training.Batch) -> Any:
    loss = training.make_loss(jlora.lora(make_apply(config)), chunked=config.chunk > 0)
    trainable, frozen = jlora.partition(params)
    return jax.jit(jax.value_and_grad(lambda t: loss(jlora.combine(t, frozen), batch)))(trainable)


def close(got: Any, want: Any, rtol: float) -> None:
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.any(x != 0)), want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


NIGHTLY = pytest.mark.nightly
HEADS = {
    "tied": {"tied": True},
    "untied": {},
    "adapted": {"rules": "lm_head/kernel"},
    "capped": {"cap": 2.0, "rules": "lm_head/kernel"},
    "tied, adapted, capped": {"tied": True, "cap": 2.0, "rules": "embed/embedding"},
    "stored": {"tied": True, "store": True},
    "stored, adapted": {"store": True, "rules": "lm_head/kernel"},
}


EVERY = [(head, chunk) for head in HEADS for chunk in (100, 132, 1000)]  # of a vocabulary of 264


@pytest.mark.parametrize(
    ("head", "chunk"),
    [
        pytest.param(*case, marks=[] if case == ("tied, adapted, capped", 100) else [NIGHTLY])
        for case in EVERY
    ],
)
def test_chunks_compute_the_same(layer: Any, head: str, chunk: int) -> None:
    """The loss and its gradient, for chunks that do and do not divide the vocabulary."""
    how = HEADS[head]
    config, base = layer[0], jlora.detach(layer[1])[0]
    config = dataclasses.replace(config, tied="tied" in how, logit_cap=how.get("cap"))
    base = {name: leaf for name, leaf in base.items() if not (config.tied and name == "lm_head")}
    if "store" in how:
        base = jlora.quantize(base, {"embed/embedding|lm_head/kernel": "int8"})
    rules = {how.get("rules", ".*/up_proj/kernel"): jlora.LoraSpec(2)}
    params = moved(jlora.attach(base, rules, key=jax.random.key(0)))
    batch = batch_of(2)
    want = value_and_grad(config, params, batch)
    got = value_and_grad(dataclasses.replace(config, chunk=chunk), params, batch)
    close(got, want, 1e-6)


@pytest.mark.nightly
def test_remat_computes_the_same(layer: Any) -> None:
    config, params = layer
    batch = batch_of(2)
    again = dataclasses.replace(config, remat=True)
    close(value_and_grad(again, params, batch), value_and_grad(config, params, batch), 1e-5)


@pytest.mark.nightly
def test_scanned_layers_compute_the_same(tiny: Any) -> None:
    """The program does not grow with the number of layers; generation has a stacked cache."""
    config, base = tiny
    scan = dataclasses.replace(config, scan=True)
    args = parse(["--rank", "2", "--scan"])
    copied = jax.tree.map(lambda x: x, base)  # `stacked` consumes the dictionaries
    params = moved(begin.attach(args, param_tree.stacked(copied, config.layers)))
    batch, loss = batch_of(2), training.make_loss
    merged = jlora.merge(params)
    layers = merged.pop("layers")
    for i in range(config.layers):
        merged[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)
    want = jax.jit(loss(make_apply(config)))(merged, batch)
    again = dataclasses.replace(scan, remat=True)
    value, grads = value_and_grad(again, params, batch)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for grad in jax.tree.leaves(grads):
        assert len(grad) == config.layers and all(bool(jnp.any(one != 0)) for one in grad)
    tokens = np.array([[5, 6, 7]], np.int32)
    cached = [
        make_apply(c)(p, tokens, None, None, llama.init_cache(c, 1, 4))[0]
        for c, p in ((config, merged), (scan, jlora.merge(params)))
    ]
    np.testing.assert_allclose(cached[0], cached[1], rtol=1e-4, atol=1e-5)
    sizes = []
    for layers in (2, 8):
        model = llama.Llama(dataclasses.replace(scan, layers=layers))
        sizes.append(len(str(jax.make_jaxpr(model.init)(jax.random.key(0), tokens))))
    assert sizes[1] < 1.1 * sizes[0]


def test_remat_keeps_few_values(layer: Any) -> None:
    config, params = layer
    batch, trainable = batch_of(3), jlora.partition(params)[0]

    def program(**changes: Any) -> str:
        loss = training.make_loss(jlora.lora(make_apply(dataclasses.replace(config, **changes))))
        frozen = jlora.partition(params)[1]
        grad = jax.grad(lambda t: loss(jlora.combine(t, frozen), batch))
        return str(jax.make_jaxpr(grad)(trainable))

    assert "prevent_cse" not in program() and "prevent_cse" in program(remat=True)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_chunks_need_no_memory_for_all_logits(layer: Any, tied: bool) -> None:
    """In a compiled step over 512 targets and a vocabulary of 8192, with an adapted head."""
    head = "embed/embedding" if tied else "lm_head/kernel"
    config = dataclasses.replace(layer[0], vocab=8192, tied=tied)
    model = llama.Llama(config)

    def make() -> Any:
        base = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return jlora.attach(base, {head: jlora.LoraSpec(2)}, key=jax.random.key(1))

    trainable, frozen = jlora.partition(jax.eval_shape(make))
    shapes = dict.fromkeys(("tokens", "positions", "segments"), (16, 32))
    shapes |= dict.fromkeys(("at", "target", "weight"), (512,))
    kind = lambda name: jnp.float32 if name == "weight" else jnp.int32
    batch = {name: jax.ShapeDtypeStruct(shape, kind(name)) for name, shape in shapes.items()}
    temporary = []
    for chunk in (0, 256):
        apply = jlora.lora(make_apply(dataclasses.replace(config, chunk=chunk)), fallback="error")
        loss = training.make_loss(apply, chunked=chunk > 0)
        step = jax.grad(lambda t, f, batch, loss=loss: loss(jlora.combine(t, f), batch))
        compiled = jax.jit(step).lower(trainable, frozen, batch).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    every = 4 * 512 * 8192
    assert temporary[0] > every > 4 * temporary[1], temporary


def test_accumulated_gradients_are_those_of_the_large_batch(layer: Any) -> None:
    """The parts have different numbers of targets, so their means have different weights."""
    config, params = layer
    rows = rows_of(4, 3)
    whole, parts = data.batches(rows, 4)[0], data.joined(data.batches(rows, 2), 2)[0]
    assert parts["weight"].sum(axis=1)[0] != parts["weight"].sum(axis=1)[1]
    trainable, frozen = jlora.partition(params)
    loss = training.make_loss(jlora.lora(make_apply(config)))
    tx = optax.sgd(1.0)
    found = []
    for accumulate, batch in ((1, whole), (2, parts)):
        step = training.make_step(loss, tx, accumulate)
        copy = jax.tree.map(jnp.copy, trainable)
        after, _, value = step(copy, tx.init(copy), frozen, batch)
        found.append((value, jax.tree.map(lambda a, b: a - b, after, trainable)))
    close(found[1], found[0], 1e-4)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")  # Flax normalizes in float32
def test_bfloat16(finished: Any) -> None:
    """The base in bfloat16, A and B in float32; generation has a cache of the base's dtype."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        job = begin.prepare(parse([*finished.flags, "--dtype", dtype]))
        trainable, _ = jlora.partition(job.params)
        assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
        base = jlora.detach(job.params)[0]
        assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(dtype)}
        apply = jlora.lora(make_apply(job.config))
        losses.append(float(jax.jit(training.make_loss(apply))(job.params, job.held_out[0])))
        assert job.config.dtype == dtype
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)
    tokens = np.ones((1, 3), np.int32)
    answer = functools.partial(llama.generate, apply, job.config, steps=2, stop=256)
    assert jax.eval_shape(answer, job.params, tokens, tokens).shape == (1, 2)


def test_truncation_is_counted_and_said(capsys: Any) -> None:
    sizes = [(4, 2), (8, 2), (12, 2), (16, 9)]
    examples = [data.Example("", "", [1] * n, start, start) for n, start in sizes]
    dataset = data.truncated(data.Dataset(examples, examples[:1], False), 8)
    assert [len(e.tokens) for e in dataset.train] == [4, 8, 8]
    said = capsys.readouterr().out
    assert said.startswith(
        "2 of 5 examples have more than 8 tokens: 1 are truncated, 1 are dropped"
    )
    with pytest.raises(ValueError, match="`--length 2`: no example is left to train"):
        data.truncated(data.Dataset(examples, examples[:1], False), 2)


@pytest.mark.usefixtures("usual_promotion")  # Optax's Adam counts in integers
def test_flags_are_a_spec() -> None:
    flags = ["--rank", "3", "--alpha", "5", "--targets", ".*/q_proj/kernel", ".*/v_proj/kernel"]
    more = ["--form", "lora_fa", "--init", "orthogonal", "--dora", "--rslora", "--lora-plus", "4"]
    args = parse([*flags, *more])
    spec = jlora.LoraSpec(
        3, 5.0, "rslora", jlora.initializers.orthogonal, dora=True, form="lora_fa"
    )
    assert begin.rules(args) == {".*/q_proj/kernel": spec, ".*/v_proj/kernel": spec}
    assert begin.rules(parse([])) == {r".*_proj/kernel": jlora.LoraSpec(8, 16.0)}
    params = {"lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}
    base = {"w": jnp.ones((2, 2))}
    trainable, _ = jlora.partition(
        jlora.attach(base, {"w": jlora.LoraSpec(1)}, key=jax.random.key(0))
    )
    del params
    updates = []
    for ratio in (None, args.lora_plus):
        tx = training.make_optimizer(0.1, 4, ratio)
        state = tx.init(trainable)
        for _ in range(2):  # the first step of the warm-up has the rate zero
            update, state = tx.update(jax.tree.map(jnp.ones_like, trainable), state, trainable)
        updates.append(update["w"])
    np.testing.assert_allclose(updates[1].lora_b, 4 * updates[0].lora_b, rtol=1e-5)
    np.testing.assert_allclose(updates[1].lora_a, updates[0].lora_a, rtol=1e-5)


@pytest.mark.usefixtures("usual_promotion")
def test_a_plan_is_what_happens(tiny_dir: Path, finished: Any, capsys: Any) -> None:
    """From config.json alone: the bytes and FLOPs are those of the step with its arrays."""
    for file in ("model.safetensors", "tokenizer.json"):
        (tiny_dir / file).unlink()
    flags = ["--model", str(tiny_dir), "--rank", "4", "--length", "64", "--out", "nowhere"]
    assert finetune.main([*flags, "--plan"]) == 0
    said = capsys.readouterr().out
    args = parse([*finished.flags, "--length", "64"])
    job = begin.prepare(args)
    trainable, frozen = jlora.partition(job.params)
    assert f"{plan.count(frozen):,} frozen, {plan.count(trainable):,} trainable" in said
    assert f"{plan.size(plan.nbytes(trainable))}" in said and not Path("nowhere").exists()
    tx = training.make_optimizer(args.lr, args.steps)
    step = training.make_step(training.make_loss(jlora.lora(make_apply(job.config))), tx)
    every = np.arange(128, dtype=np.int32)
    batch = {**job.batches[0], "at": every, "target": every, "weight": np.ones(128, np.float32)}
    lowered = step.lower(trainable, tx.init(trainable), frozen, batch)
    assert f"{lowered.cost_analysis()['flops']:.3g}, " in said
    lines = dict(line.strip().split("  ", 1) for line in said.splitlines()[1:])
    assert lines["base weights"].strip() == plan.size(plan.nbytes(frozen))
    assert lines["temporary"].strip() != "0.00B" < lines["peak of a step"].strip()
