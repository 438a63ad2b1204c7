"""Flax's boxes with names of axes: each part of a node has its own, and all functions take them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.checkpoint
import jlora.peft
from jlora import LoraArray, LoraSpec

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
RULES = {".*/kernel": LoraSpec(3, dora=True), "b/bias": "full"}
NAMES = {"a/kernel": "m.a.weight", "b/kernel": "m.b.weight", "b/bias": "m.b.bias"}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def box(value, *names, kind=nn.Partitioned):
    return kind(value, names)


def base(kind=nn.Partitioned):
    """Two layers whose kernels and first bias are boxed."""
    w = jax.random.normal(jax.random.key(2), (6, 8))
    return {
        "a": {"kernel": box(w, "data", "model", kind=kind), "bias": jnp.ones(8)},
        "b": {"kernel": box(w.T, "model", None, kind=kind), "bias": box(jnp.ones(6), "data")},
    }


def run(params, x):
    p = nn.meta.unbox(params)
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + p["b"]["bias"]


def tree(kind=nn.Partitioned, rules=RULES):
    bases, adapter = jlora.detach(jlora.attach(base(kind), rules, key=KEY))
    return jlora.bind(bases, jax.tree.map(lambda x: x + 0.1 if x.ndim else x, adapter))


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_each_part_has_its_own_names():
    specs = nn.get_partition_spec(tree())
    node = specs["a"]["kernel"]
    assert isinstance(node, LoraArray) and node.base == P("data", "model")
    assert (node.lora_a, node.lora_b) == (P("data", None), P(None, "model"))
    assert node.extra == {"magnitude": P("model")} and node.scaling == P()
    assert specs["b"]["kernel"].lora_a == P("model", None) and specs["a"]["bias"] == P()
    assert specs["b"]["bias"].base == specs["b"]["bias"].value == P("data")
    assert tree()["a"]["kernel"].shape == (6, 8) and tree()["a"]["kernel"].rank == 3
    # They are valid for the boxed tree, for the unboxed one, and for the optimizer's state.
    params, m = tree(), mesh()
    for boxed in (params, nn.meta.unbox(params)):
        placed = jax.device_put(boxed, nn.get_sharding(params, m))
        assert jax.tree.leaves(placed)[-1].sharding.mesh == m
    state = jlora.freeze(optax.adam(0.1)).init(params)
    assert nn.get_partition_spec(state)[0].mu["a"]["kernel"].lora_b == P(None, "model")


def test_logical_names_of_a_model_in_a_mesh():
    kernel = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    model = nn.Dense(8, kernel_init=kernel)
    shapes = jax.eval_shape(model.init, KEY, X)
    variables = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    params = jlora.attach(variables, {".*kernel": LoraSpec(3)}, key=KEY)
    params = jax.tree.map(lambda x: x + 0.1, params)
    logical = nn.get_partition_spec(params)
    rules = (("embed", "data"), ("mlp", "model"))
    node = nn.logical_to_mesh(logical, rules)["params"]["kernel"]
    assert (node.base, node.lora_a, node.lora_b) == (
        P("data", "model"),
        P("data", None),
        P(None, "model"),
    )
    with jax.set_mesh(mesh()), nn.logical_axis_rules(rules):
        placed = jax.device_put(params, nn.logical_to_mesh_sharding(logical, mesh(), rules))
        got = jax.jit(jlora.lora(model.apply, fallback="error"))(placed, X)
    np.testing.assert_allclose(got, model.apply(jlora.merge(params), X), rtol=1e-5)


def test_stacks_slices_and_other_layouts():
    w = {"w": box(jnp.ones((2, 4, 6, 8)), "layers", "heads", "embed", "mlp")}
    spec = LoraSpec(3, layout="oio", slices=((0, 3),), form="lora")
    node = nn.get_partition_spec(jlora.attach(w, {"w": spec}, key=KEY))["w"]
    assert node.lora_a == P("layers", "embed", None)
    assert node.lora_b == P("layers", None, None, "mlp"), "slices need not divide"
    assert node.scaling == P()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "kind", [nn.Partitioned, pytest.param(nn.LogicallyPartitioned, marks=pytest.mark.nightly)]
)
def test_functions_of_trees_keep_the_boxes(kind):
    params, plain = tree(kind), base(kind)
    want = run(jlora.merge(params), X)
    assert jax.tree.structure(jlora.merge(params)) == jax.tree.structure(plain)
    same(jax.jit(jlora.lora(run, fallback="error"))(params, X), want)
    bases, adapter = jlora.detach(params)
    assert jax.tree.structure(bases) == jax.tree.structure(plain)
    same(jlora.bind(bases, adapter), params)
    same(jlora.combine(*jlora.partition(params)), params)
    same(jlora.unmerge(jlora.merge(params), params), params)
    same(serialization.from_bytes(params, serialization.to_bytes(params)), params)
    assert jlora.summary(params) == jlora.summary(nn.meta.unbox(params))
    same(jlora.lora(lambda p: p["a"])(params), params["a"])
    report = jlora.explain(run, params, X)
    assert [use.name for use in report.uses] == ["a/kernel", "b/kernel"]
    assert jlora.layouts(run, params, X) == {"a/kernel": "io", "b/kernel": "io"}


def test_an_adapter_without_boxes_gets_those_of_the_base_and_the_other_way():
    params = tree()
    bare = nn.meta.unbox(params)
    same(
        jlora.bind(base(), jlora.detach(bare)[1]),
        jax.tree.map(lambda new, old: new, jlora.bind(base(), jlora.detach(params)[1]), params),
    )
    same(
        jlora.bind(nn.meta.unbox(base()), jlora.detach(params)[1]),
        jlora.bind(nn.meta.unbox(base()), jlora.detach(bare)[1]),
    )


def test_a_step_keeps_the_boxes():
    params = tree()
    tx = jlora.freeze(optax.adam(0.1))
    loss = lambda p: (jlora.lora(run)(p, X) ** 2).mean()
    value, grads = jax.jit(jlora.value_and_grad(loss))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    after = jlora.apply_updates(params, updates)
    assert jax.tree.structure(after) == jax.tree.structure(params) and float(loss(after)) < value


@pytest.mark.nightly
@pytest.mark.parametrize(
    "make",
    [
        lambda: jlora.optim.riemannian(),
        lambda: jlora.optim.lora_rite(1e-2),
        lambda: jlora.optim.lora_plus(4.0),
    ],
)
def test_optimizers_of_factors_take_boxes(make):
    rules = {".*/kernel": LoraSpec(3)}
    params = tree(rules=rules)
    tx, plain = jlora.freeze(make()), jlora.freeze(make())
    grads = jax.tree.map(lambda x: x * 0.5, params)
    got, _ = tx.update(grads, tx.init(params), params)
    bare = nn.meta.unbox(params)
    want, _ = plain.update(nn.meta.unbox(grads), plain.init(bare), bare)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    same(nn.meta.unbox(got), want)


def test_tied_parts_and_arithmetic():
    params = tree(rules={".*/kernel": LoraSpec(3)})
    tied = jlora.tie(params, {".*": ("lora_a",)})
    untied = jlora.untie(tied)
    same(jlora.lora(run)(untied, X), jlora.lora(run)(nn.meta.unbox(untied), X))
    assert nn.get_partition_spec(untied)["a"]["kernel"].lora_a == P("data", None)
    bases, adapter = jlora.detach(tied)
    same(jlora.bind(bases, adapter), tied)
    same(jlora.untie(jlora.bind(base(), adapter)), untied)


def test_a_box_may_name_the_first_axes_only():
    w = {"w": box(jnp.ones((4, 6)), "data")}
    node = jlora.attach(w, {"w": LoraSpec(2)}, key=KEY)["w"]
    assert node.base.names == ("data",)
    assert (node.lora_a.names, node.lora_b.names) == (("data", None), (None, None))


def test_files(tmp_path):
    params = tree()
    jlora.checkpoint.save(tmp_path / "a", params)
    same(jlora.checkpoint.restore(tmp_path / "a", base()), params)
    jlora.peft.save(tmp_path / "b", params, names=NAMES)
    same(jlora.peft.load(tmp_path / "b", base(), names=NAMES), params)


@pytest.mark.nightly
def test_moments_have_no_boxes_inside():
    params = tree(rules={".*/kernel": LoraSpec(3)})
    got = jlora.capture(run, params, X)
    want = jlora.capture(run, nn.meta.unbox(params), X)
    same(nn.meta.unbox(got), want)


# nnx: the names are metadata of a Variable, which has one spec for all parts of a node.


def from_nnx():
    metadata = {"out_sharding": ("data", "model")}
    with jax.set_mesh(mesh()):
        model = nnx.Linear(6, 8, kernel_metadata=metadata, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    return graph, state, jlora.attach(state, {"kernel": LoraSpec(3)}, key=KEY)


def test_specs_from_those_of_nnx():
    graph, state, params = from_nnx()
    specs = jlora.specs(params, nnx.get_partition_spec(state))
    # NNX has one spec a Variable, the base's, and jlora derives the others from it.
    of_nnx = nnx.get_partition_spec(params)
    assert of_nnx["kernel"].get_value() == P("data", "model")
    assert jax.tree.leaves(jlora.specs(params, of_nnx)) == jax.tree.leaves(specs)
    node = specs["kernel"].get_value()
    assert (node.base, node.lora_a, node.lora_b) == (
        P("data", "model"),
        P("data", None),
        P(None, "model"),
    )
    assert specs["bias"].get_value() == P()
    places = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), specs)
    placed = jax.device_put(params, places)
    apply = jax.jit(jlora.lora(lambda p, x: nnx.merge(graph, p)(x)), in_shardings=(places, None))
    np.testing.assert_allclose(
        apply(placed, X), nnx.merge(graph, jlora.merge(params))(X), rtol=1e-5
    )
    # As shardings, which are those of W for A, B and the scaling, JAX refuses them.
    with pytest.raises(ValueError, match=r"rank|partitioned 2 times"):
        jax.device_put(params, nnx.get_named_sharding(params, mesh()))


def test_specs_agree_with_those_of_boxes():
    params = tree()
    got = jlora.specs(params, nn.get_partition_spec(base()))
    want = nn.get_partition_spec(params)
    flat = lambda t: jax.tree.leaves(t, is_leaf=lambda x: isinstance(x, P))
    pad = lambda spec: tuple(spec)
    assert list(map(pad, flat(got))) == list(map(pad, flat(want)))


def test_specs_of_names_and_axes_left_out():
    params = {"w": jnp.ones((4, 6, 8)), "b": jnp.ones(8)}
    params = jlora.attach(params, {"w": LoraSpec(2, layout="io"), "b": "full"}, key=KEY)
    got = jlora.specs(params, {"w": ("layers", ("data", "seq"), "mlp"), "b": None}, ("data", "mlp"))
    assert got["w"].base == ("layers", ("data", "seq"), "mlp")
    assert got["w"].lora_a == ("layers", ("seq",), None) and got["w"].scaling == ("layers",)
    assert got["w"].lora_b == ("layers", None, None) and got["b"].value == P()
    adapter = jlora.partition(params)[0]
    trainable = jlora.specs(dataclasses.replace(params["w"], extra={}), ("layers",))
    assert trainable.lora_b == ("layers", None, None) and adapter["w"].base is None


def test_specs_are_refused():
    params = tree()
    with pytest.raises(KeyError, match=r'"b/bias" has no spec.*Closest: "a/bias"'):
        jlora.specs(params, {"a": nn.get_partition_spec(base())["a"]})
    specs = {
        "a": {"kernel": P("data", None, "model"), "bias": P()},
        "b": {"kernel": P(), "bias": P()},
    }
    with pytest.raises(ValueError, match=r"more entries than .*6,8.* has axes"):
        jlora.specs(params, specs)
