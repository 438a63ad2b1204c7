"""Stored weights in `base`: one leaf to everything, built where they are multiplied and dropped."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
import pytest
from cases_forms import CASES
from helpers import adapted, bits, coarse, loss_of, same, transform
from stored import Rows, base_of, is_rows, over, pack

import jlora
import jlora.checkpoint
from jlora import LoraSpec, initializers
from jlora._base import is_stored

IN_CI = (
    *("matmul", "torch_layout", "cast", "fused_qkv", "traced_index", "expert_per_token", "scaled"),
    *("scan_remat", "scan_rows", "cond", "ragged", "custom_vjp_weight", "custom_jvp_weight"),
    *("linen_attention", "nnx_linear", "joined_inputs", "product_of_weights", "carried_and_scaled"),
    *("lookup_under_vmap", "shard_map_rows", "dora_tied", "lora_xs_experts", "vera_bfloat16"),
)
# Int8 has products of its own; the other formats of `jlora.quant` are in test_quant.py.
IN_CI_OF_INT8 = ("cast", "tied", "linen_attention")
# A loop or a branch makes another weight of it, which is an array.
CHANGED = (
    *("running_sum_of_a_stack", "scan_makes_weights"),
    *("carried_and_scaled", "branch_of_weights"),
)
ALIKE = ("two_of_one_shape",)  # its activations, which are kept, have the shape of its weights


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            dataclasses.replace(case, stored=how),
            marks=() if case.name in names else pytest.mark.nightly,
        )
        for how, names in ((True, IN_CI), ("int8", IN_CI_OF_INT8))
        for case in CASES
    ],
    ids=repr,
)
def test_values_and_gradients_are_those_over_the_dequantized_weight(case):
    params = adapted(case)
    dense = over(params, jlora.merge(base_of(case)))
    run = loss_of(case, transform(case))

    def slopes(params: Any) -> tuple[Any, Any, Any]:
        trainable, frozen = jlora.partition(params)
        loss = lambda t: run(jlora.combine(t, frozen), *case.args)
        return *jax.jit(jax.value_and_grad(loss))(trainable), jax.eval_shape(
            lambda t: jax.vjp(loss, t)[1], trainable
        )

    value, gradients, kept = slopes(params)
    want, wanted, _ = slopes(dense)
    # The products of int8 round the weight elsewhere, (x codes) scale.
    most = (1e-6 if case.stored is True else 1e-5) * coarse(case)
    same(value, want, most)
    for got, x in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        same(got, x, most)
    if not case.materialized and case.name not in (*CHANGED, *ALIKE):
        keeps_no_weight(kept, params, dense)


def keeps_no_weight(kept: Any, params: Any, dense: Any) -> None:
    """The backward pass keeps no float array of a weight's size, but for activations."""
    sizes = {x.shape for x in jax.tree.leaves(params, is_leaf=is_stored) if is_stored(x)}
    sizes |= {shape[::-1] for shape in sizes}
    inputs = {x.shape for x in jax.tree.leaves(dense) if x.shape not in sizes}
    found = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert not {x.shape for x in found} & (sizes - inputs)


def tree() -> Any:
    """Two stored weights, one of them adapted, a stack of three, and a bias."""
    keys = jax.random.split(jax.random.key(0), 3)
    w, v = (pack(jax.random.normal(k, (5, 4))) for k in keys[:2])
    return {
        "w": w,
        "v": v,
        "stack": pack(jax.random.normal(keys[2], (3, 4, 4)), own=2),
        "bias": jnp.ones(4),
    }


def model(p: Any, x: Any) -> Any:
    x = jnp.tanh(x @ p["w"] + x @ p["v"] + p["bias"][None])
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]


X = jax.random.normal(jax.random.key(5), (3, 5))
RULES = {"w": LoraSpec(2), "stack": LoraSpec(2, layout="io"), "bias": "full"}


def trained(base: Any = None, **spec: Any) -> Any:
    """The tree with an adapter on it that does something."""
    rules = {k: dataclasses.replace(r, **spec) if k != "bias" else r for k, r in RULES.items()}
    params = jlora.attach(tree() if base is None else base, rules, key=jax.random.key(1))
    t, f = jlora.partition(params)
    return jlora.combine(jax.tree.map(lambda x: x + 0.1, t), f)


