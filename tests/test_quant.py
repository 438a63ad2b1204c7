"""Storage formats: `quantize`, `dequantize`, and everything that composes with them."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers import bits, same
from quantized import LAYOUTS, NAMES, RULES, TOKENS, is_quant, model, one, stored

import jlora
import jlora.checkpoint
import jlora.peft
from jlora import LoraSpec, quant
from jlora.quant import _nibbles, _product, int4, nf4

KEY = jax.random.key(0)
IN_CI = ("nf4",)
some = pytest.mark.parametrize(
    "name", [n if n in IN_CI else pytest.param(n, marks=pytest.mark.nightly) for n in NAMES]
)
W = jax.random.normal(jax.random.key(1), (128, 12))


def adapted(base: Any) -> Any:
    """An adapter, over some of the weights, that does something."""
    params = jlora.attach(base, RULES, key=KEY, layouts=LAYOUTS)
    t, f = jlora.partition(params)
    return jlora.combine(jax.tree.map(lambda x: x + 0.02, t), f)


def over(params: Any, base: Any) -> Any:
    return jlora.bind(base, jlora.detach(params)[1])


def weigh(outs: Any) -> Any:
    rng = np.random.default_rng(0)
    return sum((x * rng.normal(size=x.shape).astype(np.float32)).sum() for x in outs)


@pytest.mark.nightly
@some
def test_the_laws(name):
    """Values and gradients are those of the merged model, over dequantized weights."""
    params = adapted(stored(name))
    trainable, frozen = jlora.partition(params)

    def run(t: Any) -> Any:
        outs = jlora.lora(model, fallback="error")(jlora.combine(t, frozen), TOKENS)
        return weigh(outs), outs

    def dense(t: Any) -> Any:
        params = jlora.dequantize(jlora.combine(t, frozen))
        outs = model(jlora.merge(params), TOKENS)
        return weigh(outs), outs

    both = jax.jit(lambda t: [jax.grad(fn, has_aux=True)(t) for fn in (run, dense)])
    (gradients, got), (slopes, want) = both(trainable)
    # The products of int8 round the weight elsewhere: (x codes) scale.
    for a, b in zip(got, want, strict=True):
        same(a, b, 1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
        same(a, b, 1e-5)


def test_every_format_under_an_adapter_in_one_program(monkeypatch):
    base = {name: one(name) for name in NAMES}
    params = jlora.attach(base, {".*": LoraSpec(2, layout="oi")}, key=KEY)
    t, frozen = jlora.partition(params)
    t = jax.tree.map(lambda x: x + 0.1, t)
    fn = lambda p, x: {name: x @ p[name].T for name in NAMES}
    x = jax.random.normal(KEY, (4, 256)) / 16

    def both(t: Any) -> Any:
        params = jlora.combine(t, frozen)
        return jlora.lora(fn)(params, x), fn(jlora.merge(params), x)

    got, want = jax.jit(both)(t)
    monkeypatch.setattr(_product, "LEAST", 1)
    ordered = jax.jit(lambda t: both(t)[0])(t)  # as large weights on a CPU
    for name in NAMES:
        same(got[name], want[name], 1e-5)
        same(ordered[name], want[name], 1e-5)


@some
def test_what_is_kept_for_the_backward_pass_is_what_is_stored(name):
    params = adapted(stored(name))
    trainable, frozen = jlora.partition(params)
    weights = [x for x in jax.tree.leaves(params, is_leaf=is_quant) if is_quant(x)]
    shapes = {x.shape for x in weights} | {(256, 256)}
    shapes |= {shape[::-1] for shape in shapes}

    def kept(t: Any) -> Any:
        loss = lambda t: weigh(jlora.lora(model)(jlora.combine(t, frozen), TOKENS))
        return jax.vjp(loss, t)[1]

    found = jax.tree.leaves(jax.eval_shape(kept, trainable))
    wide = {x.shape for x in found if jnp.issubdtype(x.dtype, jnp.floating)}
    assert wide and wide & shapes == set()
    assert any(x.dtype in (jnp.uint8, jnp.int8) for x in found)


WRITTEN = ("int8", "int4", "nf4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name",
    [n if n in ("nf4", "q4_0") else pytest.param(n, marks=pytest.mark.nightly) for n in WRITTEN],
)
def test_a_weight_of_any_layout_is_stored_by_rows(name):
    """Blocks run along the inputs: the transposed weight in the other layout has the same codes."""
    format = quant._formats.FORMATS[name]
    one = jlora.quantize({"w": W}, {"w": format})["w"]
    other = jlora.quantize({"w": W.T}, {"w": format}, layouts={"w": "oi"})["w"]
    heads = W.reshape(128, 3, 4), W.reshape(2, 64, 12)
    ioo = jlora.quantize({"w": heads[0]}, {"w": format}, layouts={"w": "ioo"})["w"]
    iio = jlora.quantize({"w": heads[1]}, {"w": format}, layouts={"w": "iio"})["w"]
    layers = jnp.stack([2 * W, W])
    stack = jlora.quantize({"w": layers}, {"w": format}, layouts={"w": "io"})["w"]
    for x in (other, ioo, iio, jax.tree.map(lambda leaf: leaf[1], stack)):
        assert [*map(bits, jax.tree.leaves(x))] == [*map(bits, jax.tree.leaves(one))]
    assert stack.stack == 1 and stack.shape == (2, 128, 12) and one.stack == 0
    want = one.dequantize()
    same(other.dequantize(), want.T, 0)
    same(ioo.dequantize(), want.reshape(128, 3, 4), 0)
    same(iio.dequantize(), want.reshape(2, 64, 12), 0)
    assert quant.errors({"w": W}, {"w": one})["w"] < (0.01 if "8" in name else 0.13)
    assert bits(stack.dequantize()[1]) == bits(want)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_stands_for_a_weight_of_its_dtype(dtype):
    w = W.astype(dtype)
    for name in ("int8", "nf4", "q4_0"):
        x = jlora.quantize({"w": w}, {"w": name})["w"]
        wide = jlora.quantize({"w": w.astype(jnp.float32)}, {"w": name})["w"]
        assert x.dtype == dtype and x.dequantize().dtype == dtype
        assert [*map(bits, jax.tree.leaves(x))] == [*map(bits, jax.tree.leaves(wide))]
        assert bits(x.dequantize()) == bits(wide.dequantize().astype(dtype))
    params = jlora.attach({"w": x}, {"w": LoraSpec(2)}, key=KEY)
    y = jlora.lora(lambda p, x: x @ p["w"])(params, jnp.ones((3, 128), dtype))
    assert y.dtype == dtype


PRODUCTS = {
    "io": (lambda w, x: x @ w, "io", (128, 12), (3, 128)),
    "transposed": (lambda w, x: x @ w.T, "io", (128, 12), (3, 12)),
    "left": (lambda w, x: w.T @ x, "io", (128, 12), (128, 3)),
    "heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), "ioo", (128, 3, 4), (2, 128)),
    "back": (lambda w, x: jnp.einsum("bhd,ihd->bi", x, w), "ioo", (128, 3, 4), (2, 3, 4)),
    "out": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), "iio", (2, 64, 12), (5, 2, 64)),
    "swapped": (lambda w, x: jnp.einsum("bdh,hdo->bo", x, w), "iio", (2, 64, 12), (5, 64, 2)),
}
BUILT = {
    "half": (lambda w, x: jnp.einsum("bh,hdo->bdo", x, w), "iio", (2, 64, 12), (5, 2)),
    "layers": (lambda w, x: jnp.einsum("lbi,lio->lbo", x, w), "io", (3, 128, 12), (3, 2, 128)),
    "integers": (
        lambda w, x: jax.lax.dot_general(x.astype(jnp.int8), w, (((1,), (0,)), ((), ()))),
        *("io", (128, 12), (3, 128)),
    ),
}


def int8(name: str, dtype: str) -> Any:
    """A product, its operands with the weight in int8, and the weight."""
    fn, layout, shape, of_x = (PRODUCTS | BUILT)[name]
    w = jax.random.normal(KEY, shape).astype(dtype)
    w = jlora.quantize({"w": w}, {"w": "int8"}, layouts={"w": layout})["w"]
    return fn, w, jax.random.normal(jax.random.key(2), of_x).astype(dtype)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_int8_use_the_codes(dtype, monkeypatch):
    """Forward and backward."""
    cases = {name: int8(name, dtype) for name in PRODUCTS}
    args = {name: case[1:] for name, case in cases.items()}
    fns = {name: case[0] for name, case in cases.items()}

    def both(weight_of: Any, apply: Any) -> Any:
        def one(name: str, w: Any, x: Any) -> Any:
            fn = apply(fns[name])
            total = lambda x: weigh([fn(weight_of(w), x).astype(jnp.float32)])
            return fn(weight_of(w), x), jax.grad(total)(x)

        return jax.jit(lambda args: {name: one(name, *pair) for name, pair in args.items()})(args)

    want = both(lambda w: w.dequantize(), lambda fn: fn)
    monkeypatch.setattr(quant.Int8, "unpack", lambda *_: 1 / 0)
    got = both(lambda w: w, jlora.lora)
    monkeypatch.setattr(_product, "LEAST", 1)  # as large weights
    ordered = both(lambda w: w, jlora.lora)
    for name in PRODUCTS:
        for a, b, c in zip(got[name], want[name], ordered[name], strict=True):
            assert a.dtype == b.dtype == c.dtype
            same(a, b, 2**-5 if dtype == "bfloat16" else 1e-5)
            same(c, b, 2**-5 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", ["int8", pytest.param("nf4", marks=pytest.mark.nightly)])
def test_every_transformation_of_a_large_weight(name):
    """Forward, reverse and forward over reverse, of a batch and of adapters under vmap."""
    w = jlora.quantize({"w": jax.random.normal(KEY, (256, 256)) / 16}, {"w": name})["w"]
    assert w.size >= _product.LEAST
    x = jax.random.normal(KEY, (2, 3, 256))

    def all_of(w: Any) -> Any:
        fn = lambda x: jnp.tanh(jlora.lora(lambda w, x: x @ w)(w, x))
        slope = jax.grad(lambda x: (fn(x) ** 2).sum())
        return [
            *(fn(x), jax.vmap(fn)(x), jax.vmap(slope)(x)),
            *jax.jvp(fn, (x,), (x + 1,)),
            *jax.jvp(slope, (x,), (x + 1,)),
            jax.jacfwd(lambda x: fn(x).sum(0))(x[0, 0]),
        ]

    got, want = jax.jit(lambda w: (all_of(w), all_of(w.dequantize())))(w)
    for a, b in zip(got, want, strict=True):
        same(a, b, 1e-5)
    built = str(jax.make_jaxpr(lambda x: jax.vmap(lambda x: jlora.lora(jnp.matmul)(x, w))(x))(x))
    assert "[2,256,256]" not in built, "one weight serves the batch"


def test_small_float16_values_are_multiplied_by_a_transposed_int8_weight():
    """Times a scale they are near float16's smallest number; times the weight they are not."""
    w = (0.02 * jax.random.normal(KEY, (64, 12))).astype("float16")
    stored = jlora.quantize({"w": w}, {"w": "int8"})["w"]
    x = jnp.full((3, 12), 1e-3, "float16")
    got = jlora.lora(lambda w, x: x @ w.T)(stored, x)
    want = np.float32(x) @ np.float32(stored.format.unpack(stored.parts))
    np.testing.assert_allclose(np.float32(got), want, rtol=0, atol=2.0**-24)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", BUILT)
