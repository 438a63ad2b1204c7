"""Stored weights on a mesh: sharded codes and scales compute what they compute on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mesh_model
import numpy as np
import pytest
from helpers import bits, equations
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

import jlora
from jlora import LoraSpec, quant
from jlora.quant import _product

# path: shape, spec, layout, spec of the codes
WEIGHTS = {
    "embedding": ((32, 64), P("tp", "fsdp"), "oi", P("tp", "fsdp")),
    "q": ((64, 4, 16), P("fsdp", "tp"), "ioo", P("tp", "fsdp")),
    "up": ((64, 128), P("fsdp", "tp"), "io", P("tp", "fsdp")),
    "down": ((128, 64), P("tp", "fsdp"), "io", P("fsdp", "tp")),
    "layers": ((2, 64, 64), P(None, "fsdp", "tp"), "io", P(None, "tp", "fsdp")),
}
TOKENS = np.random.default_rng(1).integers(0, 32, (8, 4))
RULES = {"up|q": LoraSpec(2, layout=None), ".*": LoraSpec(2, dora=True)}
LAYOUTS = {path: layout for path, (_, _, layout, _) in WEIGHTS.items()}


@functools.cache
def base() -> Any:
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32) / 8)
    return {path: draw(shape) for path, (shape, *_) in WEIGHTS.items()}


def on(mesh: Any) -> Any:
    """The weights on a mesh."""
    at = {path: NamedSharding(mesh, spec) for path, (_, spec, *_) in WEIGHTS.items()}
    return jax.device_put(base(), at)


def attached(weights: Any, name: str) -> Any:
    format = quant.Int4(group=16) if name == "int4" else name  # a row has 64 inputs, or more
    stored = jlora.quantize(weights, {".*": format}, layouts=LAYOUTS)
    params = jlora.attach(stored, RULES, key=jax.random.key(0), layouts=LAYOUTS)
    trained, frozen = jlora.partition(params)
    return jlora.combine(jax.tree.map(lambda x: x + 0.02, trained), frozen)


def model(p: Any, tokens: Any) -> Any:
    x = p["embedding"][tokens]
    heads = jnp.einsum("btd,dhk->bthk", x, p["q"])
    x = x + jnp.tanh(heads.reshape(*x.shape[:2], -1) + x @ p["up"][:, :64])
    x = x + jnp.tanh(x @ p["up"]) @ p["down"]
    x = lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["layers"])[0]
    return x @ p["embedding"].T


@jax.jit
def run(trained: Any, frozen: Any, tokens: Any) -> Any:
    """Logits, and the gradient of a loss."""

    def loss(trained: Any) -> Any:
        logits = jlora.lora(model, fallback="error")(jlora.combine(trained, frozen), tokens)
        return jnp.mean(logits**2), logits

    return jax.grad(loss, has_aux=True)(trained)[::-1]


def near(got: Any, want: Any) -> None:
    most = max(float(abs(x).max()) for x in jax.tree.leaves(want))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * most)


def nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("name", "shape", "least"),
    [
        *(
            nightly(name, (4, 2), _product.LEAST)
            for name in ("nf4", "int8", "q4_1", "q8_0", "int4")
        ),
        *(nightly(name, (4, 2), 1) for name in ("int8", "nf4", "q4_1")),
        *(nightly(name, (2, 4), _product.LEAST) for name in ("int8", "nf4", "q4_1")),
    ],
)
def test_as_on_one_device(name: str, shape: Any, least: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(_product, "LEAST", least)
    run.clear_cache()
    want_params = attached(base(), name)
    mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    params = attached(on(mesh), name)
    for path, (_, spec, layout, of_codes) in WEIGHTS.items():
        node, alone = params[path], want_params[path]
        codes = max(node.base.parts, key=lambda k: node.base.parts[k].nbytes)
        made, want = node.base.parts[codes], alone.base.parts[codes]
        assert bits(made) == bits(want), path
        assert made.sharding.is_equivalent_to(NamedSharding(mesh, of_codes), made.ndim), path
        first = NamedSharding(mesh, P(*spec[: len(node.shape) - len(layout) + 1]))
        part = node.lora_a if layout[0] == "i" else node.lora_b
        assert layout[0] == "o" or part.sharding.is_equivalent_to(first, part.ndim), path
    # The mean of NF4's scales is rounded otherwise on a mesh: the same bytes, where those are.
    params = jax.device_put(want_params, jax.tree.map(lambda x: x.sharding, params))
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("fsdp")))
    for got, want in zip(
        run(*jlora.partition(params), tokens),
        run(*jlora.partition(want_params), TOKENS),
        strict=True,
    ):
        near(got, want)


@pytest.mark.parametrize("name", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_devices_add_in_the_dtype_of_the_model(monkeypatch: Any, name: str, dtype: Any) -> None:
    """As for a dense weight; on one device a product is rounded once, from float32."""
    monkeypatch.setattr(_product, "LEAST", 1)
    run = lambda p, x: jlora.lora(lambda p, x: x @ p)(p, x)

    def dtypes_of(p: Any, x: Any, y: Any) -> set[Any]:
        programs = jax.make_jaxpr(run)(p, x), jax.make_jaxpr(jax.vjp(lambda x: run(p, x), x)[1])(y)
        products = [e for f in programs for e in equations(f) if e.primitive.name == "dot_general"]
        assert len(products) >= 2
        return {e.outvars[0].aval.dtype for e in products}

    weight = {"w": base()["down"].astype(dtype)}
    stored = jlora.quantize(weight, {"w": name}, layouts={"w": "io"})["w"]
    given = stored, jnp.ones((8, 128), dtype), jnp.ones((8, 64), dtype)
    assert dtypes_of(*given) == {jnp.dtype(jnp.float32)}
    at = NamedSharding(mesh_model.mesh((4, 2), AxisType.Auto), P())
    assert dtypes_of(*jax.device_put(given, at)) == {jnp.dtype(dtype)}


EXPLICIT = {"int8": quant.Int8(), "int4": quant.Int4(8), "nf4": quant.NF4(8), "q8_0": quant.Q8_0}


@pytest.mark.parametrize("name", ["nf4", *map(nightly, ("int8", "int4", "q8_0"))])
def test_explicit_axes(name: str, usual_promotion: Any) -> None:
    """Codes, the weight and rows that are looked up have their shardings in their types."""
    where = mesh_model.mesh((4, 2), AxisType.Explicit)
    path, layout = "embed", {"embed": "oi"}
    alone = jlora.quantize(
        {path: jnp.asarray(base()["up"])}, {path: EXPLICIT[name]}, layouts=layout
    )
    with jax.set_mesh(where):
        weight = jax.device_put(base()["up"], NamedSharding(where, P("fsdp", "tp")))
        stored = jlora.quantize({path: weight}, {path: EXPLICIT[name]}, layouts=layout)
        made = jax.jit(jlora.dequantize)(stored)[path]
        run = jlora.lora(lambda p, k: p[path].at[k].get(out_sharding=P("fsdp", "tp")))
        rows = jax.jit(run)(stored, jnp.arange(8))
    codes = max(stored[path].parts.values(), key=lambda x: x.nbytes)
    for x, spec in ((codes, P("fsdp", "tp")), (made, P("fsdp", "tp")), (rows, P("fsdp", "tp"))):
        assert x.sharding == NamedSharding(where, spec)
    if name != "nf4":  # the mean of whose scales is rounded otherwise on a mesh
        assert jax.tree.map(bits, stored[path].parts) == jax.tree.map(bits, alone[path].parts)
    np.testing.assert_allclose(made, jlora.dequantize(alone)[path], atol=1e-6)
    np.testing.assert_array_equal(rows, np.asarray(made)[:8])


@pytest.mark.nightly
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_a_model_with_explicit_axes(name: str, scanned: bool, usual_promotion: Any) -> None:
    def attached(weights: Any) -> Any:
        stored = jlora.quantize(weights, {".*": EXPLICIT[name]}, layouts=layouts_of(weights))
        return jlora.attach(stored, mesh_model.rules(), key=jax.random.key(0))

    def run(params: Any, tokens: Any, kind: Any = None) -> Any:
        trained, frozen = jlora.partition(params)
        trained = jax.tree.map(lambda x: x + 0.02, trained)
        of = lambda t: mesh_model.loss(jlora.combine(t, frozen), tokens, kind)
        return jax.jit(jax.grad(of, has_aux=True))(trained)[::-1]

    where = mesh_model.mesh((4, 2), AxisType.Explicit)
    weights = mesh_model.base(scanned)
    want_params = attached(weights)
    at = jax.tree.map(lambda spec: NamedSharding(where, spec), mesh_model.specs(scanned))
    with jax.set_mesh(where):
        params = attached(jax.device_put(weights, at))
        params = jax.device_put(want_params, jax.tree.map(lambda x: x.sharding, params))
        tokens = jax.device_put(mesh_model.TOKENS, NamedSharding(where, P("fsdp")))
        got = run(params, tokens, AxisType.Explicit)
    for x, y in zip(got, run(want_params, mesh_model.TOKENS), strict=True):
        near(x, y)


def layouts_of(weights: Any) -> dict[str, str]:
    """The layouts of the weights of `mesh_model`, by path."""
    names = {**{k: x[-1] for k, x in mesh_model.WEIGHTS.items()}, "embed": "oi", "head": "io"}
    paths = [keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(weights)]
    return {path: names[path.rpartition("/")[2]] for path in paths}
