"""What a compiled program allocates and runs, as XLA says: LoRA is small, and merged it is gone."""

import functools
import math
import re
from collections import Counter

import blocks
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import Decoder

import jlora

SIZES = blocks.PRESETS["smollm2"]
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (\([^)]*\)|\S+) ([\w\-]+)\(", re.MULTILINE)
# These make no buffer of their own.
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element"}


def abstract(sizes=SIZES):
    """(base, params, x) as shapes."""
    base, x = jax.eval_shape(functools.partial(blocks.weights, sizes))
    params = jax.eval_shape(functools.partial(blocks.attached, sizes), base)
    return base, params, x


def temp_bytes(fn, argnums, *args):
    compiled = jax.jit(jax.value_and_grad(fn, argnums)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def temp_bytes_adapted(fn, params, x):
    trainable, frozen = jlora.partition(params)
    run = jlora.lora(fn, fallback="error")
    return temp_bytes(lambda t, x, f: run(jlora.combine(t, f), x), (0, 1), trainable, x, frozen)


def test_a_step_keeps_little_more_than_the_inputs_of_adapted_layers():
    base, params, x = abstract()
    loss = functools.partial(blocks.loss, head_dim=SIZES.head_dim)
    limit = temp_bytes(loss, (1,), base, x)
    tokens = SIZES.batch * SIZES.time
    # q, k and v share an input, as gate and up do.
    inputs = SIZES.blocks * tokens * (SIZES.width + SIZES.width + SIZES.width + SIZES.mlp) * 4
    assert SIZES.input_bytes == inputs
    assert limit < temp_bytes_adapted(loss, params, x) <= 1.3 * limit + inputs


@pytest.fixture(scope="module")
def remat():
    """Temporary bytes where each block is recomputed: over a scan, which XLA cannot reorder.

    Unrolled, XLA on a CPU computes all blocks again before it goes backward, with LoRA or without.
    """
    base, _, x = abstract()
    stacked = {n: jax.ShapeDtypeStruct((len(base), *w.shape), w.dtype) for n, w in base[0].items()}
    rules = {".*": jlora.LoraSpec(SIZES.rank, layout="io")}
    params = jax.eval_shape(lambda p: jlora.attach(p, rules, key=jax.random.key(0)), stacked)

    def loss(params, x):
        def body(x, p):
            return blocks.block(p, x, SIZES.head_dim, blocks.product), None

        return jnp.mean(jnp.square(jax.lax.scan(jax.checkpoint(body), x, params)[0]))

    return {
        "limit": temp_bytes(loss, (1,), stacked, x),
        "full": temp_bytes(loss, (0, 1), stacked, x),
        "jlora": temp_bytes_adapted(loss, params, x),
    }


@pytest.mark.nightly
def test_rematerialized_a_step_keeps_one_block_s_inputs(remat):
    assert remat["limit"] < 0.5 * temp_bytes(
        functools.partial(blocks.loss, head_dim=SIZES.head_dim), (1,), *abstract()[::2]
    )
    assert remat["jlora"] <= 1.3 * remat["limit"] + SIZES.input_bytes / SIZES.blocks


def test_rematerialized_a_step_is_the_base_model_s(remat):
    assert remat["jlora"] <= 1.05 * remat["full"]


def allocated(compiled):
    """Count the shapes of what a program allocates, in all that is not inside a fusion."""
    found = Counter()
    for computation in re.split(r"\n(?=%|ENTRY)", compiled.as_text()):
        if not computation.startswith("%fused"):
            for shape, opcode in INSTRUCTION.findall(computation):
                if opcode not in FREE:
                    found.update(re.findall(r"(\w+)\[([\d,]*)\]", shape))
    return found


def of_weight_size(compiled, sizes):
    """The allocated buffers with as many float32 elements as some frozen weight has."""
    weights = {m * n for m, n in sizes.shapes.values()}
    count = lambda dims: math.prod(int(d) for d in dims.split(",") if d)
    return [s for s in allocated(compiled) if s[0] == "f32" and count(s[1]) in weights]


def test_a_donating_step_allocates_no_buffer_of_a_frozen_weight_s_size():
    sizes = SIZES._replace(blocks=2)
    _, params, x = abstract(sizes)
    tx = jlora.freeze(optax.adamw(1e-3))
    with jax.numpy_dtype_promotion("standard"):  # optax's powers of a step count
        state = jax.eval_shape(tx.init, params)

        def step(loss, params, state, x):
            value, (grads, dx) = jax.value_and_grad(loss, (0, 1))(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value, dx

        def compiled(loss):
            donating = jax.jit(functools.partial(step, loss), donate_argnums=(0, 1))
            return donating.lower(params, state, x).compile()

        plain = functools.partial(blocks.loss, head_dim=sizes.head_dim)
        adapted = compiled(jlora.lora(plain, fallback="error"))
        assert of_weight_size(adapted, sizes) == []
        assert of_weight_size(compiled(lambda p, x: plain(jlora.merge(p), x)), sizes), "no control"
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    assert adapted.memory_analysis().alias_size_in_bytes == held


@pytest.mark.sample(2)
@pytest.mark.usefixtures("usual_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_inference_is_the_base_program(dtype):
    model, x = Decoder(2), jnp.ones((2, 3, 6), dtype)
    base = jax.tree.map(lambda w: w.astype(dtype), model.init(jax.random.key(0), x))
    layouts = jlora.layouts(model.apply, base, x)
    rules = {r".*/kernel": jlora.LoraSpec(2), r".*/bias": "full"}
    params = jlora.attach(base, rules, key=jax.random.key(1), layouts=layouts)

    def opcodes(apply, params):
        text = jax.jit(apply).lower(params, x).compile().as_text()
        return [opcode for _, opcode in INSTRUCTION.findall(text)]

    want = opcodes(model.apply, base)
    assert opcodes(model.apply, jlora.merge(params)) == want and want.count("parameter") > 10
    # The transform itself leaves no trace where nothing is adapted.
    assert opcodes(jlora.lora(model.apply), jlora.merge(params)) == want
    assert opcodes(jlora.lora(model.apply), params) != want