def test_other_products_of_int8_build_it(name):
    fn, w, x = int8(name, "float32")
    same(jlora.lora(fn)(w, x), fn(w.dequantize(), x), 1e-5)
    assert "built here" in str(
        jlora.explain(
            fn, jlora.attach({"w": w}, {"w": LoraSpec(1, layout=w.layout)}, key=KEY)["w"], x
        )
    )


@pytest.mark.parametrize("pairs", [nf4._PAIRS, int4._PAIRS], ids=["nf4", "int4"])
def test_values_of_codes_on_a_tpu(pairs):
    """They are selected, to the same bits: a table of pairs is padded 64-fold in its memory."""
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(2, 128)
    table = tuple(pairs[:16, 1].tolist())
    fn = jax.jit(lambda codes: (_nibbles.look_up(codes, pairs), _nibbles._select(codes, table)))
    looked_up, selected = fn(codes)
    assert bits(selected) == bits(looked_up) == bits(pairs.reshape(2, 256))
    scales = jax.jit(lambda x: _nibbles._select_scales(x, tuple(nf4.SCALES.tolist())))
    assert bits(scales(codes)) == bits(nf4.SCALES.reshape(2, 128))
    both = lambda x: (_nibbles.look_up(x, pairs), _nibbles.look_up_scales(x, nf4.SCALES))
    traced = jax.jit(both).trace(codes)
    text = {x: traced.lower(lowering_platforms=(x,)).as_text() for x in ("tpu", "cpu")}
    assert "gather" not in text["tpu"] and "gather" in text["cpu"]


