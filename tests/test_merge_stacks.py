"""Merging a stack: the same weights as all at once, on a mesh without collectives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, _merge, forms

CASES = {
    "dense": ((6, 32, 24), {"layout": "io"}),
    "torch": ((6, 24, 32), {"layout": "oi"}),
    "heads": ((6, 4, 8, 32), {"layout": "oio"}),
    "experts": ((3, 2, 16, 8), {"layout": "io"}),
    "slices": ((6, 32, 24), {"layout": "io", "slices": ((0, 8), (16, 24))}),
    "xs": ((6, 32, 24), {"layout": "io", "form": "lora_xs"}),
    "dora": ((6, 24, 32), {"layout": "oi", "dora": True}),
}
SOME = [("dense", jnp.bfloat16), ("dora", jnp.float32)]


def node_of(name, dtype):
    shape, how = CASES[name]
    w = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    node = jlora.attach({"w": w}, {"w": LoraSpec(4, **how)}, key=jax.random.key(0))["w"]
    keys = jax.random.split(jax.random.key(2), len(node.parts))
    moved = {
        name: x + jax.random.normal(key, x.shape, x.dtype) / 3
        for (name, x), key in zip(node.parts.items(), keys, strict=True)
    }
    return node.with_parts(moved)


def at_once(node):
    """The sum in float32, of all layers, rounded once."""
    return jax.jit(lambda node: forms.weight(node).astype(node.dtype))(node)


def close(got, want, dtype):
    """Up to the order of a sum in float32; after rounding, one spacing."""
    wide = [np.asarray(x, np.float32) for x in (got, want)]
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*wide, rtol=eps, atol=4e-6)
    assert np.mean(wide[0] != wide[1]) < (0.01 if dtype == jnp.bfloat16 else 1.0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=[] if case in SOME else [pytest.mark.nightly], id=str(case))
        for case in itertools.product(CASES, (jnp.float32, jnp.bfloat16))
    ],
)
def test_as_all_at_once(name, dtype):
    node = node_of(name, dtype)
    want = at_once(node)
    got = jlora.merge({"w": node})["w"]
    assert got.dtype == dtype
    close(got, want, dtype)
    close(jax.jit(jlora.merge)({"w": node})["w"], want, dtype)
    lora = forms.as_lora(_merge._with_stacked_scaling(node))
    for together in (1, 2, 3):  # pieces as on accelerators
        if not node.shape[0] % together:
            run = jax.jit(functools.partial(_merge._in_turn, together=together, devices=4))
            close(run(lora), want, dtype)


def test_a_stored_stack_is_built_in_turn():
    node = node_of("dense", jnp.bfloat16)
    stored = jlora.quantize({"w": node.base}, {"w": "int8"}, layouts={"w": "io"})["w"]
    params = jlora.attach({"w": stored}, {"w": LoraSpec(4, layout="io")}, key=jax.random.key(0))
    params["w"] = params["w"].with_parts(node.parts)
    close(jlora.merge(params)["w"], at_once(params["w"]), jnp.bfloat16)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P("x", "y")),
        pytest.param(AxisType.Auto, P(None, "x", "y"), marks=pytest.mark.nightly),
        pytest.param(AxisType.Explicit, P("x", "y"), marks=pytest.mark.nightly),
        (AxisType.Explicit, P(None, "x", "y")),
    ],
    ids=str,
)
def test_no_collective_on_a_mesh(kind, spec):
    """Also of a stack that is sharded along its first axis, in bfloat16 and float32."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    params = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        w = jax.random.normal(jax.random.key(1), (8, 32, 24)).astype(dtype)
        params[dtype.dtype.name] = jax.device_put(w, NamedSharding(mesh, spec))
    rules = {".*": LoraSpec(4, layout="io", init=jlora.initializers.uniform)}
    params = jlora.attach(params, rules, key=jax.random.key(0))
    if kind == AxisType.Auto:
        out = {k: x.base.sharding for k, x in params.items()}
        text = jax.jit(jlora.merge, out_shardings=out).lower(params).compile().as_text()
        kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        assert not [name for name in kinds if name in text]
    for name, got in jlora.merge(params).items():
        assert got.sharding.is_equivalent_to(params[name].base.sharding, 3)
        alone = jax.tree.map(np.asarray, params[name])
        close(got, at_once(alone), got.dtype)


@pytest.mark.parametrize("shape", [(0, 12, 8), (2, 0, 12, 8)], ids=str)
@pytest.mark.parametrize(
    "how",
    [{}, {"init": jlora.initializers.pissa}, {"form": "lora_xs"}, {"form": "mica"}],
    ids=["lora", "pissa", "lora_xs", "mica"],
)
def test_a_stack_without_elements(shape, how):
    rules = {"w": LoraSpec(2, layout="io", **how)}
    params = jlora.attach({"w": jnp.ones(shape)}, rules, key=jax.random.key(0))
    assert params["w"].lora_a.shape == (*shape[:-1], 2)
    assert jlora.merge(params)["w"].shape == shape


@pytest.mark.parametrize(
    ("shape", "spec", "layout"),
    [
        ((4, 5, 8), P("x", None, "y"), "ioo"),
        ((5, 8, 3), P(None, "x"), "iio"),
        ((2, 5, 8, 3), P(None, None, "x"), "iio"),
    ],
    ids=str,
)
@pytest.mark.parametrize("init", [None, jlora.initializers.olora])
def test_axes_that_are_one_side_on_an_explicit_mesh(shape, spec, layout, init):
    """Two axes of inputs or outputs, of which the second is sharded, are one axis of a matrix."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    w = jax.random.normal(jax.random.key(1), shape)
    rules = {"w": LoraSpec(2, layout=layout, init=init)}
    at = NamedSharding(mesh, spec)
    params = jlora.attach({"w": jax.device_put(w, at)}, rules, key=jax.random.key(0))
    for merge in (jlora.merge, jax.jit(jlora.merge)):
        with jax.set_mesh(mesh):
            merged = merge(params)["w"]
        assert merged.sharding.is_equivalent_to(at, len(shape))
        np.testing.assert_allclose(merged, w, atol=1e-5)
