"""`jlora.capture`: the moments of the inputs that each adapted weight meets, against numpy."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import w
from cases_weights import CASES
from flax import nnx
from helpers import equations, moments_are, rank_one, same
from jax import lax

import jlora
from jlora import LoraSpec, capture

X = w(4, 5, 11)


def single(fn, weight, *args, layout=None, **spec):
    """The moments of the one weight of a function."""
    params = rank_one({"w": weight}, layouts={"w": layout} if layout else None, **spec)
    return capture(fn, params, *args)["w"]


def trees_agree(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(a, b)


def test_dense():
    moments_are(single(lambda p, x: x @ p["w"], w(11, 7), X), X.reshape(-1, 11))
    moments_are(single(lambda p, x: x @ p["w"], w(11, 7), np.asarray(X)), X.reshape(-1, 11))
    moments_are(single(lambda p, x: x @ p["w"].T, w(7, 11), X, layout="oi"), X.reshape(-1, 11))


@pytest.mark.nightly
def test_attention_kernels():
    def attend(p, x):
        q = jnp.einsum("bti,ihd->bthd", x, p["q"]["w"])
        return jnp.einsum("bthd,hdo->bto", jnp.tanh(q), p["o"]["w"])

    params = {"q": {"w": w(11, 3, 2)}, "o": {"w": w(3, 2, 11)}}
    layouts = jlora.layouts(attend, params, X)
    moments = capture(attend, rank_one(params, layouts), X)
    moments_are(moments["q"]["w"], X.reshape(-1, 11))
    moments_are(
        moments["o"]["w"], np.tanh(np.einsum("bti,ihd->bthd", X, params["q"]["w"])).reshape(-1, 6)
    )


def patches(x, height, width, stride, pad):
    """The patches of `(N, H, W, C)`, each flattened in the order of a kernel's H, W and C."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1] - height + 1, stride)
    columns = range(0, x.shape[2] - width + 1, stride)
    return np.concatenate(
        [
            x[:, i : i + height, j : j + width].reshape(len(x), -1)
            for i, j in itertools.product(rows, columns)
        ]
    )


@pytest.mark.nightly
@pytest.mark.parametrize(("stride", "pad"), [(1, 0), (2, 1), (1, 1)])
def test_convolution(stride, pad):
    def convolve(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        padding = [(pad, pad)] * 2
        return lax.conv_general_dilated(
            x, p["w"], (stride, stride), padding, dimension_numbers=dims
        )

    x = w(2, 7, 5, 3)
    moments_are(single(convolve, w(3, 2, 3, 5), x), patches(x, 3, 2, stride, pad))


@pytest.mark.nightly
def test_convolution_in_groups():
    def depthwise(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "VALID", dimension_numbers=dims, feature_group_count=3
        )

    x = w(2, 7, 5, 6)
    of_a_group = [patches(x[..., k : k + 2], 2, 2, 1, 0) for k in (0, 2, 4)]
    moments_are(single(depthwise, w(2, 2, 2, 9), x), np.concatenate(of_a_group))


def layer(x, k):
    return jnp.tanh(x @ k), x.mean()


def through(kernels, x):
    """What each of some layers meets."""
    seen = []
    for k in np.asarray(kernels, np.float64):
        seen.append(x)
        x = np.tanh(x @ k)
    return np.stack(seen)


@pytest.mark.sample(2)
@pytest.mark.parametrize("unroll", [1, 2])
def test_layers_that_are_scanned(unroll):
    def scanned(p, x):
        return lax.scan(layer, x, p["w"], unroll=unroll)

    def unrolled(p, x):
        return functools.reduce(lambda x, k: layer(x, p["w"][k])[0], range(3), x)

    x, kernels = w(6, 5), w(3, 5, 5)
    moments = single(scanned, kernels, x, layout="io")
    moments_are(moments, through(kernels, np.float64(x)))
    trees_agree(moments, single(unrolled, kernels, x, layout="io"))


def test_a_weight_at_every_step():
    """A scan closes over it, a while loop carries it: the sums add up, (in, in) at a time."""
    kernel, x = w(5, 5), w(6, 5)
    seen = through([kernel] * 4, np.float64(x)).reshape(-1, 5)

    def scanned(p, x):
        return lax.scan(lambda x, _: layer(x, p["w"]), x, None, length=4)[0]

    def looped(p, x):
        def step(state):
            n, x, k = state
            return n + 1, layer(x, k)[0], k

        return lax.while_loop(lambda s: s[0] < x.sum() * 0 + 4, step, (0, x, p["w"]))[1]

    for fn in (scanned, looped):
        moments_are(single(fn, kernel, x), seen)
        params = rank_one({"w": kernel})
        shapes = [
            v.aval.shape
            for eqn in equations(jax.make_jaxpr(functools.partial(capture, fn))(params, x))
            for v in eqn.outvars
        ]
        assert (4, 5, 5) not in shapes, "the sums of all steps are kept"


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_branch_is_seen_where_it_is_taken(chosen):
    def choose(p, x, n):
        branches = [lambda: x @ p["w"], lambda: (2.0 * x) @ p["w"], lambda: x]
        return lax.switch(n, branches)

    x = w(6, 5)
    n = jnp.array(chosen)
    moments_are(
        single(choose, w(5, 5), x, n), [np.float64(x), 2 * np.float64(x), np.zeros((0, 5))][chosen]
    )


@pytest.mark.nightly
def test_a_stack_that_is_mapped():
    x = w(3, 6, 11)
    moments_are(
        single(lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), w(3, 11, 7), x, layout="io"), x
    )
    one = jnp.einsum("ti,sio->tso", x[0], w(3, 11, 7))
    assert one.shape == (6, 3, 7)
    to_all = lambda p, x: jnp.einsum("ti,sio->tso", x, p["w"])
    moments_are(single(to_all, w(3, 11, 7), x[0], layout="io"), np.stack([x[0]] * 3))


