"""Random programs: whatever dot_general contracts, and whatever rearranges the weight before it."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jlora
from jlora.transform.structural import _groups

few = settings(max_examples=40, deadline=None, derandomize=True)
SIZES = st.sampled_from([1, 2, 3, 5])


def draw_node(draw, shape):
    """A LoraArray of random values over `shape`, with a random layout of both letters."""
    free = draw(st.integers(2, len(shape)))
    letters = draw(
        st.permutations(
            ["i", "o", *draw(st.lists(st.sampled_from("io"), min_size=free - 2, max_size=free - 2))]
        )
    )
    layout = "".join(letters)
    split = len(shape) - free
    dims = {c: [n for n, k in zip(shape[split:], layout, strict=True) if k == c] for c in "io"}
    rng = np.random.default_rng(draw(st.integers(0, 9)))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    stack = shape[:split]
    return jlora.LoraArray(
        normal(*shape),
        normal(*stack, *dims["i"], 2),
        normal(*stack, 2, *dims["o"]),
        jnp.full(stack, 0.7),
        layout,
    )


def agree(fn, node, *args):
    """The law, for output and gradients, with nothing materialized."""
    got = jlora.lora(fn, fallback="error")(node, *args)
    np.testing.assert_allclose(got, fn(jlora.merge(node), *args), rtol=2e-4, atol=2e-4)
    trainable, frozen = jlora.partition(node)

    def by(f):
        return jax.grad(lambda t: jnp.sin(f(jlora.combine(t, frozen), *args)).sum())(trainable)

    ours = by(jlora.lora(fn, fallback="error"))
    theirs = by(lambda p, *a: fn(jlora.merge(p), *a))
    for g, w in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-3, atol=2e-3)


@st.composite
def products(draw):
    shape = tuple(draw(st.lists(SIZES, min_size=2, max_size=4)))
    node = draw_node(draw, shape)
    axes = draw(st.permutations(range(len(shape))))
    summed = draw(st.integers(0, len(shape)))
    batched = draw(st.integers(0, len(shape) - summed))
    w_sum, w_batch = axes[:summed], axes[summed : summed + batched]
    own = draw(st.lists(SIZES, max_size=2))
    dims = [("w", k) for k in (*w_sum, *w_batch)] + [("x", n) for n in own]
    dims = draw(st.permutations(dims))
    x_shape = [shape[n] if kind == "w" else n for kind, n in dims]
    x_sum, x_batch = ([dims.index(("w", k)) for k in group] for group in (w_sum, w_batch))
    return node, x_shape, (w_sum, x_sum), (w_batch, x_batch), draw(st.booleans())


@few
@given(products())
def test_dot_general_in_every_arrangement(product):
    node, x_shape, (w_sum, x_sum), (w_batch, x_batch), weight_first = product
    x = jnp.asarray(np.random.default_rng(1).normal(size=x_shape), jnp.float32)

    def fn(w, x):
        if weight_first:
            return lax.dot_general(w, x, ((w_sum, x_sum), (w_batch, x_batch)))
        return lax.dot_general(x, w, ((x_sum, w_sum), (x_batch, w_batch)))

    agree(fn, node, x)


@st.composite
def rearrangements(draw):
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=3)))
    node = draw_node(draw, shape)
    steps = draw(
        st.lists(
            st.sampled_from(
                ["transpose", "slice", "rev", "expand", "split", "scale", "copy", "dynamic"]
            ),
            max_size=4,
        )
    )
    return node, steps, draw(st.integers(0, 99))


@few
@given(rearrangements())
def test_chains_of_views(chain):
    node, steps, seed = chain

    def fn(w, x):
        rng = np.random.default_rng(seed)
        for step in steps:
            axis = int(rng.integers(w.ndim))
            if step == "transpose":
                w = jnp.transpose(w, rng.permutation(w.ndim))
            elif step == "slice" and w.shape[axis] > 1:
                w = lax.slice_in_dim(w, 1, w.shape[axis], axis=axis)
            elif step == "dynamic" and w.shape[axis] > 1:
                w = lax.dynamic_slice_in_dim(w, jnp.asarray(1), w.shape[axis] - 1, axis)
            elif step == "rev":
                w = lax.rev(w, (axis,))
            elif step == "expand":
                w = jnp.expand_dims(w, axis)
            elif step == "split" and w.shape[axis] % 2 == 0:
                shape = (*w.shape[:axis], 2, w.shape[axis] // 2, *w.shape[axis + 1 :])
                w = w.reshape(shape)
            elif step == "scale":
                w = w * 0.5
            elif step == "copy":
                w = jnp.array(w, copy=True)
        axis = int(rng.integers(w.ndim))
        vector = jnp.cos(jnp.arange(1.0, w.shape[axis] + 1)) * x
        return jnp.tensordot(vector, w, (0, axis))

    agree(fn, node, jnp.asarray(1.5))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), max_size=5), st.lists(st.integers(1, 3), max_size=4))
def test_reshape_groups_cover_every_axis_once(old, cuts):
    """Each group keeps its size, and old and new axes appear once, in order."""
    total = int(np.prod(old, dtype=int))
    new, left = [], total
    for cut in cuts:
        if left % cut == 0:
            new.append(cut)
            left //= cut
    new.append(left)
    groups = _groups(old, new)
    assert [k for before, _ in groups for k in before] == list(range(len(old)))
    assert [k for _, after in groups for k in after] == list(range(len(new)))
    for before, after in groups:
        assert np.prod([old[k] for k in before], dtype=int) == np.prod(
            [new[k] for k in after], dtype=int
        )
