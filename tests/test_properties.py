"""Random programs: whatever multiplies, looks up or convolves, and whatever comes before it.

`nightly` runs each with 2,000 examples: `python -m pytest -m nightly tests/test_properties.py`.
"""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jlora
from jlora.transform.structural import _groups

SIZES = st.sampled_from([1, 2, 3, 5])
RANK = 2


def examples(strategy):
    """Check the law for ten random programs, and for 2,000 under the marker `nightly`.

    There 200 are of DoRA too, whose weights are built where a gain has no place.
    `make(*example)` gives a function, its LoraArray and its other arguments. Ten at a time are
    compiled as one program, which is most of their cost.
    """

    def decorate(make):
        night = pytest.mark.nightly
        counts = [
            pytest.param(10, False, id="10"),
            pytest.param(2000, False, marks=night, id="2000"),
            pytest.param(200, True, marks=night, id="dora"),
        ]

        @pytest.mark.parametrize(("count", "dora"), counts)
        def run(count, dora):
            @settings(max_examples=count // 10, deadline=None, derandomize=True)
            @given(st.lists(strategy, min_size=10, max_size=10))
            def sampled(batch):
                programs = [make(*example) for example in batch]
                if dora:
                    programs = [(fn, with_magnitude(node), *args) for fn, node, *args in programs]
                agree(programs, batch, fallback="materialize" if dora else "error")

            sampled()

        return run

    return decorate


@st.composite
def layouts(draw, ndim):
    """Draw a layout of both letters for the last axes of a weight; the others are its stack."""
    free = draw(st.integers(2, ndim))
    rest = draw(st.lists(st.sampled_from("io"), min_size=free - 2, max_size=free - 2))
    return "".join(draw(st.permutations(["i", "o", *rest])))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def node_of(shape, layout, seed=0):
    """Make a LoraArray of random values."""
    stack, dims = shape[: len(shape) - len(layout)], shape[len(shape) - len(layout) :]
    ins, outs = ([n for n, k in zip(dims, layout, strict=True) if k == c] for c in "io")
    return jlora.LoraArray(
        normal(seed, *shape),
        normal(seed + 1, *stack, *ins, RANK),
        normal(seed + 2, *stack, RANK, *outs),
        jnp.full(stack, 0.7),
        layout,
    )


def with_magnitude(node):
    outs = node.lora_b.shape[len(node.shape) - len(node.layout) + 1 :]
    stack = node.shape[: len(node.shape) - len(node.layout)]
    return node.with_parts({"magnitude": normal(8, *stack, *outs)})


def agree(programs, drawn, fallback):
    """The law, for output and gradients of all that trains and the input."""

    def by(fn, frozen, args, trainable, values):
        def loss(trainable, values):
            filled = [values.get(k, x) for k, x in enumerate(args)]
            out = fn(jlora.combine(trainable, frozen), *filled)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trainable, values)

    inputs = []
    for _, node, *args in programs:
        trainable, frozen = jlora.partition(node)
        real = {k: x for k, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.inexact)}
        inputs.append((frozen, args, trainable, real))

    @jax.jit
    def both(inputs):
        return [
            (
                by(jlora.lora(fn, fallback=fallback), *parts),
                by(lambda p, *a, fn=fn: fn(jlora.merge(p), *a), *parts),
            )
            for (fn, *_), parts in zip(programs, inputs, strict=True)
        ]

    for (got, want), example in zip(both(inputs), drawn, strict=True):
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            bound = 3e-4 * max(1.0, float(np.abs(w).max(initial=0)))
            np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=repr(example))


@st.composite
def products(draw):
    shape = tuple(draw(st.lists(SIZES, min_size=2, max_size=4)))
    axes = draw(st.permutations(range(len(shape))))
    summed = draw(st.integers(0, len(shape)))
    batched = draw(st.integers(0, len(shape) - summed))
    w_sum, w_batch = axes[:summed], axes[summed : summed + batched]
    own = draw(st.lists(SIZES, max_size=2))
    dims = [("w", k) for k in (*w_sum, *w_batch)] + [("x", n) for n in own]
    dims = draw(st.permutations(dims))
    x_shape = [shape[n] if kind == "w" else n for kind, n in dims]
    x_sum, x_batch = ([dims.index(("w", k)) for k in group] for group in (w_sum, w_batch))
    numbers = (w_sum, x_sum), (w_batch, x_batch)
    return shape, draw(layouts(len(shape))), x_shape, numbers, draw(st.booleans())