@pytest.mark.nightly
def test_experts():
    """Each by its rows; an expert that gets none has seen none."""
    x, sizes = w(7, 11), jnp.array([4, 0, 3])
    moments = single(
        lambda p, x, n: lax.ragged_dot(x, p["w"], n), w(3, 11, 5), x, sizes, layout="io"
    )
    assert moments.count.tolist() == [4.0, 0.0, 3.0]
    for n, rows in enumerate(np.split(np.asarray(x), [4, 4])):
        moments_are(jax.tree.map(lambda m, n=n: m[n], moments), rows)
    x = w(3, 4, 11)
    by_einsum = lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"])
    moments_are(single(by_einsum, w(3, 11, 5), x, layout="io"), x)


def test_a_weight_that_is_used_twice():
    fn = lambda p, x: (x @ p["w"]).sum() + ((x + 1.0) @ p["w"]).sum()
    x = np.asarray(X).reshape(-1, 11)
    moments_are(single(fn, w(11, 7), X), np.concatenate([x, x + 1]))


def test_batches_stream():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]["w"]
    params = rank_one({"w": w(11, 7), "v": {"w": w(7, 5)}, "bias": w(5)})
    run = jax.jit(functools.partial(capture, fn))
    both = jax.tree.map(jnp.add, run(params, X[:2]), run(params, X[2:]))
    trees_agree(both, run(params, X))
    assert both["bias"] is None
    lanes = jax.vmap(run, (None, 0))(params, X)
    trees_agree(jax.tree.map(lambda m: m.sum(0), lanes), both)


def test_bfloat16_is_summed_in_float32():
    """Of 4096 inputs of one, a sum in bfloat16 would have stayed at 256."""
    x = jnp.ones((4096, 3), jnp.bfloat16)
    moments = single(lambda p, x: x @ p["w"], jnp.ones((3, 2), jnp.bfloat16), x)
    moments_are(moments, x)
    assert {m.dtype for m in jax.tree.leaves(moments)} == {jnp.dtype("float32")}


