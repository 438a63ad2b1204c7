"""First values from data: EVA, CorDA and LoRA-GA on every kind of node, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import w
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, arithmetic
from jlora.initializers import corda, eva, loftq, lora_ga, pissa

IN, OUT, RANK = 11, 7, 2
X = np.float32(np.random.default_rng(0).normal(size=(40, IN)) * 0.8 ** np.arange(IN) + 0.3)
X = jnp.asarray(X)


def dense(p, x):
    return x @ p["w"]


def heads(p, x):
    return jnp.einsum("thd,hdo->to", jnp.einsum("ti,ihd->thd", x, p["q"]["w"]), p["o"]["w"])


def stacked(p, x):
    return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, p["w"])[0]


CASES = {
    "dense": (dense, {"w": w(IN, OUT)}, {}),
    "bfloat16": (dense, {"w": w(IN, OUT).astype(jnp.bfloat16)}, {}),
    "dora": (dense, {"w": w(IN, OUT)}, dict(dora=True)),
    "slices": (dense, {"w": w(IN, 13)}, dict(slices=((0, 4), (8, 13)))),
    "rslora": (dense, {"w": w(IN, OUT)}, dict(scaling="rslora", alpha=3.0)),
    "heads": (heads, {"q": {"w": w(IN, 3, 2)}, "o": {"w": w(3, 2, IN)}}, {}),
    "stack": (stacked, {"w": w(3, IN, IN)}, dict(layout="io")),
}


def made(name, rank=RANK):
    fn, base, spec = CASES[name]
    x = X.astype(jnp.bfloat16) if name == "bfloat16" else X
    layouts = None if "layout" in spec else jlora.layouts(fn, base, x)
    rules = {r".*w": LoraSpec(rank, **spec)}
    params = jlora.attach(base, rules, key=jax.random.key(1), layouts=layouts)
    return fn, base, params, x


def nodes(params):
    is_node = lambda x: isinstance(x, jlora.LoraArray)
    return [x for x in jax.tree.leaves(params, is_leaf=is_node) if is_node(x)]


def gradients(fn, base, x):
    return jax.grad(lambda p: jnp.sin(fn(p, x)).sum())(base)


METHODS = {
    "eva": lambda fn, base, params, x: eva(params, jlora.capture(fn, params, x)),
    "eva_2": lambda fn, base, params, x: eva(params, jlora.capture(fn, params, x), rho=2.0),
    "ipm": lambda fn, base, params, x: corda(params, jlora.capture(fn, params, x)),
    "kpm": lambda fn, base, params, x: corda(params, jlora.capture(fn, params, x), method="kpm"),
    "lora_ga": lambda fn, base, params, x: lora_ga(params, gradients(fn, base, x)),
    "lora_ga_peft": lambda fn, base, params, x: lora_ga(
        params, gradients(fn, base, x), scale="peft"
    ),
}


def near(got, want, most=2e-5):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert np.linalg.norm(got - want) <= most * np.linalg.norm(want)


def within_rounding(y, want, node, x):
    """Compare a bfloat16 layer with x W, within the largest error that its roundings can make.

    Rounding changes a number by at most u = 2⁻⁸ of itself. Rounded are R and x R, then s A, x s A,
    B and x s A B, then the sum, and x W, with which it is compared. The rest is summed in float32,
    where a few terms are off by less than u² of their sum.
    """
    x, r, a, b, w = (
        np.abs(np.asarray(k, np.float64))
        for k in (x, node.base, node.lora_a * node.scaling, node.lora_b, want)
    )
    once = 1 + 2.0**-8
    terms = (once**2 - 1 + 2.0**-16) * (x @ r) + (once**4 - 1 + 2.0**-16) * (x @ a @ b)
    most = once * terms + 2 * 2.0**-8 * once * w
    assert (np.abs(np.float64(y) - np.float64(want)) <= most).all()


@pytest.mark.sample(24)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_the_model_starts_unchanged(case, method):
    fn, base, params, x = made(case)
    begun = METHODS[method](fn, base, params, x)
    with jax.numpy_dtype_promotion("standard"):
        y = jlora.lora(fn, fallback="error")(begun, x)
    if case == "bfloat16":
        within_rounding(y, fn(base, x), begun["w"], x)
    else:
        near(y, fn(base, x))
    for before, node in zip(nodes(params), nodes(begun), strict=True):
        assert node.residual == (not method.startswith("eva"))
        assert node.lora_a.dtype == node.lora_b.dtype == jnp.float32
        assert node.base.dtype == before.base.dtype
        assert node.lora_a.any() and node.lora_b.any() == node.residual


@pytest.mark.parametrize("seed", range(4))
def test_a_bfloat16_model_moves_by_roundings_only(seed):
    """Where A B is much larger than W, as under PEFT's scale, so are its roundings."""
    base, x = {"w": w(IN, OUT, seed=seed).astype(jnp.bfloat16)}, X.astype(jnp.bfloat16)
    params = jlora.attach(base, {"w": LoraSpec(RANK)}, key=jax.random.key(1))
    begun = METHODS["lora_ga_peft"](dense, base, params, x)
    within_rounding(jlora.lora(dense)(begun, x), dense(base, x), begun["w"], x)


