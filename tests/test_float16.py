"""float16: what the merged model computes finitely, the factored one computes finitely too.

bfloat16: gradients of A and B are not rounded to it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations
from jax import lax

import jlora

HALF = jnp.float16
S = 91.0
LARGE = 8504.0


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def node(shape, layout, parts=HALF, inward=True, w=0.3, m=None, rank=2, dtype=HALF):
    """W of about `w`; one factor of about 1, which meets large inputs, and one of about 1e-4."""
    ins = [n for n, k in zip(shape[-len(layout) :], layout, strict=True) if k == "i"]
    outs = [n for n, k in zip(shape[-len(layout) :], layout, strict=True) if k == "o"]
    stack = shape[: -len(layout)]
    a, b = normal(1, *stack, *ins, rank), normal(2, *stack, rank, *outs)
    a, b = (a, b * 1e-4) if inward else (a * 1e-4, b)
    extra = {} if m is None else {"magnitude": jnp.asarray(m * (1 + np.arange(outs[0])), parts)}
    base = jnp.asarray(normal(0, *shape) * w, dtype)
    factors = jnp.asarray(a, parts), jnp.asarray(b, parts)
    return jlora.LoraArray(base, *factors, jnp.full(stack, S), layout, extra=extra)


def x(*shape):
    return jnp.asarray(np.clip(normal(3, *shape), -1, 1) * LARGE, HALF)


def convolve(p, x):
    return lax.conv_general_dilated(x, p, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def dense(p, x):
    return x @ p


def tied(p, x):
    return x @ p.T


def scanned(p, x):
    return lax.scan(lambda x, w: (x @ w * 0.1, None), x, p)[0]


MODELS = {
    "dense": (dense, ((16, 8), "io"), {}, x(4, 16)),
    "tied head": (tied, ((16, 8), "io"), dict(inward=False), x(4, 8)),
    "heads": (lambda p, x: jnp.einsum("ti,iho->tho", x, p), ((16, 2, 4), "ioo"), {}, x(4, 16)),
    "conv": (convolve, ((3, 4, 8), "iio"), {}, x(2, 5, 4)),
    "experts": (lambda p, x: lax.ragged_dot(x, p, SIZES), ((2, 16, 8), "io"), {}, x(4, 16)),
    "scan": (scanned, ((2, 8, 8), "io"), {}, x(4, 8)),
    "dora": (dense, ((16, 8), "io"), dict(m=0.1), x(4, 16)),
    "dora's tied head": (tied, ((16, 8), "io"), dict(inward=False, w=1e-2, m=0.5), x(4, 8)),
    "dora's conv": (convolve, ((3, 4, 8), "iio"), dict(m=0.1), x(2, 5, 4)),
}
SIZES = jnp.array([1, 3])


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def near(got, want):
    """Within the roundings of float16 of a sum, relative to the largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()


def both(fn, w, *args):
    """Outputs and gradients of the factored and of the merged model."""
    trainable, frozen = jlora.partition(w)

    def run(apply):
        def loss(t, args):
            y = apply(jlora.combine(t, frozen), *args)
            return (y.astype(jnp.float32) * 1e-3).sum(), y

        wrt = (0, 1) if jnp.issubdtype(args[0].dtype, jnp.inexact) else 0
        return jax.jit(jax.grad(loss, wrt, has_aux=True))(trainable, args)

    return run(jlora.lora(fn, fallback="error")), run(lambda p, *a: fn(jlora.merge(p), *a))


@pytest.mark.sample(8)
@pytest.mark.parametrize("parts", [HALF, jnp.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_large_inputs(name, parts):
    fn, shape, more, inputs = MODELS[name]
    got, want = both(fn, node(*shape, parts, **more), inputs)
    assert finite(want), "the merged model overflows, so nothing is compared"
    assert finite(got)
    near(got, want)


CANCEL = {
    "dense": (dense, (1, 1), "io", (1, 1)),
    "conv": (convolve, (1, 1, 1), "iio", (1, 1, 1)),
    "experts": (lambda p, x: lax.ragged_dot(x, p, jnp.array([1])), (1, 1, 1), "io", (1, 1)),
}


@pytest.mark.parametrize("name", CANCEL)
def test_terms_that_overflow_alone(name):
    """x W is 70,000, beyond float16, and x (W + s A B) is 50,000."""
    fn, shape, layout, of_x = CANCEL[name]
    stack = shape[: -len(layout)]
    a = jnp.full((*shape[:-1], 1), -100.0, HALF)
    b, s = jnp.ones((*stack, 1, 1), HALF), jnp.full(stack, 2.0)
    w = jlora.LoraArray(jnp.full(shape, 700.0, HALF), a, b, s, layout)
    got, want = both(fn, w, jnp.full(of_x, 100.0, HALF))
    assert finite(want) and finite(got)
    near(got, want)


def test_rows_that_overflow_alone():
    """A row of W is 60,000 and its update is -91,000."""
    rows, ones = jnp.full((3, 2), 60000.0, HALF), jnp.ones((1, 2), HALF)
    w = jlora.LoraArray(rows, jnp.full((3, 1), -1000.0, HALF), ones, S, "io")
    got, want = both(lambda p, ids: p[ids], w, jnp.array([2, 0]))
    assert finite(want) and finite(got)
    near(got, want)


@pytest.mark.parametrize("name", ["dense", "conv", "dora"])
def test_the_products_are_those_of_float32(name):
    fn, shape, more, inputs = MODELS[name]

    def products(dtype):
        cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
        run = jax.make_jaxpr(jlora.lora(fn))(cast(node(*shape, **more)), cast(inputs))
        names = ("dot_general", "conv_general_dilated")
        found = [e for e in equations(run) if e.primitive.name in names]
        return sorted(str([v.aval.shape for v in (*e.invars, *e.outvars)]) for e in found)

    assert products(HALF) == products(jnp.float32)


@pytest.mark.parametrize(
    ("name", "rank"), [("dense", 2), ("dense", 12), ("experts", 12), ("conv", 2)]
)
def test_gradients_of_a_bfloat16_model_are_not_rounded(name, rank):
    """They are summed over devices where they are computed: in float32 from the products on."""
    fn, (shape, layout), _, x = MODELS[name]
    params = node(shape, layout, jnp.float32, w=1, rank=rank, dtype=jnp.bfloat16)
    run = jlora.lora(lambda p, x: jnp.square(fn(p, x).astype(jnp.float32)).sum())
    found = jax.jit(jax.grad(run))(params, jnp.asarray(normal(3, *x.shape), jnp.bfloat16))
    for g in (found.lora_a, found.lora_b):
        assert (g != g.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("name", ["dense", "experts", "conv"])
def test_inputs_are_kept_in_bfloat16(name):
    """What the backward pass needs of a bfloat16 model is not widened before."""
    fn, (shape, layout), _, x = MODELS[name]
    params = node(shape, layout, jnp.float32, w=1, dtype=jnp.bfloat16)
    run = lambda p: jlora.lora(fn)(p, jnp.asarray(x, jnp.bfloat16))
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], params))
    assert {k.dtype.name for k in kept if k.size >= x.size} == {"bfloat16"}