def test_detach_gives_back_the_very_node_and_bind_puts_it_on_again():
    base = tree()
    params = jlora.attach(base, RULES, key=jax.random.key(1))
    back, adapter = jlora.detach(params)
    assert all(back[k] is base[k] for k in ("w", "v", "stack"))
    assert adapter["w"].base is None and adapter["v"] is None
    again = jlora.bind(back, adapter)
    assert again["w"].base is base["w"] and again["v"] is base["v"]
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_partition_takes_a_stored_weight_as_one_leaf():
    params = trained()
    trainable, frozen = jlora.partition(params)
    assert trainable["w"].base is None and trainable["v"] is None
    assert frozen["w"].base is params["w"].base and frozen["v"] is params["v"]
    assert jax.tree.structure(jlora.combine(trainable, frozen)) == jax.tree.structure(params)
    assert {*jax.tree.leaves(jlora.labels(params)["v"])} == {"frozen"}


def test_a_step_leaves_what_is_stored_as_it_was():
    params = trained(dora=True)
    tx = jlora.freeze(optax.adamw(1e-2))
    state = tx.init(params)
    held = sum(x.size for x in jax.tree.leaves(state) if hasattr(x, "size"))
    assert held == 2 * sum(x.size for x in jax.tree.leaves(jlora.partition(params)[0])) + 1

    @jax.jit
    def step(trainable: Any, frozen: Any) -> Any:
        loss = lambda t: (jlora.lora(model)(jlora.combine(t, frozen), X) ** 2).sum()
        return jax.tree.map(lambda x, g: x - 0.1 * g, trainable, jax.grad(loss)(trainable))

    trainable, frozen = jlora.partition(params)
    after = jlora.combine(step(trainable, frozen), frozen)
    assert all(bits(a) == bits(b) for a, b in zip(*map(codes, (params, after)), strict=True))
    assert bits(after["w"].lora_a) != bits(params["w"].lora_a)


def codes(params: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(params) if x.dtype == jnp.int8]


def test_merge_builds_all_and_unmerge_is_refused():
    params = trained()
    merged = jlora.merge(params)
    assert not any(map(is_rows, jax.tree.leaves(merged, is_leaf=is_rows)))
    same(model(merged, X), jlora.lora(model)(params, X), 1e-5)
    with pytest.raises(ValueError, match=r"unmerge.*\"stack\" float32.*stored as `Rows`.*detach"):
        jlora.unmerge(merged, params)


def test_a_plain_quantized_model_runs():
    base = tree()
    dense = jax.tree.map(lambda x: x.dequantize() if is_rows(x) else x, base, is_leaf=is_rows)
    same(jlora.lora(model)(base, X), model(dense, X))
    back = jlora.lora(lambda p: p)(base)
    assert back["w"] is base["w"]


def test_it_is_counted_by_what_it_stands_for():
    params = trained()
    dense = over(params, jlora.merge(tree()))
    line, stored = jlora.summary(params), " || stored weights: 176 bytes, 352 as arrays"
    assert line == jlora.summary(dense) + stored
    assert jlora.layouts(model, tree(), X) == jlora.layouts(model, jlora.merge(tree()), X)
    ours, theirs = (jlora.explain(model, p, X) for p in (params, dense))
    alone = [u._replace(line="", base="") for u in ours.uses]
    assert alone == [u._replace(line="") for u in theirs.uses]
    assert {u.base for u in ours.uses} == {"Rows, built here"}


def test_an_adapter_over_stored_weights_is_saved_and_restored(tmp_path):
    params = trained(dora=True)
    jlora.checkpoint.save(tmp_path / "adapter", params)
    restored = jlora.checkpoint.restore(tmp_path / "adapter", tree())
    trainable = lambda p: jax.tree.leaves(jlora.partition(p)[0])
    assert list(map(bits, trainable(restored))) == list(map(bits, trainable(params)))
    assert is_rows(restored["w"].base) and is_rows(restored["v"])


@pytest.mark.nightly
def test_capture_sums_the_same_inputs():
    params = trained()
    dense = over(params, jlora.merge(tree()))
    got, want = (jlora.capture(model, p, X) for p in (params, dense))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(a, b)
    chosen = initializers.eva(params, got)
    assert is_rows(chosen["w"].base) and not chosen["w"].residual


def test_weights_share_parts_over_stored_bases():
    base = {"q": tree()["w"], "k": tree()["v"]}
    params = jlora.attach(base, {".*": LoraSpec(2)}, key=jax.random.key(0))
    tied = jlora.tie(params, {".*": ("lora_a",)})
    assert jlora.untie(tied)["k"].lora_a is jlora.untie(tied)["q"].lora_a
    assert is_rows(tied["q"].base)