@examples(products())
def test_dot_general_in_every_arrangement(shape, layout, x_shape, numbers, weight_first):
    (w_sum, x_sum), (w_batch, x_batch) = numbers

    def fn(w, x):
        if weight_first:
            return lax.dot_general(w, x, ((w_sum, x_sum), (w_batch, x_batch)))
        return lax.dot_general(x, w, ((x_sum, w_sum), (x_batch, w_batch)))

    return fn, node_of(shape, layout), normal(9, *x_shape)


@st.composite
def einsums(draw):
    """Draw labels of a weight, of an activation and of the result; a lone label may be summed."""
    letters = string.ascii_lowercase[: draw(st.integers(2, 5))]
    sizes = {c: draw(SIZES) for c in letters}
    w = draw(st.permutations(letters))[: draw(st.integers(2, len(letters)))]
    x = draw(st.permutations([*letters, "z"]))[: draw(st.integers(1, len(letters)))]
    sizes["z"] = 4
    every = list(dict.fromkeys([*w, *x]))
    out = draw(st.permutations(every))[: draw(st.integers(0, len(every)))]
    formula = f"{''.join(x)},{''.join(w)}->{''.join(out)}"
    shape = tuple(sizes[c] for c in w)
    return formula, shape, draw(layouts(len(shape))), [sizes[c] for c in x]


@examples(einsums())
def test_einsums(formula, shape, layout, x_shape):
    return lambda w, x: jnp.einsum(formula, x, w), node_of(shape, layout), normal(9, *x_shape)


@st.composite
def convolutions(draw):
    n = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    cin, cout = draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    window = [draw(st.integers(1, 3)) for _ in range(n)]
    image = [draw(st.integers(4, 7)) for _ in range(n)]
    kw = {
        "window_strides": [draw(st.integers(1, 2)) for _ in range(n)],
        "rhs_dilation": [draw(st.integers(1, 2)) for _ in range(n)],
        "lhs_dilation": [draw(st.integers(1, 2)) for _ in range(n)],
        "feature_group_count": groups,
        "padding": draw(st.sampled_from(["SAME", "VALID"])),
    }
    if kw["lhs_dilation"] != [1] * n or kw["padding"] == "VALID":
        kw["padding"] = [(draw(st.integers(2, 4)), draw(st.integers(2, 4))) for _ in range(n)]
    spatial = "HW"[:n]
    orders = [
        draw(st.permutations(["N", "C", *spatial])),
        draw(st.permutations(["O", "I", *spatial])),
    ]
    numbers = ("".join(orders[0]), "".join(orders[1]), "".join(orders[0]))
    sizes = dict(zip("NC" + spatial, [2, groups * cin, *image], strict=True))
    kernel = dict(zip("IO" + spatial, [cin, cout, *window], strict=True))
    inverted = groups == 1 and draw(st.booleans())  # the window on the output's side
    sides = {"I": "i", "O": "o", "H": "o" if inverted else "i", "W": "o" if inverted else "i"}
    return (
        tuple(kernel[c] for c in numbers[1]),
        "".join(sides[c] for c in numbers[1]),
        tuple(sizes[c] for c in numbers[0]),
        numbers,
        kw,
    )


@examples(convolutions())
def test_convolutions(shape, layout, x_shape, numbers, kw):
    def fn(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **kw)

    return fn, node_of(shape, layout), normal(9, *x_shape)


@st.composite
def lookups(draw):
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 5]), min_size=2, max_size=3)))
    looked_up = sorted(draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=2)))
    sizes = [draw(st.integers(1, n)) if k in looked_up else n for k, n in enumerate(shape)]
    collapsed = [k for k in looked_up if sizes[k] == 1 and draw(st.booleans())]
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    order = draw(st.permutations(looked_up))
    mode = draw(st.sampled_from(["clip", "fill", "promise_in_bounds"]))
    beyond = 2 if mode != "promise_in_bounds" else 0
    most = [shape[k] - sizes[k] + beyond for k in order]
    seed = draw(st.integers(0, 99))
    kept = len(shape) - len(collapsed)
    offsets = sorted(draw(st.permutations(range(len(lead) + kept)))[:kept])
    return (
        shape,
        draw(layouts(len(shape))),
        order,
        sizes,
        collapsed,
        lead,
        offsets,
        mode,
        most,
        seed,
    )