@pytest.mark.sample(8)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["ipm", "lora_ga"])
def test_back_to_the_original_weights(case, method):
    fn, base, params, x = made(case)
    begun = METHODS[method](fn, base, params, x)
    trainable, frozen = jlora.partition(begun)
    trained = jlora.combine(jax.tree.map(lambda x: x + 0.05, trainable), frozen)
    plain = arithmetic.residual_to_lora(trained, begun, base)
    got, want = (nodes(x) for x in (plain, trained))
    merged = (jax.tree.leaves(jlora.merge(x)) for x in (plain, trained))
    for a, b in zip(*merged, strict=True):
        near(a, b, 0.02 if case == "bfloat16" else 2e-5)
    assert [x.rank for x in got] == [2 * x.rank for x in want]
    assert not any(x.residual for x in got)


@pytest.mark.nightly
def test_directions_of_a_weight():
    fn, _, params, x = made("heads")
    begun = eva(params, jlora.capture(fn, params, x))
    centered = np.float64(x) - np.float64(x).mean(0)
    want = np.linalg.svd(centered)[2][:RANK].T
    a = np.float64(begun["q"]["w"].lora_a)
    near(a @ a.T, want @ want.T)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", ["stack", "slices"])
def test_a_stack_and_slices_are_weights_of_their_own(case):
    """As if each had been attached by itself."""
    fn, base, params, x = made(case)
    moments, slope = jlora.capture(fn, params, x)["w"], gradients(fn, base, x)["w"]
    both = [corda(params, {"w": moments})["w"], lora_ga(params, {"w": slope})["w"]]
    if case == "stack":
        alone = [
            (base["w"][n], jax.tree.map(lambda m, n=n: m[n], moments), slope[n]) for n in range(3)
        ]
    else:
        alone = [(base["w"][:, some], moments, slope[:, some]) for some in (slice(4), slice(8, 13))]
    for n, (weight, m, g) in enumerate(alone):
        one = jlora.attach({"w": weight}, {"w": LoraSpec(RANK)}, key=jax.random.key(0))
        for got, want in zip(both, (corda(one, {"w": m}), lora_ga(one, {"w": g})), strict=True):
            if case == "stack":
                a, b = got.lora_a[n], got.lora_b[n]
            else:
                a = got.lora_a[:, n * RANK : (n + 1) * RANK]
                b = got.lora_b[:, (0, 4)[n] : (4, 9)[n]]
            near(a @ b, want["w"].lora_a @ want["w"].lora_b, 1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_are_handed_out(rslora):
    """One budget for all: the weight of few directions gives what the other can use."""
    rng = np.random.default_rng(0)
    flat, steep = rng.normal(size=(64, 6)), rng.normal(size=(64, 6)) * 0.2 ** np.arange(6)
    x, y = (jnp.asarray(v, jnp.float32) for v in (flat, steep))
    fn = lambda p, x, y: x @ p["a"] + y @ p["b"]
    rules = {"a|b": LoraSpec(2, alpha=4.0, scaling="rslora" if rslora else "lora")}
    params = jlora.attach({"a": w(6, 5), "b": w(6, 5)}, rules, key=jax.random.key(0))
    moments = jlora.capture(fn, params, x, y)
    begun = eva(params, moments, rho=1.5, rslora=rslora)
    assert (begun["a"].rank, begun["b"].rank) == (3, 1)
    old, new = float(params["a"].scaling), float(begun["a"].scaling)
    assert new == pytest.approx(old * (1.5**0.5 if rslora else 1.0))
    fixed = eva(params, moments, rho=1.5, rslora=rslora, adjust_scaling=False)
    assert float(fixed["a"].scaling) == pytest.approx(old * 1.5 ** (-0.5 if rslora else -1.0))
    near(jlora.lora(fn)(begun, x, y), fn({"a": params["a"].base, "b": params["b"].base}, x, y))


def test_a_weight_without_a_rank_is_plain_again():
    values = jnp.diag(jnp.array([1.0, 0.0, 0.0]))
    even = jnp.eye(3)
    params = jlora.attach({"a": w(3, 5), "b": w(3, 5)}, {"a|b": LoraSpec(1)}, key=jax.random.key(0))
    zero, n = jnp.zeros(3), jnp.array(10.0)
    moments = {"a": jlora.Moments(values, zero, n), "b": jlora.Moments(even, zero, n)}
    begun = eva(params, moments, rho=3.0)
    assert begun["a"].rank == 1 and begun["b"].rank == 1
    two = {"a": jlora.Moments(values + 0.6 * even, zero, n), "b": moments["b"]}
    sharper = {"a": jlora.Moments(even - values, zero, n), "b": two["b"]}
    begun = eva(params, sharper, rho=2.0)
    assert begun["a"].rank == 2 and begun["b"] is params["b"].base


def test_inputs_that_are_all_zero_explain_nothing():
    base = {"a": w(IN, OUT), "dead": w(IN, OUT), "z": w(IN, OUT)}
    params = jlora.attach(base, {".*": LoraSpec(RANK)}, key=jax.random.key(0))

    def fn(p, x):
        return x @ p["a"], (0 * x) @ p["dead"], (x**3) @ p["z"]

    moments = jlora.capture(fn, params, X)
    alive = {k: params[k] for k in "az"}
    want = eva(alive, {k: moments[k] for k in "az"}, rho=2.0)
    got = eva(params, moments, rho=2.0)
    ranks = {k: getattr(node, "rank", 0) for k, node in got.items()}
    assert ranks["dead"] == 0 and sum(ranks.values()) == 3 * RANK
    assert all(ranks[k] >= want[k].rank for k in "az")
    with pytest.raises(ValueError, match=r'all inputs of "dead" .* were zero'):
        corda(params, moments)


def test_inputs_that_are_not_finite_are_refused():
    fn, _, params, _ = made("dense")
    moments = jlora.capture(fn, params, X.at[3, 2].set(jnp.nan))
    for start in (eva, corda):
        with pytest.raises(ValueError, match=r'the moments of "w" .* are not finite'):
            start(params, moments)


@pytest.mark.nightly
def test_elements_of_a_stack_have_ranks_of_their_own():
    """The columns beyond an element's rank are zero, of A and of B: they never train."""
    base = {"w": w(2, 4, 5)}
    params = jlora.attach(base, {"w": LoraSpec(2, layout="io")}, key=jax.random.key(0))
    second = jnp.stack([jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]) ** p) for p in (1, 8)])
    moments = {"w": jlora.Moments(second, jnp.zeros((2, 4)), jnp.full(2, 10.0))}
    node = eva(params, moments, rho=2.0, adjust_scaling=False)["w"]
    assert (node.lora_a != 0).any(1).sum(1).tolist() == [3, 1]
    assert node.rank == 3 and node.scaling.tolist() == pytest.approx([16 / 3, 16.0])

    def loss(b):
        moved = dataclasses.replace(node, lora_b=b)
        return jnp.sin(jlora.lora(stacked_out)({"w": moved}, jnp.ones((6, 4)))).sum()

    slope = jax.grad(loss)(node.lora_b)
    assert slope[0].any() and not slope[1, 1:].any()