REFUSED = {
    "full": (
        lambda: jlora.attach(tree(), {"w": "full"}, key=jax.random.key(0)),
        TypeError,
        r'`jlora.attach`: "w" float32\[5,4\] is stored as `Rows`, which has no gradient',
    ),
    "residual": (
        lambda: trained(init=initializers.pissa),
        ValueError,
        r"subtracts A B from the weight, but the weight is stored as `Rows`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    run, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        run()


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Int8 with one scale, whose products are its own: (x · codes) · scale."""

    codes: Any
    scale: Any
    asked: ClassVar[list[Any]] = []
    dtype = jnp.dtype("float32")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dequantize(self) -> jax.Array:
        Scaled.asked.append("built")
        return self.codes.astype(jnp.float32) * self.scale

    def dot(self, x: jax.Array, axes: tuple[tuple[int, ...], ...], dtype: Any) -> Any:
        if len(axes[0]) != 1:
            return NotImplemented
        Scaled.asked.append(axes)
        y = jax.lax.dot_general(x, self.codes.astype(x.dtype), (axes, ((), ())))
        return (y.astype(jnp.float32) * self.scale).astype(dtype)


PRODUCTS: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...], Any]] = {
    "dense": (lambda w, x: x @ w, (3, 5), (((1,), (0,)))),
    "transposed": (lambda w, x: x @ w.T, (3, 4), ((1,), (1,))),
    "on_the_left": (lambda w, x: w.T @ x, (5, 3), ((0,), (0,))),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (3, 5), ((1,), (0,))),
    "batched": (lambda w, x: jnp.einsum("bi,io->bo", x, w), (3, 5), ((1,), (0,))),
    "reshaped": (lambda w, x: x @ w.reshape(10, 2), (3, 10), "built"),
    "both": (lambda w, x: jnp.einsum("io,io->", x, w), (5, 4), "built"),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_format_owns_its_product(name):
    fn, shape, asked = PRODUCTS[name]
    w = Scaled(pack(jax.random.normal(jax.random.key(0), (5, 4))).codes, jnp.float32(0.01))
    x = jax.random.normal(jax.random.key(1), shape)
    want = jax.jit(fn)(w.dequantize(), x)
    Scaled.asked.clear()
    got = jax.jit(jlora.lora(fn))(w, x)
    assert set(Scaled.asked) == {asked}
    same(got, want, 2**-6 if got.dtype == jnp.bfloat16 else 1e-6)
    params = jlora.attach({"w": w}, {"w": LoraSpec(2)}, key=jax.random.key(2))
    adapted_too = jlora.lora(lambda p, x: fn(p["w"], x), fallback="materialize")
    same(adapted_too(params, x), want, 2**-6 if got.dtype == jnp.bfloat16 else 1e-6)


def test_layers_that_share_shapes_share_one_trace():
    """What is noted of a weight is equal by value, so an inner jit is walked once."""
    asked = []

    class Counted(Rows):
        def dequantize(self) -> jax.Array:
            asked.append(1)
            return super().dequantize()

    jax.tree_util.register_dataclass(Counted, ("codes", "scale"), ("own", "kind"))

    @jax.jit
    def layer(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w.T)

    def count(layers: int) -> int:
        rows = pack(jax.random.normal(jax.random.key(0), (4, 4)))
        w = Counted(rows.codes, rows.scale, rows.own, rows.kind)
        params = {f"w{k}": w for k in range(layers)}
        spec = LoraSpec(2, layout="oi")
        params = jlora.attach(params, {".*": spec}, key=jax.random.key(0))

        def deep(p: Any, x: Any) -> Any:
            for k in range(layers):
                x = layer(p[f"w{k}"].T.T, x)
            return x

        asked.clear()
        jax.make_jaxpr(jlora.lora(deep))(params, jnp.ones((3, 4)))
        return len(asked)

    assert count(3) == count(1) == 1


WIDE = 256


def stack_of(layers: int, **spec: Any) -> Any:
    """A stack of stored weights, as shapes, and the bytes of one layer's weight."""
    one = jax.ShapeDtypeStruct((layers, WIDE, WIDE), jnp.float32)
    base = {"w": jax.eval_shape(functools.partial(pack, own=2), one)}
    attach = functools.partial(
        jlora.attach, rules={"w": LoraSpec(2, layout="io", **spec)}, key=jax.random.key(0)
    )
    return jax.eval_shape(attach, base)


def temporary(fn: Callable[..., Any], *args: Any) -> int:
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dora", [False, True])
def test_a_scan_builds_one_layer_at_a_time(dora):
    """And DoRA's norm does; W and what the products of one layer need is all that is allocated."""
    run = jlora.lora(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0])
    x = jax.ShapeDtypeStruct((8, WIDE), jnp.float32)
    weight = WIDE * WIDE * 4
    assert weight <= temporary(run, stack_of(8, dora=dora), x) < 2.5 * weight
