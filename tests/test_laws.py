"""DESIGN's laws over the table of cases: `lora(f)(p, x) == f(merge(p), x)`, and what follows."""

import dataclasses
import functools
import warnings

import cases_weights
import jax
import jax.numpy as jnp
import pytest
from cases_forms import CASES, FORMS
from helpers import adapted, close, coarse, equations, jlora_node, loss_of, transform
from stored import base_of

import jlora
from jlora._paths import leaves_with_paths

# Of the cases over stored weights: what CI runs of each law; `-m nightly` runs the others.
SAMPLE = ("tied", "attention_kernels", "scan_stacked", "conv_2d", "joined_outputs", "dora_scanned")


def law(cases):
    """Run a law over these cases, over arrays and over stored weights."""
    stored = [
        pytest.param(
            dataclasses.replace(c, stored=True),
            marks=() if c.name in SAMPLE else pytest.mark.nightly,
        )
        for c in cases
    ]
    return pytest.mark.parametrize("case", [*cases, *stored], ids=repr)


every = law(CASES)
# What a law says of the transform as a whole is asked of each kind of model once.
# Of DoRA's, those that are models, not what is done to a weight.
DORA = [
    f"dora_{name}" for name in ("io", "attention", "tied", "scanned", "experts", "ragged", "conv")
]
MODELS = [
    c
    for c in CASES
    if c.fn.__module__ != cases_weights.__name__
    and (not c.dora or c.form in FORMS or c.name in DORA)
]
models = law(MODELS)
FACTORED = [c for c in CASES if not c.materialized]


def plain(case):
    """The base weights as arrays."""
    return jlora.merge(base_of(case)) if case.stored else case.params


@pytest.mark.sample(12)
@models
def test_identity_at_init(case):
    params = adapted(case, random=False)
    got, want = (
        jax.jit(transform(case))(params, *case.args),
        jax.jit(case.fn)(plain(case), *case.args),
    )
    close(got, want)


@functools.cache
def merged_and_base(case):
    """Return the outputs of the merged model and of the base."""
    fn = jax.jit(case.fn)
    return fn(jlora.merge(adapted(case)), *case.args), fn(plain(case), *case.args)


@pytest.mark.sample(6)
@every
def test_transform_is_merge(case):
    params = adapted(case)
    want, base = merged_and_base(case)
    differs = [
        bool(jnp.any(a != b))
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(base), strict=True)
    ]
    assert any(differs), "the adapter does nothing here, so the comparison shows nothing"
    close(jax.jit(transform(case))(params, *case.args), want)


@pytest.mark.sample(24)
@every
def test_transform_is_merge_without_jit(case):
    close(transform(case)(adapted(case), *case.args), merged_and_base(case)[0])


@pytest.mark.sample(12)
@every
def test_gradient_is_the_gradient_through_merge(case):
    trainable, frozen = jlora.partition(adapted(case))

    def by(fn):
        return jax.jit(jax.grad(lambda t: loss_of(case, fn)(jlora.combine(t, frozen), *case.args)))

    got = by(transform(case))(trainable)
    want = by(lambda p, *a: case.fn(jlora.merge(p), *a))(trainable)
    close(got, want, scale=coarse(case))


@pytest.mark.sample(6)
@law(FACTORED)
def test_no_array_of_deltas_shape(case):
    """Only casts, rearrangements of the base itself and the program's own results may have it."""
    params = adapted(case)
    shapes = {x.shape for x in jax.tree.leaves(params, is_leaf=jlora_node) if jlora_node(x)}
    mine = [e for e in equations(jax.make_jaxpr(transform(case))(params, *case.args).jaxpr)]
    fn = jlora.lora(case.fn) if case.stored else case.fn  # what builds a stored weight is its own
    own = [e for e in equations(jax.make_jaxpr(fn)(base_of(case), *case.args).jaxpr)]

    def count(eqns):
        made, codes = {}, set()
        for e in eqns:
            if e.primitive.name == "convert_element_type" and e.invars[0].aval.dtype == jnp.int8:
                codes.update(map(id, e.outvars))
            if not codes.isdisjoint(map(id, e.invars)):
                continue  # codes times scale: a stored weight is built, more than once under DoRA
            for v in e.outvars:
                if getattr(v.aval, "shape", None) in shapes and e.primitive.name in DENSE:
                    made[e.primitive.name] = made.get(e.primitive.name, 0) + 1
        return made

    # An activation may have a weight's shape (scan_rows, two_of_one_shape): the base has it too,
    # and each of its products is followed by one narrow product and its addition, or by as many
    # terms and additions as the rank.
    allowed, got = count(own), count(mine)
    products = allowed.get("dot_general", 0) + allowed.get("conv_general_dilated", 0)
    more = {name: got.get(name, 0) - allowed.get(name, 0) for name in DENSE}
    rank = min(
        x.lora_a.shape[-1] for x in jax.tree.leaves(params, is_leaf=jlora_node) if jlora_node(x)
    )
    assert more["dot_general"] + more["mul"] / rank <= products
    assert more["add"] <= more["dot_general"] + more["mul"]
    assert more["conv_general_dilated"] <= products