def test_products_on_a_tpu(monkeypatch):
    """They sum over places and blocks, to the same values, of a weight that waits for its turn."""
    monkeypatch.setattr(_product, "LEAST", 1)
    shapes = {"inputs": (2, 3, 256), "outputs": (2, 3, 12)}
    x, g = (jax.random.normal(KEY, shape) for shape in shapes.values())
    rows = one("q4_1").dequantize()
    blocks = lambda x, rows, *how: _product._times_blocks(x, rows, 32, *how)
    pairs = jax.jit(
        lambda x, g: [
            (fn(x, rows, False, jnp.float32), fn(g, rows, True, jnp.float32))
            for fn in (blocks, _product._times_rows)
        ]
    )
    for got, want in zip(*pairs(x, g), strict=True):
        same(got, want, 1e-6)
    traced = jax.jit(lambda w, x: jlora.lora(lambda p, x: x @ p.T)(w, x)).trace(one("q4_1"), x)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu")}
    both = "contracting_dims = [3, 2] x [2, 1]"
    assert both in text["tpu"] and both not in text["cpu"]
    assert all("optimization_barrier" in found for found in text.values())


def test_rules_are_those_of_attach():
    base = {"a": {"kernel": W, "bias": jnp.ones(12)}, "b": {"kernel": W}, "c": {"kernel": W}}
    params = jlora.quantize(
        base, {"a/kernel": None, "b/.*": quant.Int4(group=64), ".*/kernel": "int8"}
    )
    assert params["a"]["kernel"] is W and params["a"]["bias"] is base["a"]["bias"]
    assert params["b"]["kernel"].format == quant.Int4(64)
    assert params["c"]["kernel"].format == quant.Int8()
    back = jlora.dequantize(params)
    assert back["a"]["kernel"] is W and back["c"]["kernel"].shape == W.shape
    assert not any(map(is_quant, jax.tree.leaves(back, is_leaf=is_quant)))