def stacked_out(p, x):
    return jnp.einsum("ti,sio->sto", x, p["w"])


def test_bfloat16_weights_are_decomposed_in_float32():
    fn, base, params, x = made("bfloat16")
    moments = jlora.capture(fn, params, x)
    node = corda(params, moments)["w"]
    wide = jlora.attach(
        {"w": base["w"].astype(jnp.float32)}, {"w": LoraSpec(RANK)}, key=jax.random.key(1)
    )
    want = corda(wide, moments)["w"]
    near(node.lora_a @ node.lora_b, want.lora_a @ want.lora_b, 1e-6)


def test_under_jit():
    fn, _, params, x = made("dense")
    moments = jlora.capture(fn, params, x)
    for method in (eva, corda):
        near(jax.jit(method)(params, moments)["w"].base, method(params, moments)["w"].base)
    with pytest.raises(ValueError, match=r"eva\(rho=2.0\)`: the ranks depend on .*outside"):
        jax.jit(functools.partial(eva, rho=2.0))(params, moments)


def test_errors():
    fn, base, params, x = made("dense")
    moments, slopes = jlora.capture(fn, params, x), gradients(fn, base, x)
    with pytest.raises(ValueError, match=r"eva\(rho=0.5\)`: ranks cannot all decrease"):
        eva(params, moments, rho=0.5)
    with pytest.raises(ValueError, match=r'corda\(method="?.*both.*give "ipm" or "kpm"'):
        corda(params, moments, method="both")
    with pytest.raises(ValueError, match=r"lora_ga\(scale='gd'\)`: give one of"):
        lora_ga(params, slopes, scale="gd")
    with pytest.raises(ValueError, match=r"lora_ga\(direction='random'\)`: give one of"):
        lora_ga(params, slopes, direction="random")
    with pytest.raises(ValueError, match=r"no LoraArray in `params`.*jlora.attach"):
        eva(base, moments)
    over = jlora.attach(base, {"w": LoraSpec(RANK, init=pissa)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r'"w" float32\[11,7\] is not the model.*kaiming'):
        corda(over, moments)
    xs = jlora.attach(base, {"w": LoraSpec(RANK, form="lora_xs")}, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r'the update of "w" .* has other parts between A and B.*form="lora"'
    ):
        eva(xs, moments)
    with pytest.raises(ValueError, match=r'`moments` has nothing for "w".*Closest: "v"'):
        eva(params, {"v": moments["w"]})
    with pytest.raises(ValueError, match=r"`second` is \(11, 11\); got \(3, 3\).*jlora.capture"):
        eva(params, {"w": jlora.Moments(jnp.eye(3), jnp.ones(3), jnp.array(9.0))})
    with pytest.raises(ValueError, match=r"rank 2 of .* needs at least 3 inputs; 2 were seen"):
        eva(params, jlora.capture(fn, params, x[:2]))
    with pytest.raises(ValueError, match=r"shape \(7, 11\). Pass `jax.grad\(loss\)\(base\)`"):
        lora_ga(params, {"w": slopes["w"].T})
    _, _, wide, _ = made("dense", rank=4)
    with pytest.raises(ValueError, match=r"need 2 · 4 directions .* min\(11, 7\).*lower rank"):
        lora_ga(wide, slopes)
    none = dataclasses.replace(params["w"], scaling=jnp.zeros(()))
    with pytest.raises(ValueError, match=r"s·A·B cannot be a part of .*alpha above 0"):
        corda({"w": none}, moments)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((16, 8), P("x", "y")), ((3, 16, 8), P(None, "x", "y")), ((4, 16, 8), P("x", None, "y"))],
    ids=str,
)
def test_on_explicit_axes(shape, spec):
    """What is decomposed may be sharded; the update is that of one device."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    rng, at = np.random.default_rng(0), NamedSharding(mesh, spec)
    weight, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    x = rng.normal(size=(*shape[:-2], 99, 16))
    moments = jlora.Moments(
        second=jnp.asarray(np.swapaxes(x, -1, -2) @ x, jnp.float32),
        total=jnp.asarray(x.sum(-2), jnp.float32),
        count=jnp.full(shape[:-2], 99.0),
    )
    rules, layouts = {"w": LoraSpec(2, layout="io")}, {"w": "io"}

    def run(w, g, moments):
        params = jlora.attach({"w": w}, rules, key=jax.random.key(0))
        stored = jlora.quantize({"w": w}, {"w": "int8"}, layouts=layouts)
        stored = jlora.attach(stored, rules, key=jax.random.key(0))
        made = [
            lora_ga(params, {"w": g}),
            corda(params, {"w": moments}),
            eva(params, {"w": moments}),
            loftq(stored, {"w": w}, steps=2),
        ]
        return [jlora.merge(p)["w"] for p in made], [p["w"].base for p in made[:2]]

    want = run(weight, g, moments)
    with jax.set_mesh(mesh):
        given = jax.device_put((weight, g), at)
        for got in (run(*given, moments), jax.jit(run)(*given, moments)):
            for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5)
