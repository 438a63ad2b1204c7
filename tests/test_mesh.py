"""A model on a mesh computes what it computes on one device, and its step is compiled once."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh import RANK, collectives, compiled
from mesh_model import TOKENS, base, loss, mesh, params, placed, rules, specs

import jlora

CASES = [
    pytest.param(
        *case,
        marks=[] if case == (AxisType.Explicit, (2, 4), True, ("fsdp",)) else [pytest.mark.nightly],
        id="-".join(map(str, case)),
    )
    for case in itertools.product(
        (AxisType.Auto, AxisType.Explicit), ((4, 2), (2, 4)), (True, False), ((), ("fsdp",))
    )
]
LR = 0.5


@functools.partial(jax.jit, static_argnames="kind")
def steps(p, tokens, kind=None):
    """Logits and gradient, and the losses and the adapter of 20 steps of SGD."""
    trained, frozen = jlora.partition(p)

    def of(trained):
        return loss(jlora.combine(trained, frozen), tokens, kind)

    def step(trained, _):
        (value, logits), grads = jax.value_and_grad(of, has_aux=True)(trained)
        moved = jax.tree.map(lambda x, g: x - LR * g, trained, grads)
        return moved, (value, logits, grads)

    last, (losses, logits, grads) = jax.lax.scan(step, trained, length=20)
    return logits[0], jax.tree.map(lambda g: g[0], grads), losses, last


@functools.cache
def alone(scanned, dora):
    p = params(scanned, dora=dora)
    return p, steps(p, TOKENS)


def near(got, want):
    """Compare two trees, relative to the largest value in each."""
    most = max(float(abs(x).max()) for x in jax.tree.leaves(want))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * most)


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "shape", "scanned", "replicate"), CASES)
def test_as_on_one_device(kind, shape, scanned, replicate):
    p, want = alone(scanned, dora=True)
    where = mesh(shape, kind)
    on_mesh = placed(p, where, scanned, replicate)
    tokens = jax.device_put(TOKENS, NamedSharding(where, P("fsdp")))
    with jax.set_mesh(where):
        got = steps(on_mesh, tokens, kind)
    assert float(want[2][-1]) < 0.99 * float(want[2][0]), "it learns"
    for x, y in zip(got, want, strict=True):
        near(x, y)
    if kind == AxisType.Explicit:
        trained = jlora.partition(on_mesh)[0]
        for x, y in zip(*map(jax.tree.leaves, (got[3], trained)), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def step_of(tx, kind):
    """The step of the README, of all parameters or of the two trees of `partition`."""

    def frozen_in(p, state, tokens):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(p, tokens)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    def apart(trained, frozen, state, tokens):
        def of(trained):
            return loss(jlora.combine(trained, frozen), tokens)[0]

        value, grads = jax.value_and_grad(of)(trained)
        updates, state = tx.update(grads, state, trained)
        return jlora.apply_updates(trained, updates), frozen, state, value

    return frozen_in if kind == "freeze" else apart


@pytest.mark.parametrize("kind", ["freeze", "partition"])
def test_a_step_is_compiled_once(kind, caplog, usual_promotion):
    where = mesh((4, 2), AxisType.Auto)
    weights = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(where, spec)), base(True), specs(True)
    )
    tokens = jax.device_put(TOKENS, NamedSharding(where, P("fsdp")))
    p = jlora.attach(weights, rules(), key=jax.random.key(0), replicate=("fsdp",))
    tx = jlora.freeze(optax.adam(1e-2)) if kind == "freeze" else optax.adam(1e-2)
    args = (p,) if kind == "freeze" else jlora.partition(p)
    state = jax.eval_shape(tx.init, args[0])
    at = [jlora.shardings(x, ("fsdp",), of=p) for x in (*args, state)]
    state = jax.jit(tx.init, out_shardings=at[-1])(args[0])
    step = jax.jit(step_of(tx, kind), donate_argnums=range(len(at)), out_shardings=(*at, None))
    now, losses, where_w = (*args, state), [], addresses((*args, state), weights)
    with jax.log_compiles():
        for _ in range(3):
            before = [x.sharding for x in jax.tree.leaves(now)]
            *now, value = step(*now, tokens)
            losses.append(float(value))
            for x, was in zip(jax.tree.leaves(now), before, strict=True):
                assert x.sharding.is_equivalent_to(was, x.ndim)
    compiled = [x for x in caplog.messages if f"XLA compilation of jit({step.__name__})" in x]
    assert len(compiled) == 1 and losses[2] < losses[0]
    assert addresses(now, weights) == where_w, "W is where it was"


def addresses(tree, weights):
    """Where the shards of the arrays that have the shape of a weight are."""
    shapes = {x.shape for x in jax.tree.leaves(weights)}
    return [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(tree)
        if x.shape in shapes
        for shard in x.addressable_shards
    ]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layouts_outside_of_the_mesh(kind):
    """A model with constraints is traced in the mesh that its weights are on."""
    where = mesh((4, 2), kind)
    weights = {"w": jax.device_put(jnp.ones((8, 4)), NamedSharding(where, P("fsdp", "tp")))}

    def constrained(p, x):
        if kind == AxisType.Auto:
            return jax.lax.with_sharding_constraint(x @ p["w"], P("fsdp", "tp"))
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("fsdp", "tp"))

    assert jlora.layouts(constrained, weights, jnp.ones((8, 8))) == {"w": "io"}
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights
    )
    assert jlora.layouts(constrained, structs, jnp.ones((8, 8))) == {"w": "io"}


@functools.cache
def collectives_of(mode, replicate=()):
    return collectives(compiled(mode, (4, 2), replicate))


def counted(*of):
    """How many results of collectives have a kind and a shape."""
    return collections.Counter((kind, s) for kind, shapes, _ in collectives_of(*of) for s in shapes)


@pytest.mark.nightly
def test_no_collective_of_the_adapter_but_its_gradient():
    """With the axis of the batch left out, A and B are not gathered, and W no more than without."""
    more = counted("jlora", ("fsdp",)) - counted("limit")
    assert not [key for key in more if key[0] != "all-reduce"], more
    wide = {x.shape for x in jax.tree.leaves(base(False))}
    assert not [key for key in more if key[1] in wide], more
    inherited = counted("jlora") - counted("limit")
    assert [key for key in inherited if key[0] == "all-gather" and RANK in key[1]]


@pytest.mark.nightly
def test_no_copy_of_a_weight():
    """None of its size, whole or a device's part, that the step without an adapter has not."""
    whole = jax.tree.map(lambda x, at: (x, at), base(False), specs(False))
    sizes = set()
    for x, at in jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, tuple)):
        part = NamedSharding(mesh((4, 2), AxisType.Auto), at).shard_shape(x.shape)
        sizes |= {x.size, int(np.prod(part)), x.size // 2}  # of all, of one, along "tp" alone

    def copied(*of):
        found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled(*of))
        shapes = [tuple(map(int, dims.split(","))) for dims in found]
        return collections.Counter(s for s in shapes if RANK not in s and np.prod(s) in sizes)

    assert not copied("jlora", (4, 2), ("fsdp",)) - copied("limit")


