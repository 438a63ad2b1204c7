"""What goes in and out of `lora(fn)`, and the exactness of the trees around it."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jlora
from jlora import FullArray, LoraArray, LoraSpec, checkpoint

X = jnp.ones((3, 6))


def params(dtype=jnp.float32, **rules):
    base = {
        "w": (jax.random.normal(jax.random.key(0), (6, 4)) * 0.1).astype(dtype),
        "b": jnp.zeros(4, dtype),
    }
    spec = LoraSpec(2, init=jlora.initializers.gaussian)
    rules = {"w": spec, **rules}
    tree = jlora.attach(base, rules, key=jax.random.key(1))
    w = tree["w"]
    return {**tree, "w": LoraArray(w.base, w.lora_a, w.lora_b + 0.5, w.scaling, w.layout)}


def test_python_arguments_stay_python():
    def fn(p, x, train, width, mode, activation, *, rate):
        assert train is True and width == 2 and mode == "wide" and rate == 0.5
        out = activation(x @ p["w"])
        return (out.reshape(width, -1) if train else out) * rate

    got = jlora.lora(fn)(params(), X, True, 2, "wide", jnp.tanh, rate=0.5)
    want = fn(jlora.merge(params()), X, True, 2, "wide", jnp.tanh, rate=0.5)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_any_pytree_comes_back():
    def fn(p, x):
        return {"out": x @ p["w"], "n": 3, "name": "linear", "none": None, "f": [jnp.tanh, 0.5]}

    out = jlora.lora(fn)(params(), X)
    assert (out["n"], out["name"], out["none"], out["f"]) == (3, "linear", None, [jnp.tanh, 0.5])
    np.testing.assert_allclose(out["out"], X @ jlora.merge(params())["w"], rtol=1e-5)


def test_an_untouched_weight_comes_back_as_its_node():
    tree = params()
    out, state = jlora.lora(lambda p, x: (x @ p["w"], p))(tree, X)
    assert state["w"] is tree["w"] and out.shape == (3, 4)


def test_a_changed_weight_comes_back_summed():
    tree = params()
    got = jlora.lora(lambda p: p["w"].T)(tree)
    np.testing.assert_allclose(got, jlora.merge(tree)["w"].T, rtol=1e-6)


def test_numpy_arguments_and_plain_parameters():
    tree = params()
    got = jlora.lora(lambda p, x: x @ p["w"])(tree, np.ones((3, 6), np.float32))
    np.testing.assert_allclose(got, X @ jlora.merge(tree)["w"], rtol=1e-5)
    seen = []
    jlora.lora(lambda p: seen.append(p["w"]))(jlora.detach(tree)[0])
    assert seen[0] is tree["w"].base, "without adapters the function is called as it is"


def test_full_arrays_are_seen_by_their_value():
    tree = params(b="full")
    tree["b"] = FullArray(tree["b"].base, jnp.full(4, 2.0))
    out = jlora.lora(lambda p, x: x @ p["w"] + p["b"][None])(tree, X)
    np.testing.assert_allclose(out, X @ jlora.merge(tree)["w"] + 2, rtol=1e-5)
    assert jnp.array_equal(jlora.merge(tree)["b"], jnp.full(4, 2.0))
    assert jnp.array_equal(jlora.detach(tree)[0]["b"], jnp.zeros(4))


def test_attach_needs_no_weights():
    shapes = jax.eval_shape(
        lambda k: jlora.attach({"w": jnp.ones((6, 4))}, {"w": LoraSpec(2)}, key=k),
        jax.random.key(0),
    )
    assert shapes["w"].lora_a.shape == (6, 2)
    assert jlora.summary(shapes).startswith("trainable params: 20 || all params: 44 ||")


def test_the_same_path_has_the_same_init():
    base = {"a": jnp.ones((6, 4)), "w": jnp.ones((6, 4))}
    one = jlora.attach(base, {"w": LoraSpec(2)}, key=jax.random.key(0))
    two = jlora.attach(base, {"a|w": LoraSpec(2)}, key=jax.random.key(0))
    assert jnp.array_equal(one["w"].lora_a, two["w"].lora_a)
    assert not jnp.array_equal(two["a"].lora_a, two["w"].lora_a)


def test_a_stack_has_its_own_factors_each():
    tree = jlora.attach(
        {"w": jnp.ones((3, 6, 4))}, {"w": LoraSpec(2, layout="io")}, key=jax.random.key(0)
    )
    a = tree["w"].lora_a
    assert a.shape == (3, 6, 2) and tree["w"].scaling.shape == (3,)
    assert not jnp.array_equal(a[0], a[1])


@pytest.mark.parametrize("way", ["detach", "partition"])
def test_taking_apart_and_putting_together_is_the_identity(way):
    tree = params(b="full")
    apart, together = {
        "detach": (jlora.detach, jlora.bind),
        "partition": (jlora.partition, jlora.combine),
    }[way]
    again = together(*apart(tree))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True))


def test_bfloat16_bases_keep_float32_factors_and_round_once():
    tree = params(jnp.bfloat16)
    w = tree["w"]
    assert w.lora_a.dtype == w.lora_b.dtype == jnp.float32
    exact = np.asarray(w.base, np.float64) + float(w.scaling) * (
        np.asarray(w.lora_a, np.float64) @ np.asarray(w.lora_b, np.float64)
    )
    rounded = jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16)
    merged = jlora.merge(tree)["w"]
    assert merged.dtype == jnp.bfloat16
    assert float((merged == rounded).mean()) > 0.95  # float32 sums may fall beside a tie
    twice = w.base + jnp.asarray(exact - np.asarray(w.base, np.float64), jnp.bfloat16)
    assert not jnp.array_equal(merged, twice), "rounding the delta first would differ"
    out = jlora.lora(lambda p, x: x @ p["w"])(tree, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


@pytest.mark.sample(2)
@pytest.mark.parametrize("dora", [False, True])
def test_merging_keeps_a_float64_base(dora):
    with jax.enable_x64(True):
        base = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))}
        tree = jlora.attach(base, {"w": LoraSpec(2, dora=dora)}, key=jax.random.key(0))
        assert tree["w"].lora_a.dtype == jnp.float32
        tree["w"] = dataclasses.replace(tree["w"], lora_b=jnp.ones((2, 4), jnp.float32) / 3)
        merged, x = jlora.merge(tree), X.astype(jnp.float64)
        assert merged["w"].dtype == jnp.float64
        out = jlora.lora(lambda p, x: x @ p["w"])(tree, x)
        np.testing.assert_allclose(out, x @ merged["w"], rtol=1e-13, atol=1e-13)
        again = jlora.unmerge(merged, tree)
        np.testing.assert_allclose(again["w"].base, base["w"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: X @ w,
        lambda w: jnp.multiply(w, 2.0),
        lambda w: jnp.asarray(w),
        lambda w: np.asarray(w),
        lambda w: jax.jit(lambda x: x @ w)(X),
        lambda w: nn.Dense(4).apply({"params": {"kernel": w, "bias": jnp.ones(4)}}, X),
    ],
)
@pytest.mark.parametrize("rule", [LoraSpec(2), "full"])
def test_a_function_that_is_not_wrapped_says_so(use, rule):
    tree = jlora.attach({"w": jnp.ones((6, 4))}, {"w": rule}, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"Wrap it, `jlora.lora\(fn\)\(params, ...\)`"):
        use(tree["w"])


def test_what_is_no_array_is_not_counted():
    tree = params() | {"activation": jnp.tanh, "slope": 0.1, "name": "w"}
    assert jlora.summary(tree) == jlora.summary(params())


def test_the_narrow_products_can_be_float32():
    tree = params(jnp.bfloat16)
    x = X.astype(jnp.bfloat16) * 1.7
    narrow = jlora.lora(lambda p, x: x @ p["w"])
    wide = jlora.lora(lambda p, x: x @ p["w"], dtype=jnp.float32)

    def cast(fn, shape):
        """How often A is cast."""
        return str(jax.make_jaxpr(fn)(tree, x)).count(f"bf16{shape}")

    def step(fn):
        return jax.grad(lambda p, x: fn(p, x).astype(jnp.float32).sum())

    assert cast(wide, "[6,2]") == 0 < cast(narrow, "[6,2]")
    assert cast(step(wide), "[2,6]") == 0 < cast(step(narrow), "[2,6]")
    assert wide(tree, x).dtype == jnp.bfloat16


def test_unmerge_undoes_merge():
    tree = params()
    again = jlora.unmerge(jlora.merge(tree), tree)
    np.testing.assert_allclose(again["w"].base, tree["w"].base, atol=1e-6)
    assert again["w"].lora_a is tree["w"].lora_a


def test_unmerge_needs_the_original_of_a_full_parameter():
    tree = params(b="full")
    adapter = jlora.detach(tree)[1]
    with pytest.raises(
        ValueError, match=r'`params` lacks the original of "b", which is trained in full'
    ):
        jlora.unmerge(jlora.merge(tree), adapter)
    assert jlora.unmerge(jlora.merge(tree), tree)["b"].base is tree["b"].base


def test_merged_inference_is_the_base_program():
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    tree = params()
    base, merged = (
        jax.jit(fn).lower(p, X).compile().as_text()
        for p in (jlora.detach(tree)[0], jlora.merge(tree))
    )
    assert base == merged


def test_explain_names_what_is_never_used():
    report = jlora.explain(lambda p, x: x, params(), X)
    assert report.unused == ("w",) and "never used" in str(report)


def test_explain_speaks_of_every_argument_that_is_adapted():
    other = {"v": params()["w"]}
    report = jlora.explain(lambda x, p, q: (x @ p["w"]) @ q["v"].T, X, params(), q=other)
    assert [use.name for use in report.uses] == ["w", "v"] and report.unused == ()


def test_a_symbolic_batch_is_exported():
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    x = jax.ShapeDtypeStruct(export.symbolic_shape("b,6"), jnp.float32)
    tree = params()
    leaves, structure = jax.tree.flatten(tree)
    run = jax.jit(lambda leaves, x: jlora.lora(fn)(structure.unflatten(leaves), x))
    exported = export.export(run)(leaves, x)
    for n in (1, 3, 40):
        x = jnp.linspace(0, 1, n * 6).reshape(n, 6)
        np.testing.assert_allclose(exported.call(leaves, x), fn(jlora.merge(tree), x), rtol=1e-5)


def test_eight_bits_do_not_overflow_between_the_factors():
    def fn(p, x):
        dims = (((1,), (0,)), ((), ()))
        narrow = p["w"].astype(x.dtype)
        return jax.lax.dot_general(x, narrow, dims, preferred_element_type=jnp.float32)

    x = jnp.full((4, 6), 300.0).astype(jnp.float8_e4m3fn)
    tree = params()
    base = jlora.detach(tree)[0]["w"].astype(x.dtype).astype(jnp.float32)
    wide, node = x.astype(jnp.float32), tree["w"]
    want = wide @ base + node.scaling * (wide @ node.lora_a) @ node.lora_b
    np.testing.assert_allclose(jlora.lora(fn)(tree, x), want, rtol=0.05, atol=10)


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


def test_a_field_named_value_is_no_box(tmp_path):
    base = {"attn": Attention(*jnp.ones((3, 6, 4)))}
    tree = jlora.attach(base, {r".*/(query|value)": LoraSpec(2)}, key=jax.random.key(0))
    assert [isinstance(x, LoraArray) for x in tree["attn"]] == [True, False, True]
    report = jlora.explain(lambda p, x: x @ p["attn"].value, tree, X)
    assert report.uses[0].name == "attn/value" and report.unused == ("attn/query",)
    assert jlora.layouts(lambda p, x: x @ p["attn"].value, base, X) == {"attn/value": "io"}
    alone = jlora.attach(base, {r".*/value": LoraSpec(2)}, key=jax.random.key(0))
    checkpoint.save(tmp_path / "a", jlora.detach(alone)[1])  # all else is None
    assert jlora.summary(checkpoint.restore(tmp_path / "a", base)) == jlora.summary(alone)