DENSE = ("dot_general", "add", "mul", "sub", "conv_general_dilated")


@pytest.mark.sample(10)
@every
def test_explain_says_how_many_are_materialized(case):
    params = adapted(case)
    report = jlora.explain(case.fn, params, *case.args)
    assert report.materialized == case.materialized, str(report)
    assert not report.unused
    assert all("tests/cases" in use.line or "flax" in use.line for use in report.uses), str(report)


@pytest.mark.sample(6)
@law(FACTORED)
def test_layouts_cover_every_adapted_weight(case):
    layouts = case.layouts(base_of(case))
    for path, node in nodes(adapted(case)):
        # A single row that is cut out is no product, so nothing is read from it: the default holds.
        assert node.layout == ("io" if case.name == "one_row" else layouts[path])


def nodes(params):
    return [(p, x) for p, x in leaves_with_paths(params, jlora_node) if jlora_node(x)]


# JAX itself cannot map `ragged_dot` over weights: "vmap over any dim but 0 - NYI".
MAPPED = [c for c in MODELS if not c.name.endswith("ragged")]


@pytest.mark.sample(24)
@law(MAPPED)
def test_vmap_over_adapters_is_a_loop_over_adapters(case):
    """One base, two adapters stacked: `vmap` with the base closed over."""
    base, one = jlora.detach(adapted(case))
    other = jax.tree.map(lambda x: x * 0.5, one)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)
    fn = transform(case)

    def run(adapter):
        return fn(jlora.bind(base, adapter), *case.args)

    got = jax.jit(jax.vmap(run))(both)
    want = [jax.jit(run)(adapter) for adapter in (one, other)]
    close(got, jax.tree.map(lambda a, b: jnp.stack([a, b]), *want), scale=4.0)


@pytest.mark.sample(24)
@models
def test_remat_outside(case):
    params = adapted(case)
    fn = transform(case)

    def by(fn):
        return jax.jit(jax.grad(lambda p: loss_of(case, fn)(p, *case.args), allow_int=True))

    got, want = by(jax.checkpoint(fn))(params), by(fn)(params)
    close(jlora.partition(got)[0], jlora.partition(want)[0], scale=coarse(case))


NO_JVP = (
    "activations_with_rules",
    "custom_vjp_weight",
    "dora_custom_vjp",
    "custom_vjp_of_three",
)  # custom_vjp has none
FORWARD = [c for c in CASES if c.name not in NO_JVP]


@pytest.mark.sample(24)
@law(FORWARD)
def test_forward_mode(case):
    trainable, frozen = jlora.partition(adapted(case))
    tangent = jax.tree.map(lambda x: jnp.cos(x), trainable)

    def by(fn):
        def value(t):
            return loss_of(case, fn)(jlora.combine(t, frozen), *case.args)

        return jax.jit(lambda t, dt: jax.jvp(value, (t,), (dt,))[1])(trainable, tangent)

    got, want = by(transform(case)), by(lambda p, *a: case.fn(jlora.merge(p), *a))
    close(got, want, scale=10 * coarse(case))


@pytest.mark.sample(12)
@models
def test_another_adapter_or_alpha_never_retraces(case):
    params = adapted(case)
    traces = []

    def counted(p, *args):
        traces.append(1)
        return transform(case)(p, *args)

    step = jax.jit(counted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(params, *case.args)
        trainable, frozen = jlora.partition(params)
        step(jlora.combine(jax.tree.map(lambda x: x + 1, trainable), frozen), *case.args)
        doubled = jax.tree.map(
            lambda n: dataclasses.replace(n, scaling=n.scaling * 2) if jlora_node(n) else n,
            params,
            is_leaf=jlora_node,
        )
        step(doubled, *case.args)
    assert len(traces) == 1


def test_scan_stacked_is_unrolled():
    stacked = next(c for c in CASES if c.name == "scan_stacked")
    params = adapted(stacked)
    x, sums = stacked.args[0], []
    for n in range(3):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], params)
        sums.append(x.sum())
        x = jlora.lora(lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]))(layer, x)
    close(transform(stacked)(params, *stacked.args), (x, jnp.stack(sums)))
