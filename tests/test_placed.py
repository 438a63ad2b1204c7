"""Adapters on a mesh: every part is created where its weight is, and one rule says where."""

import dataclasses
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from stored import pack

import jlora
from jlora import LoraSpec, checkpoint, initializers
from jlora._placed import check_replicate

# What test_reading.py is about.
pytestmark = pytest.mark.filterwarnings("ignore:.*decomposes .* which is sharded")

# path: shape, spec of the base, rule, specs of the parts
KINDS = {
    "dense": ((8, 4), P("x", "y"), LoraSpec(2), {"lora_a": P("x"), "lora_b": P(None, "y")}),
    "torch": (
        (4, 8),
        P("x", "y"),
        LoraSpec(2, layout="oi"),
        {"lora_a": P("y"), "lora_b": P(None, "x")},
    ),
    "query": (
        (8, 2, 4),
        P("x", "y"),
        LoraSpec(2, layout="ioo"),
        {"lora_a": P("x"), "lora_b": P(None, "y")},
    ),
    "out": (
        (2, 4, 8),
        P("y", None, "x"),
        LoraSpec(2, layout="iio", dora=True),
        {"lora_a": P("y"), "lora_b": P(None, "x"), "magnitude": P("x")},
    ),
    "einsum": (
        (2, 8, 4),
        P("y", "x"),
        LoraSpec(2, layout="oio"),
        {"lora_a": P("x"), "lora_b": P(None, "y")},
    ),
    "embedding": (
        (8, 6),
        P(("x", "y")),
        LoraSpec(2, init=initializers.gaussian),
        {"lora_a": P(("x", "y")), "lora_b": P()},
    ),
    "experts": (
        (4, 8, 6),
        P("y", "x"),
        LoraSpec(2, layout="io", form="lora_xs"),
        {"lora_a": P("y", "x"), "lora_b": P("y"), "core": P("y"), "scaling": P("y")},
    ),
    "layers": (
        (3, 8, 4),
        P(None, "x", "y"),
        LoraSpec(2, layout="io", init=initializers.pissa),
        {"lora_a": P(None, "x"), "lora_b": P(None, None, "y"), "scaling": P()},
    ),
    "conv": (
        (3, 3, 4, 8),
        P(None, None, "y", "x"),
        LoraSpec(2, form="vera"),
        {"lora_a": P(None, None, "y"), "lambda_d": P(), "lambda_b": P("x")},
    ),
    "fused": (
        (8, 12),
        P("x", "y"),
        LoraSpec(2, slices=((0, 4), (8, 12)), form="lora_fa"),
        {"lora_a": P("x"), "lora_b": P()},
    ),
    "values": (
        (8, 4),
        P("x"),
        LoraSpec(2, form="adalora"),
        {"lora_a": P("x"), "lora_b": P(), "singular_values": P()},
    ),
    "bias": ((4,), P("y"), "full", {"value": P("y")}),
}
RULES = {path: rule for path, (_, _, rule, _) in KINDS.items()}
KEY = jax.random.key(0)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)


def base():
    rng = np.random.default_rng(0)
    shapes = {path: shape for path, (shape, *_) in KINDS.items()} | {"norm": (6,)}
    return {p: jnp.asarray(rng.normal(size=n).astype(np.float32)) for p, n in shapes.items()}


def placed_on(mesh):
    specs = {path: spec for path, (_, spec, *_) in KINDS.items()} | {"norm": P()}
    return {p: jax.device_put(x, NamedSharding(mesh, specs[p])) for p, x in base().items()}


def structs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def parts(node):
    is_full = isinstance(node, jlora.FullArray)
    return {"value": node.value} if is_full else {**node.parts, "scaling": node.scaling}


def agree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.leaves(one) == jax.tree.leaves(other)


def same(one, other):
    flat = [jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other)]
    for (path, x), (_, y) in zip(*flat, strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (path, x.sharding, y.sharding)


@pytest.fixture(scope="module")
def alone():
    """The adapter of a model on one device."""
    return jlora.attach(base(), RULES, key=KEY)


@pytest.fixture(scope="module")
def meshed():
    """A model on a mesh, and its adapter."""
    weights = placed_on(mesh_of())
    return weights, jlora.attach(weights, RULES, key=KEY)


def without(entry, replicate):
    kept = [k for k in (entry if isinstance(entry, tuple) else (entry,)) if k not in replicate]
    return tuple(kept) if len(kept) > 1 else [*kept, None][0]


def check(got, mesh, replicate=()):
    for path, (_, _, _, want) in KINDS.items():
        found = parts(got[path])
        for name, spec in want.items():
            if isinstance(got[path], jlora.LoraArray):
                spec = P(*(without(k, replicate) for k in spec))
            sharding = NamedSharding(mesh, spec)
            at = found[name].sharding
            assert at.is_equivalent_to(sharding, found[name].ndim), (path, name, at)
            assert at.mesh == mesh
        assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(found))