@examples(lookups())
def test_lookups(shape, layout, order, sizes, collapsed, lead, offsets, mode, most, seed):
    numbers = lax.GatherDimensionNumbers(tuple(offsets), tuple(collapsed), tuple(order))
    rng = np.random.default_rng(seed)
    index = np.stack([rng.integers(0, n + 1, lead) for n in most], axis=-1)

    def fn(w, index, x):
        got = lax.gather(w, index, numbers, tuple(sizes), mode=mode, fill_value=0)
        return jnp.tensordot(got, x, (got.ndim - 1, 0)) if got.ndim else got * x[0]

    lookup = lambda w: lax.gather(w, index, numbers, tuple(sizes), mode=mode)
    out = jax.eval_shape(lookup, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return fn, node_of(shape, layout), jnp.asarray(index, jnp.int32), normal(9, (out or (1,))[-1])


STEPS = {
    "transpose": lambda w, rng: jnp.transpose(w, rng.permutation(w.ndim)),
    "slice": lambda w, rng: lax.slice_in_dim(w, *_span(w, k := _axis(w, rng), rng), axis=k),
    "dynamic": lambda w, rng: lax.dynamic_slice_in_dim(
        w, jnp.asarray(1), max(w.shape[k := _axis(w, rng)] - 1, 1), k
    ),
    "rev": lambda w, rng: lax.rev(w, (_axis(w, rng),)),
    "expand": lambda w, rng: jnp.expand_dims(w, _axis(w, rng)),
    "scale": lambda w, rng: w * 0.5 / 3.0,
    "copy": lambda w, rng: jnp.array(w, copy=True),
    "scale_axis": lambda w, rng: w * _along(w, _axis(w, rng)),
    "roll": lambda w, rng: jnp.roll(w, 1, axis=_axis(w, rng)),
    "join": lambda w, rng: jnp.concatenate([w, -w], axis=_axis(w, rng)),
    "array": lambda w, rng: jnp.concatenate([w, jnp.ones_like(w)], axis=_axis(w, rng)),
    "stack": lambda w, rng: jnp.stack([w, 2.0 * w, jnp.ones_like(w)], axis=_axis(w, rng)),
    "add": lambda w, rng: w + lax.rev(w, (_axis(w, rng),)) - 1.0,
    "where": lambda w, rng: jnp.where(_along(w, _axis(w, rng)) > 0, w, 3.0 * w),
    "mask": lambda w, rng: jnp.where(_along(w, _axis(w, rng)) > 0, w, 0.0),
    "pad": lambda w, rng: lax.pad(
        w, 2.0, [(1, 0, 1) if k == 0 else (0, 0, 0) for k in range(w.ndim)]
    ),
    "repeat": lambda w, rng: jnp.repeat(w, 2, axis=_axis(w, rng)),
    "tile": lambda w, rng: jnp.tile(w, [2] + [1] * (w.ndim - 1)),
    "broadcast": lambda w, rng: jnp.broadcast_to(w[None], (2, *w.shape)),
    "sum": lambda w, rng: w.sum(_axis(w, rng)) if w.ndim > 2 else w,
    "cond": lambda w, rng: lax.cond(w.shape[0] > jnp.asarray(2), lambda: w, lambda: 2.0 * w),
    "jit": lambda w, rng: jax.jit(lambda w: w.T)(w),
    "barrier": lambda w, rng: lax.optimization_barrier(w),
}


def _axis(w, rng):
    return int(rng.integers(w.ndim))


def _span(w, axis, rng):
    start = int(rng.integers(w.shape[axis]))
    return start, int(rng.integers(start, w.shape[axis])) + 1


def _along(w, axis):
    """A vector that varies along one axis only, broadcast to the weight's rank."""
    return jnp.cos(3.0 * jnp.arange(0.0, w.shape[axis])).reshape(
        [-1 if k == axis else 1 for k in range(w.ndim)]
    )


@st.composite
def chains(draw):
    shape = tuple(draw(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=3)))
    steps = draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=4))
    return shape, draw(layouts(len(shape))), steps, draw(st.integers(0, 99))


@examples(chains())
def test_chains_of_views(shape, layout, steps, seed):
    def fn(w, x):
        rng = np.random.default_rng(seed)
        for step in steps:
            w = STEPS[step](w, rng)
        axis = _axis(w, rng)
        vector = jnp.cos(jnp.arange(1.0, w.shape[axis] + 1)) * x
        return jnp.tensordot(vector, w, (0, axis))

    return fn, node_of(shape, layout), jnp.asarray(1.5)


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