@pytest.mark.nightly
def test_variants_of_nodes():
    """DoRA, slices, a `FullArray`, and what the A and B were: the inputs are the base model's."""
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["bias"]) @ p["v"]["w"]
    base = {"w": w(11, 7), "v": {"w": w(7, 5)}, "bias": jnp.zeros((1, 1, 7))}
    want = capture(fn, rank_one(base), X)
    for spec in (dict(dora=True), dict(slices=((0, 2), (3, 5))), dict(scaling="rslora")):
        rules = {r".*w": LoraSpec(1, **spec), "bias": "full"}
        params = jlora.attach(base, rules, key=jax.random.key(1))
        trained = jax.tree.map(lambda x: x + 0.1, jlora.partition(params)[0])
        trained["bias"] = jlora.partition(params)[0]["bias"]
        got = capture(fn, jlora.combine(trained, jlora.partition(params)[1]), X)
        trees_agree(got, want)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_flax(library):
    x = w(6, 11)
    if library == "linen":
        model = nn.Sequential([nn.Dense(7), nn.tanh, nn.Dense(5)])
        fn, base = model.apply, model.init(jax.random.key(0), x)
        first, second = (base["params"][f"layers_{k}"] for k in (0, 2))
    else:
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(11, 7, rngs=rngs), jnp.tanh, nnx.Linear(7, 5, rngs=rngs))
        graph, base = nnx.split(model)
        fn = lambda state, x: nnx.merge(graph, state)(x)
        first, second = (nnx.to_pure_dict(base)["layers"][k] for k in (0, 2))
    moments = capture(fn, rank_one(base, rules=r".*/kernel"), x)
    found = jax.tree.leaves(moments, is_leaf=lambda m: isinstance(m, jlora.Moments))
    one, two = (m for m in found if isinstance(m, jlora.Moments))
    moments_are(one, x)
    hidden = np.tanh(np.float64(x) @ np.float64(first["kernel"]) + np.float64(first["bias"]))
    moments_are(two, hidden)
    assert second["kernel"].shape == (7, 5)


def test_the_cost_is_the_forward_pass_and_the_sums():
    """No product of a backward pass, and nothing of the inputs' size that waits for one."""
    tokens, width, layers = 512, 32, 4

    def fn(p, x):
        return lax.scan(layer, x, p["w"])[0].sum()

    def unrolled(p, x):
        for k in range(layers):
            x = jnp.tanh(x @ p["w"][k])
        return x.sum()

    x, base = w(tokens, width), {"w": w(layers, width, width)}
    params = rank_one(base, {"w": "io"})
    products = lambda f, *a: sum(
        2 * eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[k]
        for eqn in equations(jax.make_jaxpr(f)(*a))
        if eqn.primitive.name == "dot_general"
        for (k,), _ in [eqn.params["dimension_numbers"][0]]
    )
    one = 2 * tokens * width**2
    assert products(unrolled, base, x) == layers * one
    extra = products(functools.partial(capture, unrolled), params, x) - layers * one
    # The squares, and what lays each out as the parameters are: a product of the weight's size.
    assert extra == layers * (one + 2 * width**3), extra

    params = rank_one({"w": w(16, width, width)}, {"w": "io"})
    compiled = jax.jit(functools.partial(capture, fn)).lower(params, x).compile()
    needed, inputs = compiled.memory_analysis().temp_size_in_bytes, 16 * tokens * width * 4
    print(f"temporary: {needed:,} bytes; the inputs of all layers would be {inputs:,}")
    assert needed < inputs / 3


@pytest.mark.sample(6)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_program_is_walked(case):
    """Sums, or a reason why a weight has none: nothing else comes of any program."""
    with jax.numpy_rank_promotion("allow"):
        layouts = case.layouts(case.params)
        params = jlora.attach(
            case.params, {case.rules: LoraSpec(1)}, key=jax.random.key(0), layouts=layouts
        )
        try:
            moments = jax.eval_shape(functools.partial(capture, case.fn), params, *case.args)
        except ValueError as error:
            assert "there are no inputs for" in str(error)
            return
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jlora.LoraArray))
    nodes = [x for x in nodes if isinstance(x, jlora.LoraArray)]
    found = jax.tree.leaves(moments, is_leaf=lambda x: isinstance(x, jlora.Moments))
    assert [m.second.shape[:-2] for m in found] == [
        x.shape[: x.ndim - len(x.layout)] for x in nodes
    ]


def test_errors():
    params = rank_one({"w": w(11, 7)})
    with pytest.raises(ValueError, match=r"no LoraArray in `params`.*jlora.attach"):
        capture(lambda p, x: x @ p["w"], {"w": w(11, 7)}, X)
    with pytest.raises(ValueError, match=r'(?s)"w" float32\[11,7\] \(never used\).*"w": None'):
        capture(lambda p, x: x, params, X)
    with pytest.raises(ValueError, match=r'"w" float32\[11,7\] \(gather at .*test_capture.py'):
        capture(lambda p, n: p["w"][n] @ p["w"].T, params, jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"`jlora.capture`: .*needs lora_a"):
        short = dataclasses.replace(params["w"], lora_a=params["w"].lora_a[:5])
        capture(lambda p, x: x @ p["w"], {"w": short}, X)
