"""DoRA against its formula written densely, and every function that has to know a magnitude."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, checkpoint
from jlora.forms.dora import column_norm, gain

LAYOUTS = {
    "io": (11, 7),
    "oi": (7, 11),
    "ioo": (11, 3, 5),
    "iio": (3, 5, 11),
    "oio": (3, 11, 5),
    "iiio": (3, 2, 4, 7),
}
every = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
X = jax.random.normal(jax.random.key(3), (4, 11))


def node(shape=(11, 7), layout="io", seed=0, dtype=jnp.float32, **spec):
    """A node whose B and magnitude have moved."""
    w = jax.random.normal(jax.random.key(seed), shape).astype(dtype)
    given = LoraSpec(2, alpha=3, layout=layout, dora=True, **spec)
    made = jlora.attach({"w": w}, {"w": given}, key=jax.random.key(seed + 1))["w"]
    b = jax.random.normal(jax.random.key(seed + 2), made.lora_b.shape)
    m = made.extra["magnitude"] * jax.random.uniform(
        jax.random.key(seed + 3), made.extra["magnitude"].shape, minval=0.5
    )
    return dataclasses.replace(made, lora_b=b, extra={"magnitude": m})


def inputs(x):
    """The axes of the inputs, those of the stack left out."""
    split = len(x.shape) - len(x.layout)
    return tuple(split + k for k, letter in enumerate(x.layout) if letter == "i")


def direction(x):
    """V = W + s · A B, as any reader would write it, in the widest type."""
    split = len(x.shape) - len(x.layout)
    dims = "abcdefg"[: x.base.ndim]
    sides = {
        s: "".join(c for c, k in zip(dims[split:], x.layout, strict=True) if k == s) for s in "io"
    }
    stack = dims[:split]
    ab = jnp.einsum(
        f"{stack}{sides['i']}r,{stack}r{sides['o']}->{dims}",
        x.lora_a.astype(jnp.float32),
        x.lora_b.astype(jnp.float32),
        precision="highest",
    )
    s = jnp.reshape(x.scaling, (*jnp.shape(x.scaling), *(1,) * (ab.ndim - jnp.ndim(x.scaling))))
    return x.base.astype(jnp.float32) + s * ab


def paper(x):
    """Equation 5, the norm detached: m · V / ‖V‖."""
    v = direction(x)
    norm = lax.stop_gradient(jnp.sqrt((v**2).sum(inputs(x), keepdims=True)))
    return jnp.expand_dims(x.extra["magnitude"], inputs(x)) * v / norm


@pytest.mark.sample(12)
@dtypes
@every
@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stacked"])
def test_the_norm_is_that_of_the_dense_weight(layout, stack, dtype):
    x = node((*stack, *LAYOUTS[layout]), layout, dtype=dtype)
    want = np.sqrt((np.asarray(direction(x), np.float64) ** 2).sum(inputs(x)))
    np.testing.assert_allclose(column_norm(x), want, rtol=1e-5)
    np.testing.assert_allclose(gain(x), x.extra["magnitude"] / want, rtol=1e-5)


def test_the_norm_makes_nothing_of_the_weights_shape():
    x = node((3, 11, 7))
    jaxpr = jax.make_jaxpr(column_norm)(x)
    inner = [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    assert len(inner) == 1
    made = {v.aval.shape for e in inner[0].params["jaxpr"].eqns for v in e.outvars}
    assert (3, 7) in made and (3, 11, 7) not in made


@pytest.mark.sample(8)
@every
def test_the_gradient_is_the_papers(layout):
    x = node(LAYOUTS[layout], layout)
    ct = jax.random.normal(jax.random.key(9), x.shape)

    def by(fn):
        return jax.grad(lambda t, f: (fn(jlora.combine(t, f)) * ct).sum())(*jlora.partition(x))

    got, want = by(lambda n: jlora.merge(n)), by(paper)
    for part in ("lora_a", "lora_b", "magnitude"):
        np.testing.assert_allclose(got.parts[part], want.parts[part], rtol=1e-4, atol=1e-5)

    def attached(n):  # without the detachment A has another gradient
        v = direction(n)
        norm = jnp.sqrt((v**2).sum(inputs(n), keepdims=True))
        return jnp.expand_dims(n.extra["magnitude"], inputs(n)) * v / norm

    assert not np.allclose(got.lora_a, by(attached).lora_a, rtol=1e-2)


def test_the_transform_has_the_papers_gradient():
    x = node()
    t, f = jlora.partition({"w": x})

    def by(fn):
        return jax.jit(jax.value_and_grad(lambda t: jnp.sin(fn(jlora.combine(t, f))).sum()))(t)

    got = by(lambda p: jlora.lora(lambda p: X @ p["w"], fallback="error")(p))
    want = by(lambda p: X @ paper(p["w"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_it_begins_as_the_norm_and_changes_nothing():
    w = jax.random.normal(jax.random.key(0), (3, 11, 7))
    params = jlora.attach(
        {"w": w}, {"w": LoraSpec(2, layout="io", dora=True)}, key=jax.random.key(1)
    )
    x = params["w"]
    assert x.extra["magnitude"].shape == (3, 7) and x.extra["magnitude"].dtype == jnp.float32
    np.testing.assert_allclose(x.extra["magnitude"], np.linalg.norm(w, axis=1), rtol=1e-6)
    np.testing.assert_allclose(jlora.merge(params)["w"], w, rtol=1e-6)
    low = jlora.attach(
        {"w": w[0]}, {"w": LoraSpec(2, dora=True, dtype=jnp.bfloat16)}, key=jax.random.key(1)
    )
    assert low["w"].extra["magnitude"].dtype == jnp.bfloat16


def test_a_first_update_that_is_not_zero_counts_in_the_first_magnitude():
    """As in PEFT: an initializer that moves the base leaves the weight as it was."""

    def init(key, weight, rank, scaling=1.0, dtype=jnp.float32):
        return weight[:, :rank].astype(dtype), jnp.ones((rank, weight.shape[1]), dtype)

    w = jax.random.normal(jax.random.key(0), (11, 7))
    x = jlora.attach({"w": w}, {"w": LoraSpec(2, init=init, dora=True)}, key=jax.random.key(1))["w"]
    np.testing.assert_allclose(
        x.extra["magnitude"], np.linalg.norm(direction(x), axis=0), rtol=1e-6
    )
    np.testing.assert_allclose(jlora.merge(x), direction(x), rtol=1e-5)


def test_a_column_of_zeros_has_gain_one_and_can_learn():
    w = jax.random.normal(jax.random.key(0), (11, 7)).at[:, 2].set(0)
    params = jlora.attach({"w": w}, {"w": LoraSpec(2, dora=True)}, key=jax.random.key(1))
    assert params["w"].extra["magnitude"][2] == 0 and gain(params["w"])[2] == 1
    assert (jlora.merge(params)["w"][:, 2] == 0).all()
    apply = jlora.lora(lambda p: X @ p["w"], fallback="error")
    t, f = jlora.partition(params)

    def grad(t):
        return jax.grad(lambda t: apply(jlora.combine(t, f)).sum())(t)["w"]

    first = grad(t)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(first))
    assert (first.lora_b[:, 2] != 0).all(), "B gives the column a direction ..."
    t = {"w": dataclasses.replace(t["w"], lora_b=t["w"].lora_b - 0.1 * first.lora_b)}
    second = grad(t)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(second))
    assert second.extra["magnitude"][2] != 0, "... and the magnitude its length"


def test_an_update_that_cancels_the_weight_stays_finite():
    """‖V‖² is then the rounding of ‖W‖², of either sign; it is held at that rounding."""
    a = jax.random.normal(jax.random.key(0), (11, 2)) * 37.7
    b = jax.random.normal(jax.random.key(1), (2, 7))
    w = jnp.dot(a, b, precision="highest")
    x = jlora.LoraArray(w, a, -b, jnp.ones(()), "io", extra={"magnitude": jnp.ones(7)})
    norm = np.asarray(column_norm(x))
    floor = np.sqrt(2 * np.finfo(np.float32).eps) * np.linalg.norm(w, axis=0)
    assert (norm >= 0.99 * floor).all()
    t, f = jlora.partition({"w": x})
    apply = jlora.lora(lambda p: X @ p["w"], fallback="error")
    grads = jax.grad(lambda t: apply(jlora.combine(t, f)).sum())(t)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def masked(key, x):
    """The input as the dropout of `key` leaves it: what an update of W = 0, A B = 1 gives."""
    n = x.shape[-1]
    plain = jlora.LoraArray(jnp.zeros((n, n)), jnp.eye(n), jnp.eye(n), jnp.ones(()), "io")
    return jlora.lora(lambda p, x: x @ p["w"], dropout=0.5, key=key)({"w": plain}, x)


def test_dropout_is_pefts(key):
    """As in dora.py: y = x W + (g - 1) (x̃ W) + g s (x̃ A) B, the base product without dropout."""
    x = node()
    seen = masked(key, X)
    assert (seen == 0).any() and not (seen == 0).all()

    def run(params, x):
        return jlora.lora(lambda p, x: x @ p["w"], dropout=0.5, key=key, fallback="error")(
            params, x
        )

    g = gain(x)[None]
    update = direction(x) - x.base
    want = X @ x.base + (g - 1) * (seen @ x.base) + g * (seen @ update)
    np.testing.assert_allclose(run({"w": x}, X), want, rtol=1e-4, atol=1e-5)
    first = jlora.attach({"w": x.base}, {"w": LoraSpec(2, dora=True)}, key=key)
    np.testing.assert_allclose(run(first, X), X @ x.base, rtol=1e-5, atol=1e-5)


def test_dropout_where_the_outputs_are_contracted(key):
    """y = x Wᵀ + x̃ (W' - W)ᵀ: what DoRA changes of the weight sees the dropped input."""
    x = node()
    y = jax.random.normal(jax.random.key(4), (5, 7))
    run = jlora.lora(lambda p, y: y @ p["w"].T, dropout=0.5, key=key, fallback="error")
    want = y @ x.base.T + masked(key, y) @ (paper(x) - x.base).T
    np.testing.assert_allclose(run({"w": x}, y), want, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_dropout_in_a_convolution_and_a_ragged_product(key):
    conv = node((1, 4, 7), "iio")
    numbers = ("NHC", "HIO", "NHC")
    z = jax.random.normal(jax.random.key(4), (2, 5, 4))

    def convolve(p, z):
        return lax.conv_general_dilated(z, p["w"], (1,), "SAME", dimension_numbers=numbers)

    got = jlora.lora(convolve, dropout=0.5, key=key, fallback="error")({"w": conv}, z)
    want = z @ conv.base[0] + masked(key, z) @ (paper(conv) - conv.base)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    experts, sizes = node((2, 11, 7)), jnp.array([1, 3])
    run = jlora.lora(lax.ragged_dot, dropout=0.5, key=key, fallback="error")
    change = paper(experts) - experts.base
    rows = lax.ragged_dot(X, experts.base, sizes) + lax.ragged_dot(masked(key, X), change, sizes)
    np.testing.assert_allclose(run(X, experts, sizes), rows, rtol=1e-4, atol=1e-5)


def test_a_fill_that_is_a_number_is_not_scaled():
    x = node()
    tokens = jnp.array([0, 99])

    def take(p):
        return p["w"].at[tokens].get(mode="fill", fill_value=3.0)

    got = jlora.lora(take, fallback="materialize")({"w": x})
    np.testing.assert_allclose(got, take({"w": paper(x)}), rtol=1e-5)
    nan = jlora.lora(lambda p: p["w"].at[tokens].get(mode="fill"), fallback="error")({"w": x})
    assert np.isnan(nan[1]).all() and np.isfinite(nan[0]).all()


@pytest.mark.nightly
def test_slices_have_a_magnitude_for_every_output():
    x = node((11, 21), slices=((0, 7), (14, 18)))
    assert x.extra["magnitude"].shape == (21,)
    v = direction(
        dataclasses.replace(
            x,
            lora_b=jnp.zeros((4, 21))
            .at[:2, :7]
            .set(x.lora_b[:, :7])
            .at[2:, 14:18]
            .set(x.lora_b[:, 7:]),
        )
    )
    want = x.extra["magnitude"][None] * v / jnp.linalg.norm(v, axis=0)[None]
    np.testing.assert_allclose(jlora.merge(x), want, rtol=1e-5)
    got = jlora.lora(lambda p: X @ p["w"], fallback="error")({"w": x})
    np.testing.assert_allclose(got, X @ want, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_inside_a_shard_map_the_norm_is_of_all_shards():
    """A weight split along its inputs has its columns on several devices."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    x = node((12, 6))
    y = jax.random.normal(jax.random.key(4), (4, 12))

    def body(p, y):
        return lax.psum(jlora.lora(lambda p, y: y @ p["w"], fallback="error")(p, y), "model")

    def run(p, spec_m, spec_w, spec_b, spec_y, out):
        specs = jlora.LoraArray(
            spec_w, P(spec_w[0]), spec_b, P(), "io", extra={"magnitude": spec_m}
        )
        return jax.shard_map(body, mesh=mesh, in_specs=({"w": specs}, spec_y), out_specs=out)(p, y)

    got = run({"w": x}, P(), P("model"), P(), P(None, "model"), P())
    np.testing.assert_allclose(got, y @ paper(x), rtol=1e-4, atol=1e-5)


def test_it_trains_and_the_rest_knows_it():
    x = node()
    assert (
        jlora.labels(x).extra["magnitude"] == "adapter"
        and jlora.partition(x)[1].extra["magnitude"] is None
    )
    assert jlora.combine(*jlora.partition(x)).extra["magnitude"] is x.extra["magnitude"]
    base, adapter = jlora.detach({"w": x})
    assert (
        adapter["w"].extra["magnitude"] is x.extra["magnitude"]
        and jlora.bind(base, adapter)["w"].base is x.base
    )
    assert jlora.summary(x).startswith("trainable params: 43 || all params: 120 ||")
    report = jlora.explain(lambda p: X @ p["w"], {"w": x})
    assert report.materialized == 0 and len(report.uses) == 1
    tx = jlora.freeze(optax.sgd(0.1))
    grads = jax.grad(lambda p: jlora.lora(lambda p: (X @ p["w"]).sum())(p))({"w": x})
    updates, _ = tx.update(grads, tx.init({"w": x}), {"w": x})
    new = optax.apply_updates({"w": x}, updates)["w"]
    assert (new.extra["magnitude"] != x.extra["magnitude"]).all() and jnp.array_equal(
        new.base, x.base
    )


def test_a_checkpoint_keeps_it(tmp_path):
    params = {"w": node((3, 11, 7)), "v": dataclasses.replace(node(), extra={})}
    checkpoint.save(tmp_path / "a", params)
    again = checkpoint.restore(tmp_path / "a", jlora.detach(params)[0])
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert jnp.array_equal(again["w"].extra["magnitude"], params["w"].extra["magnitude"])
    with pytest.raises(ValueError, match=r"\(3, 7\)\] do not fit .*another model"):
        checkpoint.restore(tmp_path / "a", {"w": jnp.ones((4, 11, 7)), "v": jnp.ones((11, 7))})


def test_unmerge_has_the_base_again():
    x = node()
    x = x.with_parts({"magnitude": x.extra["magnitude"].at[3].set(0)})
    again = jlora.unmerge(jlora.merge({"w": x}), {"w": x})["w"]
    np.testing.assert_allclose(again.base, x.base, rtol=1e-4, atol=1e-5)
    assert (
        jnp.array_equal(again.base[:, 3], x.base[:, 3])
        and again.extra["magnitude"] is x.extra["magnitude"]
    )
    adapter = jlora.detach({"w": x})[1]
    with pytest.raises(
        ValueError, match=r'original of "w", which has a magnitude, whose norm needs'
    ):
        jlora.unmerge(jlora.merge({"w": x}), adapter)


def test_a_magnitude_of_another_shape():
    x = node().with_parts({"magnitude": jnp.ones(11)})
    with pytest.raises(ValueError, match=r"needs a magnitude of shape \(7,\), one per output; got"):
        jlora.merge(x)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["columns", "rows", "replicated"])
@pytest.mark.parametrize("factors", [True, False], ids=["as_the_weight", "everywhere"])
def test_explicit_shardings(name, factors):
    """The norm's sums over a sharded axis are told where to come out."""
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    spec, out = {
        "columns": (P(None, "model"), None),
        "rows": (P("model"), P("data")),
        "replicated": (P(), None),
    }[name]
    x = node((12, 8))
    y = jax.random.normal(jax.random.key(4), (4, 12))
    want = y @ paper(x)

    def fn(p, y):
        return jnp.einsum("ti,io->to", y, p["w"], out_sharding=out)

    with jax.set_mesh(mesh):
        rows, columns = (*spec, None, None)[:2]
        specs = (P(rows), P(None, columns), P(columns)) if factors else (P(), P(), P())
        a, b, m = jax.device_put((x.lora_a, x.lora_b, x.extra["magnitude"]), specs)
        placed = {
            "w": jlora.LoraArray(
                jax.device_put(x.base, spec), a, b, x.scaling, "io", extra={"magnitude": m}
            )
        }
        y = jax.device_put(y, P("data", "model" if name == "rows" and not factors else None))
        run = jax.jit(jlora.lora(fn, fallback="error"))
        np.testing.assert_allclose(run(placed, y), want, rtol=1e-4, atol=1e-5)
        t, f = jlora.partition(placed)
        grads = jax.jit(jax.grad(lambda t: run(jlora.combine(t, f), y).sum()))(t)["w"]
    assert grads.extra["magnitude"].shape == (8,) and np.isfinite(grads.extra["magnitude"]).all()