def test_created_where_the_weights_are(alone, meshed):
    weights, got = meshed
    check(got, mesh_of())
    for path, x in weights.items():
        node = got[path]
        assert getattr(node, "residual", False) or (x is (node if path == "norm" else node.base))
        assert path != "layers" or node.base.sharding == x.sharding
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(alone), strict=True
    ):
        # What is drawn is equal bit for bit; what is computed from W is summed in another order.
        exact = not any(name in str(path) for name in ("layers", "experts", "magnitude"))
        np.testing.assert_allclose(x, y, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


def test_on_explicit_axes_and_with_replicated_axes(alone):
    mesh = mesh_of(AxisType.Explicit)
    weights = placed_on(mesh)
    rules = {k: RULES[k] for k in ("bias", "dense", "fused", "layers", "query")} | {".*": None}

    def some(tree):
        return {path: tree[path] for path in rules if path != ".*"}

    got = jlora.attach(weights, rules, key=KEY, replicate=("x",))
    for path in some(got):
        for name, spec in KINDS[path][3].items():
            spec = P(*(None if k == "x" else k for k in spec))
            x = parts(got[path])[name]
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (path, name)
    np.testing.assert_array_equal(got["query"].lora_a, alone["query"].lora_a)
    with jax.set_mesh(mesh):
        inside = jax.jit(lambda w, k: jlora.attach(w, rules, key=k, replicate=("x",)))(weights, KEY)
    same(some(inside), some(got))
    np.testing.assert_array_equal(inside["query"].lora_a, alone["query"].lora_a)


def test_of_structs(meshed):
    """Structs in, structs out: the same types and shardings as of arrays, and no array."""
    weights, got = meshed
    before = len(jax.live_arrays())
    made = jlora.attach(structs(weights), RULES, key=KEY)
    assert len(jax.live_arrays()) == before
    same(made, got)
    assert {type(x) for x in jax.tree.leaves(made)} == {jax.ShapeDtypeStruct}
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(made)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(got)
    ]
    bare = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in weights.items()}
    free = jlora.attach(bare, RULES, key=KEY)
    assert {x.sharding for x in jax.tree.leaves(free)} == {None}
    stored = jax.eval_shape(lambda: pack(base()["dense"]))
    node = jlora.attach({"w": stored}, {"w": LoraSpec(2)}, key=KEY)["w"]
    assert isinstance(node.lora_a, jax.ShapeDtypeStruct) and node.base is stored


