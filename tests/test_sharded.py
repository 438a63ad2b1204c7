"""Meshes: dropout under shard_map, explicit shardings, and no gather that the base has not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec

X = jax.random.normal(jax.random.key(3), (4, 6, 12))


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


def tree(shape=(12, 8)):
    base = {"w": jax.random.normal(jax.random.key(0), shape)}
    params = jlora.attach(base, {"w": LoraSpec(2)}, key=jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1, params)


@pytest.mark.nightly
def test_dropout_differs_where_the_input_does_and_agrees_where_it_is_one():
    """W = 0 and A·B = 1/D: the output is the mean of the dropped input, one number a token."""
    d, n = 12, 64
    ones = jnp.ones((d, 1))
    node = jlora.LoraArray(jnp.zeros((d, d)), ones / d, ones.T, jnp.ones(()), "io")

    def fn(p, x):
        specs = (P("data"), P(None, "model"))
        run = jax.shard_map(
            lambda x, k: x @ k, mesh=mesh(), in_specs=specs, out_specs=P("data", "model")
        )
        return run(x, p["w"])

    out = jlora.lora(fn, dropout=0.5, key=jax.random.key(0), fallback="error")(
        {"w": node}, jnp.ones((n, d))
    )
    columns = np.asarray(out)
    assert (columns == columns[:, :1]).all(), "the shards of the outputs see one mask"
    assert not (columns[: n // 2] == columns[n // 2 :]).all(), "the shards of the tokens do not"


def test_sharded_tokens_are_not_merged():
    """Two sharded token axes in one would make the partitioner gather."""
    params, m = tree(), mesh()
    x = jax.device_put(X, NamedSharding(m, P("data", "model")))

    def collectives(fn, p):
        text = jax.jit(fn).lower(p, x).compile().as_text()
        return [w for w in ("all-gather", "all-to-all", "all-reduce") if w in text]

    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    with jax.set_mesh(mesh(AxisType.Explicit)):
        y = jax.device_put(X, P("data", "model"))
        got = jax.jit(jlora.lora(fn, fallback="error"))(params, y)
        assert got.sharding.spec == P("data", "model", None)
        text = jax.jit(jlora.lora(fn)).lower(params, y).compile().as_text()
    assert "all-gather" not in text
    np.testing.assert_allclose(got, fn(jlora.merge(params), X), rtol=1e-5, atol=1e-5)
    assert collectives(jlora.lora(fn, fallback="error"), params) == collectives(
        fn, jlora.detach(params)[0]
    )


SPECS = {
    "columns": (P("data"), P(None, "model"), None),
    "rows": (P("data", None, "model"), P("model"), P("data")),
    "replicated": (P("data"), P(), None),
}


@pytest.mark.parametrize("name", SPECS)
def test_explicit_shardings(name):
    x_spec, w_spec, out = SPECS[name]
    params = tree()

    def fn(p, x):
        return jnp.tanh(jnp.einsum("bti,io->bto", x, p["w"], out_sharding=out))

    want = jnp.tanh(X @ jlora.merge(params)["w"])
    with jax.set_mesh(mesh(AxisType.Explicit)):
        node = params["w"]
        base = jax.device_put(node.base, w_spec)
        # JAX 0.10.0 has gradients only of what lies on the mesh.
        a, b = jax.device_put((node.lora_a, node.lora_b), P())
        placed = {"w": jlora.LoraArray(base, a, b, node.scaling, "io")}
        x = jax.device_put(X, x_spec)
        run = jax.jit(jlora.lora(fn, fallback="error"))
        got = run(placed, x)
        assert got.sharding.spec == jax.jit(fn)({"w": base}, x).sharding.spec
        grad = jax.jit(jax.grad(lambda a: run({"w": jlora.bind(base, a)}, x).sum()))
        assert grad(jlora.detach(placed)[1]["w"]).lora_a.shape == (12, 2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_layers_gathered_one_by_one():
    """A stack of layers sharded over the data axis, each gathered when its turn comes."""

    def body(x, stack):
        def step(x, k):
            return jnp.tanh(x @ lax.all_gather(k, "data", axis=0, tiled=True)), None

        return lax.scan(step, x, stack)[0]

    def fn(p, x):
        specs = (P("data"), P(None, "data"))
        run = jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=P("data"))
        return run(x, p["w"])

    base = {"w": jax.random.normal(jax.random.key(0), (3, 12, 12)) * 0.3}
    params = jlora.attach(base, {"w": LoraSpec(2, layout="io")}, key=jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1, params)
    got = jax.jit(jlora.lora(fn, fallback="error"))(params, X)
    np.testing.assert_allclose(got, fn(jlora.merge(params), X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["in_shardings", "out_shardings"])
def test_an_inner_jit_keeps_its_shardings(where):
    split = NamedSharding(mesh(), P("data", None, "model"))
    asked = (split, None) if where == "in_shardings" else split
    params = tree()

    def fn(p, x):
        return jax.jit(lambda x, k: (x * 2) @ k, **{where: asked})(x, p["w"])

    for run in (jlora.lora(fn, fallback="error"), jax.jit(jlora.lora(fn, fallback="error"))):
        got, want = run(params, X), fn(jlora.merge(params), X)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert got.sharding.is_equivalent_to(want.sharding, 3)


@pytest.mark.sample(6)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("split", [P(None, "model"), P("model")])
def test_shards_that_are_sent_around(split, check):
    params, turn = tree(), [(0, 1), (1, 0)]

    def fn(p, x):
        def ring(x, w):
            y = x @ lax.ppermute(w, "model", turn) if split[0] is None else x[..., :6] @ w
            return y if split[0] is None else lax.psum(y, "model")

        out = P(None, None, "model") if split[0] is None else P()
        specs = {"in_specs": (P(), split), "out_specs": out, "check_vma": check}
        return jax.shard_map(ring, mesh=mesh(), **specs)(x, p["w"])

    got = jlora.lora(fn, fallback="error")(params, X)
    np.testing.assert_allclose(got, fn(jlora.merge(params), X), rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
def test_what_leaves_an_explicit_mesh():
    with jax.set_mesh(mesh(AxisType.Explicit)):
        params = tree()
        tokens = jax.device_put(jnp.arange(24).reshape(4, 6) % 12, P("data"))
        x = jax.device_put(X, P("data"))
        out = P("data", None, None)
        product = jax.sharding.auto_axes(lambda x, w: x @ w, out_sharding=out)
        for fn, at in (
            (lambda p, t: p["w"].at[t].get(out_sharding=out), tokens),
            (lambda p, x: product(x, p["w"]), x),
        ):
            for run in (jlora.lora(fn, fallback="error"), jax.jit(jlora.lora(fn))):
                got, want = run(params, at), fn(jlora.merge(params), at)
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
                assert jax.typeof(got) == jax.typeof(want)


@pytest.mark.parametrize("kind", ["matmul", "convolution"])
def test_an_adapter_of_each_device_over_a_base_of_all(kind):
    """A and B vary over devices and W does not: gradients of each device, averaged later."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shape = (8, 6) if kind == "matmul" else (3, 4, 6)
    x = jax.random.normal(jax.random.key(1), (16, *((8,) if kind == "matmul" else (5, 4))))
    w = jax.random.normal(jax.random.key(2), shape)
    gaussian = jlora.initializers.gaussian
    rules = {"w": LoraSpec(2, layout="i" * (len(shape) - 1) + "o", init=gaussian)}
    params = jlora.attach({"w": w}, rules, key=jax.random.key(0))
    trained, frozen = jlora.partition(params)

    def total(trained, x):
        y = jlora.lora(model, fallback="error")(jlora.combine(trained, frozen), x)
        return jnp.square(y).mean()

    def model(p, x):
        if kind == "matmul":
            return x @ p["w"]
        return lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    def body(trained, x):
        own = jax.tree.map(lambda a: lax.pcast(a, "data", to="varying"), trained)
        return jax.tree.map(lambda g: lax.pmean(g, "data"), jax.grad(total)(own, x))

    run = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    want = jax.grad(total)(trained, x)
    for a, b in zip(*map(jax.tree.leaves, (jax.jit(run)(trained, x), want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