def test_an_embedding_is_stored_by_rows():
    params = jlora.quantize({"embed": {"embedding": W.T}}, {".*": "int8"})
    x = params["embed"]["embedding"]
    assert x.layout == "oi" and x.parts["scale"].shape == (12,)


@pytest.mark.nightly
def test_dequantize_keeps_an_adapter():
    params = adapted(stored("int8"))
    plain = jlora.dequantize(params)
    assert plain["q"]["kernel"].lora_a is params["q"]["kernel"].lora_a
    assert bits(plain["q"]["kernel"].base) == bits(params["q"]["kernel"].base.dequantize())


BAD = {
    "unknown": ({"w": "nf5"}, ValueError, r'`jlora\.quantize\(rules.*"w".*"nf5".*Closest: "nf4"'),
    "class": ({"w": quant.NF4}, TypeError, r"the value .*NF4.*give a format, such as"),
    "no match": ({"v": "nf4"}, ValueError, r'the rule "v" matches no parameter'),
    "block": (
        {"odd": "nf4"},
        ValueError,
        r'"odd" float32\[60,4\] with layout \'io\' has 60 inputs, which the block of '
        r"NF4\(block=64, double=True\), 64, does not divide.*`NF4\(block=60\)`.*None",
    ),
    "odd inputs": ({"prime": "int4"}, ValueError, r'"prime".* Use "int8", which has a scale per'),
    "record": ({"odd": "q4_0"}, ValueError, r'blocks? of Q4_0, 32.* Use "int8", or map'),
    "superblock": ({"w": "q4_k"}, ValueError, r'block of Q4_K, 256.*Use "q8_0" or another'),
    "only read": ({"long": "q4_k"}, ValueError, r'"long".*cannot be stored as Q4_K, which is read'),
    "vector": ({"bias": "int8"}, ValueError, r'"bias" float32\[4\] has no input and output side'),
    "integers": ({"ids": "int8"}, TypeError, r'"ids" int32\[4,4\] is not a floating-point array'),
    "stack": ({"stack": "int8"}, ValueError, r'"stack".*`layouts=\{"stack": "ioo"\}`; leading'),
    "stored": ({"stored": "nf4"}, ValueError, r'"stored".*is stored already.*jlora\.dequantize'),
    "adapted": ({"adapted": "nf4"}, ValueError, r'"adapted".*is adapted.*jlora\.detach'),
    "nan": ({"nan": "nf4"}, ValueError, r'scales of "nan".*in NF4.*not finite.*NaN or infinity'),
    "range": ({"large": "q4_0"}, ValueError, r'"large".*Q4_0.*beyond the range of float16 scales'),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    params = {
        **{"w": W, "odd": jnp.ones((60, 4)), "prime": jnp.ones((13, 4)), "bias": jnp.ones(4)},
        **{"ids": jnp.ones((4, 4), jnp.int32), "stack": jnp.ones((2, 4, 4))},
        "stored": jlora.quantize({"w": W}, {"w": "int8"})["w"],
        "adapted": jlora.attach({"w": W}, {"w": LoraSpec(1)}, key=KEY)["w"],
        **{"nan": W.at[0, 0].set(jnp.nan), "large": 1e6 * W, "long": jnp.ones((256, 2))},
    }
    rules, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        jlora.quantize(params, rules)


def test_more_bad_arguments():
    with pytest.raises(KeyError, match=r'layouts=.*no parameter "v"'):
        jlora.quantize({"w": W}, {"w": "int8"}, layouts={"v": "io"})
    with pytest.raises(TypeError, match=r'"w".*is traced, and Q4_0 is computed on the host'):
        jax.jit(lambda w: jlora.quantize({"w": w}, {"w": "q4_0"}))(W)
    for wrong in (0, 7, True):
        with pytest.raises(ValueError, match=rf"NF4\(block={wrong}.*even and at least 2"):
            quant.NF4(block=wrong)
    with pytest.raises(ValueError, match=r"Int4\(group=3\).*even and at least 2"):
        quant.Int4(group=3)
    params = jlora.quantize({"w": W}, {"w": "int8"})
    with pytest.raises(TypeError, match=r'"w" .* is stored as `Int8\(\)`, which has no gradient'):
        jlora.attach(params, {"w": "full"}, key=KEY)
    with pytest.raises(ValueError, match=r"is stored as `Int8\(\)` and cannot change"):
        jlora.attach(params, {"w": LoraSpec(1, init=jlora.initializers.pissa)}, key=KEY)
    with pytest.raises(KeyError, match=r'`base` has no "w".*Closest: "v"'):
        quant.errors({"v": W}, params)
    with pytest.raises(ValueError, match=r'"w" float32\[12,128\] in `base` is .*\[128,12\] in'):
        quant.errors({"w": W.T}, params)


def test_quantize_runs_inside_jit_and_on_shapes():
    rules = {"w": "nf4", "v": "int8"}
    tree = {"w": W, "v": W}
    want = jlora.quantize(tree, rules)
    got = jax.jit(lambda p: jlora.quantize(p, rules))(tree)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert [*map(bits, jax.tree.leaves(got))] == [*map(bits, jax.tree.leaves(want))]
    shapes = jax.eval_shape(lambda p: jlora.quantize(p, rules), tree)
    assert shapes["w"].shape == (128, 12) and shapes["w"].nbytes == want["w"].nbytes


def test_a_weight_of_zeros():
    rules = {name: name for name in WRITTEN}
    params = jlora.quantize({name: jnp.zeros((128, 3)) for name in WRITTEN}, rules)
    for name, x in jax.jit(jlora.dequantize)(params).items():
        assert not x.any(), name
    assert quant.errors({"nf4": jnp.zeros((128, 3))}, {"nf4": params["nf4"]}) == {"nf4": 0.0}


def test_merge_to_arrays_and_in_the_format():
    base = jlora.quantize({"w": W, "v": W, "u": W}, {"w": "nf4", "v": "q4_1"})
    params = jlora.attach(base, {"w|u": LoraSpec(2)}, key=KEY)
    unchanged = jlora.merge(params, requantize=True)
    assert unchanged["w"] is base["w"] and unchanged["v"] is base["v"]
    moved = dataclasses.replace(params["w"], lora_b=params["w"].lora_b + 1.0)
    params = {**params, "w": moved}
    merged = jlora.merge(params)
    again = jlora.merge(params, requantize=True)
    assert again["w"].format == base["w"].format and again["v"] is base["v"]
    assert isinstance(again["u"], jax.Array)
    want = jlora.quantize({"w": merged["w"]}, {"w": "nf4"})["w"]
    assert [*map(bits, jax.tree.leaves(again["w"]))] == [*map(bits, jax.tree.leaves(want))]
    assert 0 < quant.errors(merged, again)["w"] < 0.13
    with pytest.raises(ValueError, match=r'unmerge.*"w" float32\[128,12\] is stored as `NF4'):
        jlora.unmerge(merged, params)


def test_a_small_update_is_rounded_away_and_said_so():
    base = jlora.quantize({"w": W}, {"w": "nf4"})
    node = jlora.attach(base, {"w": LoraSpec(2)}, key=KEY)["w"]
    node = dataclasses.replace(node, lora_b=node.lora_b + 1e-4)
    with pytest.warns(UserWarning, match=r"rounding to the base's format, NF4\(.*loses"):
        jlora.merge({"w": node}, requantize=True)


@pytest.mark.nightly
def test_merge_refuses_what_it_cannot_store():
    from stored import pack

    node = jlora.attach({"w": pack(W)}, {"w": LoraSpec(2)}, key=KEY)["w"]
    params = {"w": dataclasses.replace(node, lora_b=node.lora_b + 1.0)}
    with pytest.raises(TypeError, match=r'"w".*stored as `Rows`, which is no format of'):
        jlora.merge(params, requantize=True)
    params = adapted(stored("q6_k"))
    with pytest.raises(ValueError, match=r"stored as Q6_K, which is read from GGUF files"):
        jlora.merge(params, requantize=True)


def test_reports_say_what_is_stored():
    params = jlora.attach(
        jlora.quantize({"w": W, "v": W}, {"w": "nf4", "v": "int8"}), {".*": LoraSpec(1)}, key=KEY
    )
    held = params["w"].base.nbytes + params["v"].base.nbytes
    assert held < 128 * 12 * 2
    line = jlora.summary(params)
    assert line.startswith("trainable params: 280 || all params: 3,352 ||")
    assert line.endswith(f"|| stored weights: {held:,} bytes, 12,288 as arrays")
    assert jlora.summary(jax.eval_shape(lambda: params)) == line
    fn = lambda p, x: x @ p["w"] + x @ p["v"]
    table = str(jlora.explain(fn, params, jnp.ones((3, 128))))
    assert "factored (NF4(block=64, double=True), built here)" in table
    assert "factored (Int8(), used as stored)" in table
    table = str(jlora.explain(lambda p: jnp.sort(p["w"]), params))
    assert "(NF4(block=64, double=True), built here)" in table


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_adapters_under_vmap_over_one_stored_base(name, monkeypatch):
    monkeypatch.setattr(_product, "LEAST", 1)
    base = jlora.quantize({"w": W}, {"w": name})
    nodes = [jlora.attach(base, {"w": LoraSpec(2)}, key=jax.random.key(k)) for k in range(3)]
    nodes = [{"w": dataclasses.replace(n["w"], lora_b=n["w"].lora_b + 0.1)} for n in nodes]
    adapters = [jlora.detach(n)[1] for n in nodes]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    x = jax.random.normal(KEY, (3, 4, 128))
    apply = jlora.lora(lambda p, x: x @ p["w"])
    got = jax.vmap(lambda adapter, x: apply(jlora.bind(base, adapter), x))(stacked, x)
    same(got, jnp.stack([apply(n, one) for n, one in zip(nodes, x, strict=True)]), 1e-5)


def test_a_step_changes_the_adapter_alone():
    params = adapted(stored("nf4"))
    tx = jlora.freeze(optax.sgd(1e-5, momentum=0.9))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        loss = lambda p: weigh(jlora.lora(model)(p, TOKENS))
        value, grads = jlora.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return jlora.apply_updates(params, updates), state, value

    codes = lambda p: [bits(x) for x in jax.tree.leaves(jlora.detach(p)[0])]
    before = codes(params)
    params, state, first = step(params, tx.init(params))
    compiled = step._cache_size()
    params, state, second = step(params, state)
    assert second < first and codes(params) == before and step._cache_size() == compiled


@pytest.mark.nightly
def test_capture_and_tie():
    """Inputs are summed as over arrays, and a stored base stays one under a tied adapter."""
    base = jlora.quantize({"q": W, "k": W}, {".*": "nf4"})
    params = jlora.attach(base, {".*": LoraSpec(2)}, key=KEY)
    x = jax.random.normal(KEY, (8, 128))
    moments = jlora.capture(lambda p, x: x @ p["q"] + x @ p["k"], params, x)
    same(moments["q"].second, x.T @ x, 1e-5)
    tied = jlora.tie(params, {".*": ("lora_a",)})
    assert jlora.untie(tied)["k"].lora_a is jlora.untie(tied)["q"].lora_a
    assert is_quant(tied["q"].base)


def test_pefts_files_over_stored_weights(tmp_path):
    """A stack in two layers, a weight that is stored and not adapted, and rules of a file."""
    base = {"layers": jnp.ones((2, 64, 6)), "head": jnp.ones((64, 6))}
    layouts = dict.fromkeys(base, "io")
    base = jlora.quantize(base, {".*": "nf4"}, layouts=layouts)
    params = jlora.attach(base, {"layers": LoraSpec(2)}, key=KEY, layouts=layouts)
    names = {"layers": "m.layers.{}.q_proj.weight", "head": "lm_head.weight"}
    jlora.peft.save(tmp_path, params, names=names)
    loaded = jlora.peft.load(tmp_path, base, names=names, layouts=layouts)
    assert loaded["layers"].base is base["layers"] and loaded["head"] is base["head"]
    assert bits(loaded["layers"].lora_a) == bits(params["layers"].lora_a)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    rules = jlora.peft.rules(config, base, names=names, layouts=layouts)
    assert list(rules) == ["layers"] and rules["layers"].rank == 2


@pytest.mark.nightly
def test_saved_and_restored(tmp_path):
    """The adapter by jlora, the stored base too by Orbax and by Flax."""
    import orbax.checkpoint as ocp

    base = stored("nf4")
    params = adapted(base)
    jlora.checkpoint.save(tmp_path / "adapter", params)
    restored = jlora.checkpoint.restore(tmp_path / "adapter", base)
    leaves = lambda p: [*map(bits, jax.tree.leaves(p))]
    assert leaves(restored) == leaves(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "all", params)
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, params)
        got = checkpointer.restore(tmp_path / "all", target)
    assert leaves(got) == leaves(params) and jax.tree.structure(got) == jax.tree.structure(params)
    data = serialization.to_bytes(params)
    got = serialization.from_bytes(target, data)
    assert leaves(got) == leaves(params) and jax.tree.structure(got) == jax.tree.structure(params)
    other = adapted(stored("int8"))
    with pytest.raises(ValueError, match="format"):
        serialization.from_bytes(other, data)