def test_a_model_of_175_billion_parameters():
    mesh = mesh_of()
    wide = jax.ShapeDtypeStruct((12288, 12288), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    layer = dict.fromkeys([f"w{n}" for n in range(10)], wide) | {"q": wide, "v": wide}
    start = time.process_time()
    params = jlora.attach(
        {f"layers_{n}": dict(layer) for n in range(96)}, {".*/[qv]": LoraSpec(4)}, key=KEY
    )
    assert params["layers_0"]["q"].lora_a.sharding.spec == P("x", None)
    jlora.shardings(params, ("x",))
    assert sum(x.size for x in jax.tree.leaves(params)) > 170e9
    assert time.process_time() - start < 5


def test_shardings_and_specs_follow_the_same_rule(meshed):
    weights, got = meshed
    for replicate in ((), ("x",), ("y", "x")):
        made = jlora.shardings(got, replicate)
        assert jax.tree.structure(made) == jax.tree.structure(got)
        specs = jlora.specs(got, jax.tree.map(lambda x: x.sharding.spec, weights), replicate)
        flat = zip(*map(jax.tree.leaves, (got, made, specs)), strict=True)
        for x, at, spec in flat:
            assert at.is_equivalent_to(NamedSharding(at.mesh, spec), x.ndim), (at, spec)
        attached = jlora.attach(structs(weights), RULES, key=KEY, replicate=replicate)
        same(attached, jax.tree.map(lambda x, at: _Placed(at, x.ndim), got, made))
        agree(jlora.shardings(attached, replicate), made)
    check(jax.device_put(got, jlora.shardings(got, ("x",))), mesh_of(), ("x",))


@dataclasses.dataclass
class _Placed:
    sharding: NamedSharding
    ndim: int


def test_what_is_restored_is_placed_alike(meshed, tmp_path):
    weights, got = meshed
    some = {path: got[path] for path in ("bias", "dense", "fused", "experts", "values")}
    checkpoint.save(tmp_path / "a", some)
    plain = {path: weights[path] for path in some}
    same(checkpoint.restore(tmp_path / "a", plain), some)
    kept = checkpoint.restore(tmp_path / "a", plain, replicate=("x",))
    assert kept["dense"].lora_a.sharding.is_equivalent_to(NamedSharding(mesh_of(), P()), 2)


def test_without_a_mesh():
    device, weights = jax.devices()[3], {"bias": base()["bias"], "dense": base()["dense"]}
    rules = {"bias": "full", "dense": LoraSpec(2, dora=True)}
    params = jlora.attach(jax.device_put(weights, device), rules, key=KEY, replicate=("x",))
    assert {x.sharding for x in jax.tree.leaves(params)} == {SingleDeviceSharding(device)}
    assert set(jax.tree.leaves(jlora.shardings(params))) == {SingleDeviceSharding(device)}
    free = jlora.attach(weights, rules, key=KEY)  # follows the other arguments of a program
    assert not any(x.committed for x in jax.tree.leaves(free))
    assert set(jax.tree.leaves(jlora.shardings(free))) == {SingleDeviceSharding(jax.devices()[0])}


def test_a_key_on_one_device(meshed):
    key = jax.device_put(KEY, jax.devices()[1])
    got = jlora.attach({"dense": meshed[0]["dense"]}, {"dense": LoraSpec(2)}, key=key)
    np.testing.assert_array_equal(got["dense"].lora_a, meshed[1]["dense"].lora_a)


def test_a_stored_weight_with_the_axes_of_the_weight():
    """Codes with an entry for each of the weight's: the adapter is sharded as the codes."""
    mesh = mesh_of()
    stored = jax.device_put(pack(base()["dense"]), NamedSharding(mesh, P("x")))
    node = jlora.attach({"w": stored}, {"w": LoraSpec(2)}, key=KEY)["w"]
    assert node.lora_a.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
    assert jlora.shardings({"w": node})["w"].lora_a == node.lora_a.sharding


@pytest.mark.parametrize("kind", ["freeze", "partition"])
def test_the_state_of_an_optimizer_follows(meshed, kind):
    params = meshed[1]
    tx = optax.chain(optax.adam(0.1), optax.ema(0.9))
    tx = jlora.freeze(tx) if kind == "freeze" else tx
    trained = params if kind == "freeze" else jlora.partition(params)[0]
    shapes = jax.eval_shape(tx.init, structs(trained))
    at = jlora.shardings(shapes, of=params)
    assert jax.tree.structure(at) == jax.tree.structure(shapes)
    adam, ema = at[0][0], at[1]
    everywhere, want = NamedSharding(mesh_of(), P()), jlora.shardings(params)
    assert adam.count == everywhere and ema.count == everywhere
    for moments in (adam.mu, adam.nu, ema.ema):
        for path, (_, _, rule, _) in KINDS.items():
            for name, x in parts(moments[path]).items():
                if isinstance(x, NamedSharding):
                    assert x == parts(want[path])[name], (path, name)
            assert (rule == "full") == isinstance(moments[path], jlora.FullArray)
    assert adam.mu["dense"].lora_b.spec == P(None, "y")
    if kind == "partition":
        assert jlora.shardings(trained, of=params)["dense"].lora_b.spec == P(None, "y")
        agree(jlora.shardings(trained), jlora.shardings(trained, of=params))


def test_what_is_refused(meshed):
    weights, got = meshed
    calls = [
        lambda r: jlora.attach(weights, {"dense": LoraSpec(2)}, key=KEY, replicate=r),
        lambda r: jlora.shardings(got, r),
        lambda r: jlora.specs(got, jax.tree.map(lambda x: x.sharding.spec, weights), r),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"`replicate` is 'x'.*`replicate=\('x',\)`"):
            call("x")
    for call in calls[:2]:
        with pytest.raises(ValueError, match=r"`replicate` has 'xx'.*\('x', 'y'\).*mean 'x'"):
            call(("xx",))
    with pytest.raises(TypeError, match=r"`call`: `replicate` is 3.*\"fsdp\""):
        check_replicate(3, "call")
    lost = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    with pytest.raises(ValueError, match=r'"w" float32\[2,2\] is on no device.*device_put'):
        jlora.shardings(lost)


def test_an_initializer_reads_one_layer_at_a_time():
    """The memory is that of two layers, not of the stack; on one device and on a mesh."""
    n, spec = 32, LoraSpec(2, layout="io", init=initializers.pissa)

    def temporary(layers):
        run = jax.jit(lambda w, k: jlora.attach({"w": w}, {"w": spec}, key=k))
        struct = jax.ShapeDtypeStruct((layers, n, n), jnp.float32)
        return run.lower(struct, KEY).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) - temporary(4) < 4 * n * n
    w = jax.random.normal(KEY, (4, 8, 6))
    want = jlora.attach({"w": w}, {"w": spec}, key=KEY)["w"]
    keys = jax.random.split(jax.random.fold_in(KEY, zlib.crc32(b"w")), 4)
    for k in range(4):
        a, b, rest = spec.init(keys[k], w[k], 2, spec.s)
        np.testing.assert_allclose(want.lora_a[k] @ want.lora_b[k], a @ b, atol=1e-5)
        np.testing.assert_allclose(want.base[k], rest, atol=1e-5)


@pytest.mark.nightly
def test_initializers_from_data_keep_the_places():
    weights = {"w": jax.device_put(base()["dense"], NamedSharding(mesh_of(), P("x", "y")))}
    rules = {"w": LoraSpec(2, layout="io")}
    params = jlora.attach(weights, rules, key=KEY, replicate=("y",))
    x = jax.random.normal(KEY, (16, 8))
    moments = jlora.capture(lambda p, x: x @ p["w"], params, x)
    got = initializers.eva(params, moments)
    same(got, params)
    assert not jnp.array_equal(got["w"].lora_a, params["w"].lora_a)