@pytest.mark.nightly
def test_gradients_are_reduced_together():
    """At most one all-reduce of gradients a layer: here one for all of them."""
    trained = jlora.partition(
        placed(params(False, rank=RANK), mesh((4, 2), AxisType.Auto), False, ("fsdp",))
    )[0]
    of_a_device = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(trained)}
    reduced = [
        [shape for shape in shapes if shape in of_a_device]
        for kind, shapes, _ in collectives_of("jlora", ("fsdp",))
        if kind == "all-reduce"
    ]
    assert [len(x) for x in reduced if x] == [len(jax.tree.leaves(trained))]


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_updates_are_added_after_those_of_the_base(dora):
    """Then XLA adds what each device has of those for q, k and v, and reduces one sum."""
    where = NamedSharding(mesh((4, 2), AxisType.Auto), P(None, "tp"))
    weights = {name: jax.device_put(jnp.ones((8, 6)), where) for name in "qkv"}
    p = jlora.attach(weights, {".*": jlora.LoraSpec(2, dora=dora)}, key=jax.random.key(0))

    def total(p, x):
        return sum((x @ p[name]).sum() for name in "qkv")

    program = jax.make_jaxpr(jax.grad(jlora.lora(total), argnums=1))(p, jnp.ones((4, 8)))
    of_base, sums = set(), 0
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            of_base |= {*eqn.outvars}
        elif eqn.primitive.name == "add_any" and of_base >= {*eqn.invars}:
            of_base, sums = of_base | {*eqn.outvars}, sums + 1
    assert sums == 2
    assert (
        "copy"
        not in jax.jit(jax.grad(jlora.lora(total), argnums=1)).lower(p, jnp.ones((4, 8))).as_text()
    )