def test_a_format_of_another_version():
    from jlora.quant._formats import read_format

    assert read_format("int4", {"group": 32}) == quant.Int4(32)
    with pytest.raises(ValueError, match=r'there is no format "nf3"\. Closest: "nf4"'):
        read_format("nf3", {})


def test_exported_with_its_static_fields():
    params = jlora.quantize({"w": W, "v": W}, {"w": quant.NF4(32, double=False), "v": "q4_0"})
    fn = jax.jit(lambda p, x: jlora.lora(lambda p, x: x @ p["w"] + x @ p["v"])(p, x))
    x = jnp.ones((2, 128))
    data = jax.export.export(fn)(params, x).serialize()
    same(jax.export.deserialize(data).call(params, x), fn(params, x), 0)


@pytest.mark.nightly
def test_boxes_and_modules():
    dense = nn.Dense(12, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    x = jnp.ones((3, 128))
    variables = dense.init(KEY, x)
    params = jlora.quantize(variables, {".*/kernel": "nf4"})
    assert is_quant(params["params"]["kernel"].value)
    want = dense.apply(jlora.dequantize(params), x)
    same(jlora.lora(dense.apply)(params, x), want)
    node = jlora.attach(params, {".*/kernel": LoraSpec(2)}, key=KEY)
    same(jlora.lora(dense.apply)(node, x), want)
    assert "stored weights: " in jlora.summary(node)
    assert jlora.detach(node)[0]["params"]["kernel"].value is params["params"]["kernel"].value
    module = nnx.Linear(128, 12, rngs=nnx.Rngs(0))
    quantized = jlora.quantize(module, {"kernel": "int8"})
    assert is_quant(quantized.kernel.get_value()) and not is_quant(module.kernel.get_value())
    same(jlora.lora(lambda m, x: m(x))(quantized, x), module(x), 0.05)


def test_repr_is_short():
    text = repr(jlora.quantize({"w": W}, {"w": "q4_1"})["w"])
    assert re.search(r"QuantArray\(.*format=Q4_1, layout='io'", text) and len(text) < 300


@pytest.mark.nightly
@pytest.mark.parametrize("steps", [1, 2])
def test_loftq_makes_up_for_the_error_of_every_weight(steps):
    layers = jnp.stack([W, 2 * W[::-1]])
    base = {"w": W, "layers": layers, "dora": W.T, "v": W}
    layouts = {"w": "io", "layers": "io", "dora": "oi", "v": "io"}
    params = jlora.quantize(base, {"w": "nf4", "layers": "q4_0", "dora": "int4"}, layouts=layouts)
    rules = {"dora": LoraSpec(2, dora=True), ".*": LoraSpec(3, alpha=5)}
    params = jlora.attach(params, rules, key=KEY, layouts=layouts)
    made = jlora.initializers.loftq(params, base, steps=steps)
    plain, merged = jlora.dequantize(params), jlora.merge(made)
    for name in ("w", "layers", "dora"):
        error = lambda x, name=name: float(jnp.linalg.norm((x - base[name]).ravel()))
        assert error(merged[name]) < 0.95 * error(plain[name].base), name
        assert made[name].base.format == params[name].base.format
        assert made[name].residual == (steps > 1)
        same = jax.tree.leaves(made[name].base), jax.tree.leaves(params[name].base)
        assert [*map(bits, same[0])] == [*map(bits, same[1])] or steps > 1
    assert made["v"].lora_a is params["v"].lora_a
    magnitude = jnp.linalg.norm(merged["dora"], axis=1)
    same_magnitude = made["dora"].extra["magnitude"]
    assert jnp.allclose(same_magnitude, magnitude, rtol=1e-4)


def test_loftq_refuses():
    base = {"w": W}
    quantized = jlora.quantize(base, {"w": "nf4"})
    params = jlora.attach(quantized, {"w": LoraSpec(2)}, key=KEY)
    run = jlora.initializers.loftq
    with pytest.raises(ValueError, match=r"loftq.*`steps` is 0\. Give an integer"):
        run(params, base, steps=0)
    with pytest.raises(ValueError, match=r"no adapted weight in `params` is quantized"):
        run(jlora.attach(base, {"w": LoraSpec(2)}, key=KEY), base)
    with pytest.raises(KeyError, match=r'`base` has no "w".*Closest: "v"'):
        run(params, {"v": W})
    with pytest.raises(ValueError, match=r'"w" float32\[12,128\] in `base` is not the array'):
        run(params, {"w": W.T})
    with pytest.raises(ValueError, match=r'"w" float32\[128,12\] in `base` is not the array'):
        run(params, quantized)
    sliced = jlora.attach(quantized, {"w": LoraSpec(2, slices=((0, 4),))}, key=KEY)
    with pytest.raises(ValueError, match=r"has an update for some of its outputs only"):
        run(sliced, base)
    read = jlora.attach({"w": one("q4_k")}, {"w": LoraSpec(2, layout="oi")}, key=KEY)
    with pytest.raises(ValueError, match=r"stored as Q4_K, which jlora reads but does not write"):
        run(read, {"w": jnp.ones((12, 256))}, steps=2)
    with pytest.raises(ValueError, match=r"Give an alpha above 0"):
        run(jlora.attach(quantized, {"w": LoraSpec(2, alpha=0)}, key=KEY), base)
