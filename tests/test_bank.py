"""Banks: each example of a batch equals its adapter alone, forward and backward, in any form."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import w
from cases_forms import CASES, FORMS, PLAIN
from helpers import coarse, equations, jlora_node, same, says, transform
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from stored import base_of, pack

import jlora
import jlora.checkpoint
import jlora.peft
from jlora import LoraSpec, bank

# The axes of the examples in the arguments and the results, where these are not the first ones.
AXES = {
    "weight_on_the_left": (1, 1),
    "experts": (1, 1),
    "vmap_inside": (1, 1),
    "running_sum_of_a_stack": (0, 1),
    "ensemble_of_convolutions": (1, 1),
    "heads_merged": (0, (1, 0)),
    **dict.fromkeys(("traced_index", "switch", "chosen_layer", "scaled_columns"), ((0, None), 0)),
    "short_axes": ((0, None), 0),
}
# Without an axis of examples, or with one of a fixed size.
WITHOUT = {
    *("vector_input", "one_row", "broadcast", "scan_rows", "ragged", "two_of_one_shape"),
    "contracted_stack",
}
SAMPLE = {
    *("matmul", "weight_on_the_left", "tied", "conv_2d", "jit", "custom_vjp_weight", "dora_tied"),
    "dora_bfloat16",
    *("product_of_weights", "nnx_linear", "lora_xs_scan_stacked", "vera_tied"),
}
STORED = {"matmul"}


def plain_name(case):
    """The case's name without that of its form."""
    if case.form == "lora" and not case.dora:
        return case.name
    prefixes = (*sorted((f"{form}_" for form in FORMS), key=len, reverse=True), "dora_")
    return next(case.name.removeprefix(p) for p in prefixes if case.name.startswith(p))


def batched():
    """The cases with an axis of examples; what CI does not run of them, nightly does."""
    for case in CASES:
        name = plain_name(case)
        if name in WITHOUT or name.startswith("shard_map"):
            continue
        marks = () if case.name in SAMPLE else pytest.mark.nightly
        yield pytest.param(case, marks=marks, id=case.name)
        if case.name in STORED:
            yield pytest.param(dataclasses.replace(case, stored=True), id=f"stored_{case.name}")


def random(params, seed=0):
    """The same adapter with random values in all that trains."""
    rng = np.random.default_rng(seed)
    trainable, frozen = jlora.partition(params)
    draw = lambda x: jnp.asarray((rng.normal(size=x.shape) * 0.3).astype(x.dtype))
    return jlora.combine(jax.tree.map(draw, trainable), frozen)


def adapters_of(case, base):
    """Three adapters of unlike ranks and scalings."""
    layouts = case.layouts(base)
    made = []
    for n, (rank, scaling) in enumerate([(2, "lora"), (1, "rslora"), (3, "rslora")]):
        spec = LoraSpec(rank, alpha=2.0 + n, scaling=scaling, dora=case.dora, form=case.form)
        params = jlora.attach(base, {case.rules: spec}, key=jax.random.key(n), layouts=layouts)
        made.append(jlora.detach(random(params, n))[1])
    return made


def one_of(leaf, k, axis):
    return leaf if axis is None else jax.lax.dynamic_slice_in_dim(leaf, k, 1, axis)


def spread(axes, count):
    return axes if isinstance(axes, tuple) else (axes,) * count


@pytest.mark.sample(8)
@pytest.mark.filterwarnings("ignore:A rank above:UserWarning")
@pytest.mark.filterwarnings("ignore:.*rank.*min:UserWarning")
@pytest.mark.parametrize("case", list(batched()))
def test_each_example_equals_its_adapter_alone(case):
    base = base_of(case)
    adapters = adapters_of(case, base)
    many = bank.stack(adapters, slots=4)
    in_axes, out_axes = AXES.get(plain_name(case), (0, 0))
    in_axes = spread(in_axes, len(case.args))
    count = case.args[0].shape[in_axes[0]]
    ids = np.array([2, -1, 0, 1, 2, 3, -1, 0, 1, 2, 0])[:count]
    fn = transform(case)
    run = functools.partial(bank.each, fn, in_axes=in_axes, out_axes=out_axes)
    got = jax.jit(run)(base, many, ids, *case.args)
    solo = jax.jit(fn)
    want = []
    for k, n in enumerate(ids):
        params = jlora.bind(base, adapters[n]) if 0 <= n < 3 else base
        want.append(
            solo(params, *(one_of(x, k, a) for x, a in zip(case.args, in_axes, strict=True)))
        )
    want = [jax.tree.leaves(x) for x in want]
    outs = jax.tree.leaves(got)
    for n, (y, axis) in enumerate(zip(outs, spread(out_axes, len(outs)), strict=True)):
        pieces = [x[n] if x[n].ndim else x[n][None] for x in want]
        same(y, jnp.concatenate(pieces, axis), 1e-6 * coarse(case))


# A model of two layers with biases, over which the adapters below are unlike one another.
BASE = {"one": {"w": w(11, 7), "b": w(7)}, "two": {"w": w(7, 5), "b": w(5)}}
X = w(6, 9, 11)
FEW = X[:, :1]


def model(p, x):
    for layer in (p["one"], p["two"]):
        x = jnp.tanh(x @ layer["w"] + jnp.expand_dims(layer["b"], range(x.ndim - 1)))
    return x


def adapter(rules, seed=0, base=BASE):
    return jlora.detach(random(jlora.attach(base, rules, key=jax.random.key(seed)), seed))[1]


@functools.cache
def unlike():
    """Other weights, ranks, scalings, forms of DoRA, and parameters trained in full."""
    return [
        adapter({".*/w": LoraSpec(2, alpha=3)}, 0),
        adapter({"one/w": LoraSpec(4, scaling="rslora"), "one/b": "full"}, 1),
        adapter({"two/w": LoraSpec(3), ".*/b": "full"}, 2),
    ]


@functools.cache
def with_dora():
    return [*unlike(), adapter({".*/w": LoraSpec(3, dora=True), "two/b": "full"}, 3)]


def alone(fn, adapters, n, base=BASE):
    return lambda *args: fn(
        jlora.bind(base, adapters[n]) if 0 <= n < len(adapters) else base, *args
    )


IDS = np.array([1, 0, -1, 2, 1, 0])


@pytest.mark.nightly
@pytest.mark.parametrize("x", [X, FEW], ids=["many", "few"])
@pytest.mark.parametrize("make", [unlike, with_dora])
def test_unlike_adapters_in_one_batch(x, make):
    adapters = make()
    many, ids = bank.stack(adapters, slots=5), np.array([1, 0, -1, 2, len(adapters) - 1, 4])
    got = jax.jit(functools.partial(bank.each, model))(BASE, many, ids, x)
    for k, n in enumerate(ids):
        same(got[k], alone(jlora.lora(model), adapters, n)(x[k]))
    same(bank.each(model, BASE, many, ids, x), got)  # without a jit


def test_few_tokens_multiply_all_slots_at_once_and_many_gather():
    def batches(x):
        jaxpr = jax.make_jaxpr(functools.partial(bank.each, model))(
            BASE, bank.stack(unlike()), IDS, x
        )
        dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        return {len(e.params["dimension_numbers"][1][0]) for e in dots if e.invars[0].aval.ndim > 1}

    assert batches(FEW) <= {0} and batches(X) == {0, 1}


def squares(fn):
    return lambda *args: (fn(*args) ** 2).sum()


@pytest.mark.sample(2)
@pytest.mark.parametrize("x", [X, FEW], ids=["many", "few"])
def test_gradients_are_those_of_the_adapters_alone(x):
    adapters, made = unlike(), bank.stack(unlike(), slots=5)
    run = squares(functools.partial(bank.each, model))
    grads, dx = jax.jit(jax.grad(run, (1, 3)))(BASE, made, IDS, x)
    each_slot = bank.Bank(grads.adapter, made.ranks, made.gains)
    for n, one in enumerate(adapters):
        rows = x[IDS == n]
        solo = squares(lambda a, x: jlora.lora(model)(jlora.bind(BASE, a), x))
        want, want_x = jax.grad(solo, (0, 1))(one, rows)
        got = bank.pick(each_slot, n)
        jax.tree.map(lambda a, b: same(a, b), jlora.partition(got)[0], jlora.partition(want)[0])
        same(dx[IDS == n], want_x)
    # The base has none, and the slots that no example used have exactly 0.
    unused = jax.tree.leaves(jax.tree.map(lambda g: g[3:], grads))
    assert unused and not any(g.any() for g in unused)


@pytest.mark.usefixtures("usual_promotion")  # Optax counts in integers
def test_a_slot_without_examples_stays_and_the_others_train_as_alone():
    adapters, made = unlike(), bank.stack(unlike(), slots=4)
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))
    tx, solo = bank.per_slot(inner), jlora.freeze(inner)
    run = squares(functools.partial(bank.each, model, BASE))
    ids = [np.array([0, 0, 1]), np.array([2, 2, 2]), np.array([0, 2, -1])]

    @jax.jit
    def step(many, state, ids):
        grads = jax.grad(run)(many, ids, X[:3])
        updates, state = tx.update(grads, state, many)
        return optax.apply_updates(many, updates), state

    many, state, history = made, tx.init(made), []
    for one in ids:
        many, state = step(many, state, one)
        history.append((many, state))
    of_slot = lambda trees, n: [np.asarray(x)[n] for x in jax.tree.leaves(trees)]
    for before, after, n in [(0, 1, 0), (0, 1, 1), (1, 2, 1), (0, 1, 3)]:
        pairs = zip(of_slot(history[before], n), of_slot(history[after], n), strict=True)
        assert all((a == b).all() for a, b in pairs)
    assert [int(c) for c in state[1][0].count] == [2, 1, 2, 0]

    @jax.jit
    def alone(one, opt, mine):
        out = lambda a: jlora.lora(model)(jlora.bind(BASE, a), X[:3])
        grads = jax.grad(lambda a: ((out(a) ** 2).sum((1, 2)) * mine).sum())(one)
        updates, opt = solo.update(grads, opt, one)
        return optax.apply_updates(one, updates), opt

    one, opt = adapters[0], solo.init(adapters[0])
    for chosen in (ids[0], ids[2]):
        one, opt = alone(one, opt, (chosen == 0).astype(np.float32))
    jax.tree.map(lambda a, b: same(a, b, 1e-5), bank.pick(many, 0), one)


@pytest.mark.nightly
@pytest.mark.usefixtures("usual_promotion")
def test_a_sweep_is_as_many_separate_runs():
    rates = np.array([0.003, 0.01, 0.03], np.float32)
    start = adapter({".*/w": LoraSpec(2)})
    many = bank.stack([start] * 3)
    tx = bank.per_slot(optax.inject_hyperparams(optax.adam)(learning_rate=0.0))
    state = tx.init(many)
    state = state._replace(hyperparams={**state.hyperparams, "learning_rate": jnp.asarray(rates)})
    loss = lambda p, x: (model(p, x) ** 2).mean()

    @jax.jit
    def step(many, state):
        each = functools.partial(bank.each, loss, BASE, in_axes=None)
        losses, pull = jax.vjp(lambda b: each(b, np.arange(3), X), many)
        updates, state = tx.update(pull(jnp.ones(3))[0], state, many)
        return optax.apply_updates(many, updates), state, losses

    for _ in range(3):
        many, state, losses = step(many, state)

    @jax.jit
    def alone(one, opt, rate):
        value, grads = jax.value_and_grad(lambda a: jlora.lora(loss)(jlora.bind(BASE, a), X))(one)
        updates, opt = jlora.freeze(optax.adam(rate)).update(grads, opt, one)
        return optax.apply_updates(one, updates), opt, value

    for n, rate in enumerate(rates):
        one, opt = start, jlora.freeze(optax.adam(rate)).init(start)
        for _ in range(3):
            one, opt, value = alone(one, opt, rate)
        same(losses[n], value, 1e-5)
        jax.tree.map(lambda a, b: same(a, b, 1e-5), bank.pick(many, n), one)


def rescaled(adapter, s):
    change = lambda x: dataclasses.replace(x, scaling=s) if jlora_node(x) else x
    return jax.tree.map(change, adapter, is_leaf=jlora_node)


def test_other_ids_slots_and_alphas_compile_nothing():
    adapters, many = with_dora(), bank.stack(with_dora(), slots=6, rank=8)
    run = jax.jit(functools.partial(bank.each, model))
    many = bank.put(many, 5, adapters[0])  # compiles what writes to a slot
    first = run(BASE, many, jnp.asarray(IDS), X)
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for n, one in enumerate(adapters[::-1]):
            many = bank.put(many, n, rescaled(one, np.float32(n)))
        second = run(BASE, many, jnp.asarray(IDS[::-1].copy()), X)
        assert not compiled, compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not jnp.allclose(first, second)
    jax.tree.map(np.testing.assert_array_equal, bank.pick(many, 5), adapters[0])


@pytest.mark.nightly
def test_boxes_of_flax_are_for_the_base_alone():
    model = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    params = model.init(jax.random.key(0), X)
    boxed = jlora.attach(params, {".*kernel": LoraSpec(2)}, key=jax.random.key(1))
    base, adapter = jlora.detach(jax.tree.map(lambda x: x + 0.1, boxed))
    many = bank.put(bank.stack([adapter, adapter], slots=3), 2, adapter)
    is_box = lambda x: isinstance(x, nn.Partitioned)
    assert not any(map(is_box, jax.tree.leaves(many, is_leaf=is_box)))
    got = bank.each(model.apply, base, many, np.array([0, 2, -1, 1, 0, -1]), X)
    want = jlora.lora(model.apply)(jlora.bind(base, adapter), X)
    same(
        got, jnp.where(np.array([1, 1, 0, 1, 1, 0])[:, None, None] > 0, want, model.apply(base, X))
    )


def test_the_base_is_held_once():
    base = {"w": w(64, 128)}
    many = bank.stack([adapter({"w": LoraSpec(2)}, n, base) for n in range(4)])
    x = w(8, 16, 64)
    fn = lambda p, x: jnp.tanh(x @ p["w"]).sum(2)
    loss = lambda many, base, x: bank.each(fn, base, many, np.arange(8) % 4, x).sum()
    # Neither a copy for each example nor one for each slot.
    jaxpr = jax.make_jaxpr(jax.grad(loss))(many, base, x)
    shapes = [v.aval.shape for e in equations(jaxpr) for v in e.outvars]
    assert max(np.prod(shape) for shape in shapes) <= 8 * 16 * 128
    run = jax.jit(jax.value_and_grad(loss))
    jax.block_until_ready(run(many, base, x))
    before = sum(x.nbytes for x in jax.live_arrays())
    _, grads = run(bank.put(many, 1, bank.pick(many, 0)), base, x)
    kept = sum(x.nbytes for x in jax.tree.leaves(grads)) + 4
    assert sum(x.nbytes for x in jax.live_arrays()) - before <= kept


@pytest.mark.sample(2)
@pytest.mark.parametrize("spec", [P("slots"), P()], ids=["sharded", "replicated"])
def test_a_sharded_bank_over_a_sharded_base(spec):
    mesh = jax.make_mesh((4,), ("slots",), axis_types=(jax.sharding.AxisType.Auto,))
    base = {"w": w(12, 8), "v": w(8, 12)}
    many = bank.stack([adapter({".*": LoraSpec(2, dora=n > 1)}, n, base) for n in range(3)], 4)
    new, x, fn = adapter({"w": LoraSpec(2)}, 9, base), w(6, 9, 12), lambda p, x: x @ p["w"] @ p["v"]
    run = jax.jit(functools.partial(bank.each, fn))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    placed = {"w": put(base["w"], P(None, "slots")), "v": put(base["v"], P("slots"))}
    for of in (many, bank.put(many, 1, new)):
        want = run(base, of, IDS, x)
        same(run(placed, put(of, spec), IDS, x), want)
    # Another adapter leaves every array where it was.
    again = bank.put(put(many, spec), 1, new)
    assert {x.sharding.spec for x in jax.tree.leaves(again)} == {spec}
    same(run(placed, again, IDS, x), want)


@pytest.fixture(scope="module")
def weights_only():
    """Adapters without biases and magnitudes, as ids for tokens require, and their bank."""
    found = [adapter({".*/w": LoraSpec(2 + n, alpha=3)}, n) for n in range(2)]
    found += [adapter({"two/w": LoraSpec(1)}, 2)]
    return found, bank.stack(found, slots=4)


@pytest.mark.nightly
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_id_for_each_token(weights_only, wrap):
    adapters, many = weights_only
    ids = np.random.default_rng(0).integers(-1, 4, X.shape[:2])
    run = functools.partial(bank.each, model)
    got = wrap(run)(BASE, many, ids, X)
    for n in (-1, 0, 1, 2, 3):
        same(got[ids == n], alone(jlora.lora(model), adapters, n)(X[ids == n]))
    # A gradient too, and of every slot as alone.
    grads = jax.grad(lambda b: squares(run)(BASE, b, np.minimum(ids, 2), X))(many)
    for n, one in enumerate(adapters):
        rows = X[np.minimum(ids, 2) == n]
        f = squares(lambda a, rows=rows: jlora.lora(model)(jlora.bind(BASE, a), rows))
        got = bank.pick(bank.Bank(grads.adapter, many.ranks, many.gains), n)
        jax.tree.map(same, jlora.partition(got)[0], jlora.partition(jax.grad(f)(one))[0])
    assert not any(x[3].any() for x in jax.tree.leaves(grads))


def test_an_id_for_each_token_in_a_scanned_and_rearranged_model(weights_only):
    base = {"w": w(3, 11, 11), "v": w(11, 2, 6)}
    layouts = {"w": "io", "v": "ioo"}
    make = lambda n: random(
        jlora.attach(base, {".*": LoraSpec(2 + n)}, key=jax.random.key(n), layouts=layouts), n
    )
    adapters = [jlora.detach(make(n))[1] for n in range(2)]

    def fn(p, x):
        step = jax.checkpoint(lambda x, k: (jnp.tanh(x @ k), None))
        x = jax.lax.scan(step, x, p["w"])[0]
        heads = jax.jit(lambda x, v: jnp.einsum("bti,ihd->bhtd", x, v.astype(x.dtype)))
        y = heads(x, p["v"])
        a, b = jnp.split(p["v"].reshape(11, 12), 2, axis=1)
        return jnp.concatenate([y.swapaxes(1, 2).reshape(*x.shape[:2], 12), x @ a, x @ (b * 2)], -1)

    ids = np.random.default_rng(0).integers(-1, 2, X.shape[:2])
    got = jax.jit(functools.partial(bank.each, fn))(base, bank.stack(adapters), ids, X)
    for n in (-1, 0, 1):
        want = alone(jlora.lora(fn), adapters, n, base)(X)
        same(got[ids == n], want[ids == n])


MIXED = ("matmul", "conv_2d", "product_of_weights")


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", MIXED)
def test_a_mixture_is_the_sum_of_the_updates(name):
    case = PLAIN[name]
    adapters = adapters_of(case, case.params)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32))
    args = [x[:2] for x in case.args]
    run = functools.partial(bank.each, transform(case), weights=weights)
    got = jax.jit(run)(case.params, bank.stack(adapters), None, *args)
    merged = [jlora.merge(jlora.bind(case.params, one)) for one in adapters]
    for k in range(2):
        add = lambda base, *ws, k=k: (
            base + sum(m * (one - base) for m, one in zip(weights[k], ws, strict=True))
        )
        want = case.fn(jax.tree.map(add, case.params, *merged), *(x[k : k + 1] for x in args))
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        for y, want_y in pairs:
            n = y.shape[0] // 2
            same(y[k * n : (k + 1) * n], want_y, 1e-5)


@pytest.mark.nightly
def test_a_mixture_of_biases_and_of_tokens(weights_only):
    adapters, made = unlike(), bank.stack(unlike())
    halves = np.array([[0.5, 0.5, 0.0]] * 6, np.float32)
    got = bank.each(model, BASE, made, None, X, weights=halves)
    half = lambda *leaves: 0.5 * leaves[0] + 0.5 * leaves[1]
    merged = [jlora.merge(jlora.bind(BASE, one)) for one in adapters[:2]]
    same(got, model(jax.tree.map(half, *merged), X), 2e-6)
    adapters, many = weights_only
    by_token = np.random.default_rng(0).uniform(size=(*X.shape[:2], 4)).astype(np.float32)
    got = bank.each(model, BASE, many, None, X, weights=by_token)
    same(got[:, 3], bank.each(model, BASE, many, None, X[:, 3:4], weights=by_token[:, 3])[:, 0])
    # The weights of a mixture can be learned.
    loss = lambda m: (bank.each(model, BASE, many, None, X, weights=m) ** 2).sum()
    assert jax.grad(loss)(by_token)[..., :3].all() and jax.grad(loss)(by_token[:, 0])[:, :3].all()


@pytest.mark.sample(2)
@pytest.mark.parametrize("x", [X, FEW], ids=["many", "few"])
def test_dropout_draws_from_another_key_for_each_example(x):
    adapters, many, key = unlike(), bank.stack(unlike()), jax.random.key(3)
    ids, rows = np.array([1, 0, 1, 1]), jnp.broadcast_to(x[:1], (4, *x.shape[1:]))

    @jax.jit
    def run(key, rows):
        return bank.each(jlora.lora(model, dropout=0.5, key=key), BASE, many, ids, rows)

    got = run(key, rows)
    assert not np.allclose(got[0], got[2]) and not np.allclose(got[2], got[3])
    for k, n in enumerate(ids):
        own = jlora.lora(model, dropout=0.5, key=jax.random.fold_in(key, k))
        same(got[k : k + 1], alone(own, adapters, n)(rows[k : k + 1]))


@pytest.mark.nightly
def test_what_lora_returned_and_what_wraps_it_may_be_passed():
    many, kinds = bank.stack(unlike()), [jlora.lora(model), jax.jit(jlora.lora(model))]
    for x in (X, FEW):
        want = jax.jit(functools.partial(bank.each, model))(BASE, many, IDS, x)
        for fn in (*kinds, functools.partial(model)):
            same(bank.each(fn, BASE, many, IDS, x), want)
            same(jax.jit(functools.partial(bank.each, fn))(BASE, many, IDS, x), want)
    wrapped = jax.jit(jlora.lora(model, dropout=0.5, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=says("wraps a `jlora.lora(..., dropout=)`", "`each`")):
        bank.each(wrapped, BASE, many, IDS, X)


@pytest.mark.parametrize("shape", [6, (6, 9)], ids=["examples", "tokens"])
def test_dropout_that_a_function_calls_itself(shape):
    """`each` adapts the weights, so an inner `jlora.lora` would see plain ones and drop nothing."""
    many, key, ids = STACKED(), jax.random.key(0), np.zeros(shape, int)
    hidden = lambda key: lambda p, x: jlora.lora(model, dropout=0.5, key=key)(p, x)
    said = says("it is called inside a function", "Pass what `jlora.lora` returned")
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda key: bank.each(hidden(key), BASE, many, ids, X), key)
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda key: jlora.lora(hidden(key))(jlora.bind(BASE, ONE()), X), key)
    # Where nothing is adapted, nothing is lost.
    jax.eval_shape(lambda key: bool(jlora.layouts(hidden(key), BASE, X)), key)
    same(jax.jit(lambda key: hidden(key)(BASE, X))(key), model(BASE, X))


@pytest.mark.nightly
def test_ids_in_every_form_and_traced_ones_out_of_range():
    many = bank.stack(unlike())
    run = jax.jit(functools.partial(bank.each, model))
    want = bank.each(model, BASE, many, IDS, X)
    for ids in (IDS.tolist(), IDS.astype(np.int8), IDS.astype(np.int64), jnp.asarray(IDS)):
        same(bank.each(model, BASE, many, ids, X), want)
    unsigned = np.where(IDS < 0, 200, IDS).astype(np.uint8)
    for ids in (unsigned, np.where(IDS < 0, 3, IDS), np.where(IDS < 0, -7, IDS)):
        for x in (X, FEW):
            same(run(BASE, many, ids, x), run(BASE, many, IDS, x))
    same(run(BASE, many, IDS, X)[2], model(BASE, X[2]))
    # Inside other transformations: a scan over batches of ids, and a vmap over them.
    several = jnp.stack([IDS, IDS[::-1]])
    scanned = jax.lax.scan(lambda c, i: (c, bank.each(model, BASE, many, i, X)), 0, several)[1]
    mapped = jax.vmap(lambda i: bank.each(model, BASE, many, i, X))(several)
    same(scanned, mapped)
    same(scanned[0], want)


@pytest.mark.nightly
def test_shared_arguments_and_results():
    many = bank.stack(unlike())
    mask, cache = w(9), {"k": w(6, 4), "slot": jnp.int32(2)}

    def fn(p, x, mask, cache, double, scale=None):
        y = model(p, x) * mask[None, :, None] * (2 if double else 1) * scale
        return y, {"k": cache["k"] + y[:, 0, :4], "slot": cache["slot"] + 1}, y.sum()

    axes = {"k": 0, "slot": None}
    run = functools.partial(
        bank.each, fn, in_axes=(0, None, axes, None), out_axes=(0, axes, 0), scale=jnp.float32(3)
    )
    y, new, total = run(BASE, many, IDS, X, mask, cache, True)
    want = bank.each(model, BASE, many, IDS, X) * mask[None, :, None] * 6
    same(y, want)
    same(new["k"], cache["k"] + want[:, 0, :4])
    assert new["slot"] == 3 and total.shape == (6,)
    same(total, want.sum((1, 2)))
    swapped = lambda p, x: model(p, x.swapaxes(0, 1)).swapaxes(0, 1)
    got = bank.each(swapped, BASE, many, IDS, X.swapaxes(0, 1), in_axes=-2, out_axes=-2)
    same(got.swapaxes(0, 1), bank.each(model, BASE, many, IDS, X))


@pytest.mark.nightly
def test_a_stored_base_and_adapters_from_files(tmp_path):
    base = {**BASE, "one": {"w": pack(BASE["one"]["w"]), "b": BASE["one"]["b"]}}
    adapters = []
    for n, one in enumerate(unlike()):
        jlora.checkpoint.save(tmp_path / str(n), jlora.bind(BASE, one))
        adapters.append(jlora.checkpoint.restore(tmp_path / str(n), base))
    names = {"one/w": "one.weight", "two/w": "two.weight"}
    lora = jlora.bind(BASE, adapter({".*/w": LoraSpec(5)}, 7))
    jlora.peft.save(tmp_path / "peft", lora, names=names)
    adapters.append(jlora.peft.load(tmp_path / "peft", BASE, names=names))
    many = bank.stack(adapters)
    got = bank.each(model, base, many, ids := np.array([3, 1, 2, 0, -1, 3]), X)
    for k, n in enumerate(ids):
        params = jlora.bind(base, jlora.detach(adapters[n])[1]) if n >= 0 else base
        same(got[k], jlora.lora(model)(params, X[k]))


def test_pick_returns_what_was_stacked_or_put():
    sliced = LoraSpec(2, slices=((0, 2), (4, 7)))
    unlike_ones = [*with_dora(), adapter({"one/b": "full"}, 5)]
    for adapters in (unlike_ones, [adapter({"one/w": sliced}, n) for n in range(2)]):
        many = bank.stack(adapters, slots=len(adapters) + 1, rank=6)
        many = bank.put(many, jnp.int32(len(adapters)), adapters[1])
        for n, one in enumerate([*adapters, adapters[1]]):
            got = bank.pick(many, n)
            assert jax.tree.structure(got) == jax.tree.structure(one)
            jax.tree.map(np.testing.assert_array_equal, got, one)
    assert jax.tree.leaves(bank.pick(bank.stack(adapters, slots=3), 2)) == []
    # Under jit too, and nothing is written out of range.
    write, equal = jax.jit(bank.put), np.testing.assert_array_equal
    jax.tree.map(equal, write(many, 0, adapters[1]), bank.put(many, 0, adapters[1]))
    for slot in (3, -1):
        jax.tree.map(equal, write(many, slot, adapters[1]), many)


def test_dtypes_are_widened_and_never_narrowed():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter({"one/w": LoraSpec(2)}))
    wide = adapter({"one/w": LoraSpec(2)}, 1)
    assert bank.stack([narrow, wide]).adapter["one"]["w"].lora_a.dtype == jnp.float32
    with pytest.raises(ValueError, match=says("lora_a of", "float32", "bfloat16 of the bank")):
        bank.put(bank.stack([narrow]), 0, wide)


@pytest.mark.nightly
def test_a_slot_at_a_time():
    many = bank.stack(with_dora(), slots=5)
    run = lambda one: jlora.lora(model)(bank.bind(BASE, one), X)
    for got in (jax.lax.map(run, many), jax.vmap(run)(many)):
        for n in range(5):
            same(got[n], alone(jlora.lora(model), with_dora(), n)(X))


def other_base():
    base = {"one": {"w": w(12, 7), "b": w(7)}, "two": {"w": w(7, 5), "b": w(5)}}
    return base, [adapter({".*/w": LoraSpec(2)}, 0, base), adapter({"one/w": LoraSpec(2)}, 1, base)]


def tied():
    base = {**BASE, "two": {"w": w(11, 7, seed=3), "b": w(7)}}
    params = jlora.attach(base, {".*/w": LoraSpec(2)}, key=jax.random.key(0))
    return jlora.detach(jlora.tie(params, {".*/w": ("lora_a",)}))[1]


def residual():
    spec = LoraSpec(2, init=jlora.initializers.pissa)
    return jlora.detach(jlora.attach(BASE, {"one/w": spec}, key=jax.random.key(0)))[1]


ZEROS = np.zeros((6, 9), int)
ONE = functools.cache(lambda: adapter({"one/w": LoraSpec(2)}))
STACKED = functools.cache(lambda: bank.stack([ONE()], slots=2))

REFUSED = {
    "nothing": (lambda: bank.stack([]), says("there are no adapters")),
    "few_slots": (lambda: bank.stack([ONE()] * 3, slots=2), says("3 adapters do not fit in 2")),
    "rank": (lambda: bank.stack([ONE()], rank=0), says("`rank` is 0. Give an integer of")),
    "high": (
        lambda: bank.stack([ONE()], rank=1),
        says("adapters[0]", '"one/w" has rank 2, above the rank of the bank, 1', "`rank=2`"),
    ),
    "base": (lambda: bank.stack([BASE]), says("there is no `LoraArray`", "jlora.detach")),
    "tied": (lambda: bank.stack([tied()]), says('"two/w" is tied', "jlora.untie")),
    "residual": (lambda: bank.stack([residual()]), says("is a residual", "residual_to_lora")),
    "partial": (
        lambda: bank.stack([jlora.partition(ONE())[0]]),
        says('parts of "one/w" are missing', "jlora.combine"),
    ),
    "other_paths": (
        lambda: bank.stack([ONE(), {"one": ONE()["one"]}]),
        says("adapters[0] and adapters[1]", '"two/b" is in the first only'),
    ),
    "other_shapes": (
        lambda: bank.stack([ONE(), other_base()[1][1]]),
        says('lora_a of "one/w" has the shape (12, 2)', "(11, 2)", "another base"),
    ),
    "other_forms": (
        lambda: bank.stack([ONE(), adapter({"one/w": LoraSpec(2, form="lora_fa")})]),
        says('of the form "lora_fa"', 'of the form "lora"', "`jlora.forms.as_lora(node)`"),
    ),
    "full_and_lora": (
        lambda: bank.stack([ONE(), adapter({"one/w": "full"})]),
        says("trained in full", 'of the form "lora"'),
    ),
    "put_rank": (
        lambda: bank.put(STACKED(), 0, adapter({"one/w": LoraSpec(3)})),
        says('"one/w" has rank 3, above the rank of the bank, 2'),
    ),
    "put_weight": (
        lambda: bank.put(STACKED(), 0, adapter({"two/w": LoraSpec(2)})),
        says('adapts "two/w", which no slot of the bank does', 'Closest: "one/w"'),
    ),
    "put_dora": (
        lambda: bank.put(STACKED(), 0, adapter({"one/w": LoraSpec(2, dora=True)})),
        says('"one/w" has a magnitude (DoRA), and no adapter of the bank has one'),
    ),
    "put_slot": (lambda: bank.put(STACKED(), 2, ONE()), says("no slot 2; ", "0 to 1")),
    "put_negative": (lambda: bank.put(STACKED(), -1, ONE()), says("no slot -1")),
    "put_bool": (lambda: bank.put(STACKED(), True, ONE()), says("no slot True")),
    "put_float": (lambda: bank.put(STACKED(), 0.5, ONE()), says("slot=0.5 is not an integer")),
    "put_other_base": (
        lambda: bank.put(STACKED(), 0, other_base()[1][1]),
        says("jlora.bank.put", "another base"),
    ),
    "pick_slot": (lambda: bank.pick(STACKED(), 2), says("no slot 2")),
    "pick_traced": (
        lambda: jax.jit(lambda b: bank.pick(b, 0))(STACKED()),
        says("is traced", "outside of `jax.jit`"),
    ),
    "ids": (
        lambda: bank.each(model, BASE, STACKED(), [0, 2], X[:2]),
        says("no slot 2; the bank has the slots 0 to 1, and -1 is the base alone"),
    ),
    "ids_below": (lambda: bank.each(model, BASE, STACKED(), [0, -2], X[:2]), says("no slot -2")),
    "ids_wrap": (
        lambda: bank.each(model, BASE, STACKED(), np.array([0, 2**32]), X[:2]),
        says(f"no slot {2**32}"),
    ),
    "ids_dtype": (
        lambda: bank.each(model, BASE, STACKED(), np.array([0.0, 1.0]), X[:2]),
        says("ids are integers, (batch,) or (batch, tokens); got float64[2]"),
    ),
    "ids_shape": (lambda: bank.each(model, BASE, STACKED(), 0, X[:2]), says("got int64[]")),
    "examples": (
        lambda: bank.each(model, BASE, STACKED(), [0, 1], X),
        says("6,9,11", "does not have 2 examples along axis 0", "None in `in_axes`"),
    ),
    "in_axes": (
        lambda: bank.each(model, BASE, STACKED(), [0, 1], X[:2], in_axes=(0, 0)),
        says("in_axes=(0, 0) does not fit"),
    ),
    "base_adapted": (
        lambda: bank.each(model, jlora.bind(BASE, ONE()), STACKED(), [0], X[:1]),
        says("`base` has adapters of its own", "jlora.detach"),
    ),
    "base_paths": (
        lambda: bank.each(model, {"one": BASE["one"]}, STACKED(), [0], X[:1]),
        says("jlora.bank.each", '"two/b" is in the second only'),
    ),
    "base_shapes": (
        lambda: bank.each(model, other_base()[0], STACKED(), [0], X[:1]),
        says("jlora.bank.each", '"one/w" float32[12,7]', "another model"),
    ),
    "bind_shapes": (
        lambda: bank.bind(other_base()[0], jax.tree.map(lambda x: x[0], STACKED())),
        says("jlora.bank.bind", '"one/w" float32[12,7]'),
    ),
    "full_shape": (
        lambda: bank.each(
            model,
            {**BASE, "two": {"w": w(7, 6), "b": w(6)}},
            bank.stack([adapter({"two/b": "full"})]),
            [0],
            X[:1],
        ),
        says('"two/b" float32[6] is trained in full', "(5,)", "another base"),
    ),
    "scaling": (
        lambda: bank.put(STACKED(), 0, rescaled(ONE(), jnp.ones(3))),
        says('scaling of "one/w" has the shape (3,)'),
    ),
    "weights_and_ids": (
        lambda: bank.each(model, BASE, STACKED(), [0], X[:1], weights=jnp.ones((1, 2))),
        says("with `weights=`, ids must be None"),
    ),
    "weights_shape": (
        lambda: bank.each(model, BASE, STACKED(), None, X[:1], weights=jnp.ones((1, 3))),
        says("weights are floats, (batch, 2) or (batch, tokens, 2)", "got float32[1, 3]"),
    ),
    "weights_dora": (
        lambda: bank.each(
            model, BASE, bank.stack(with_dora()), None, X[:1], weights=jnp.ones((1, 4))
        ),
        says('"one/w" has a magnitude (DoRA)', "Use `ids`"),
    ),
    "tokens_full": (
        lambda: bank.each(model, BASE, bank.stack(unlike()), ZEROS, X),
        says('"one/b" is trained in full', "one id for each example"),
    ),
    "tokens_lookup": (
        lambda: bank.each(
            lambda p, t: p["one"]["w"][t],
            BASE,
            STACKED(),
            ZEROS,
            ZEROS,
        ),
        says('the primitive "gather"', "leave that weight out"),
    ),
    "tokens_axes": (
        lambda: bank.each(
            lambda p, x: x.reshape(-1, 11) @ p["one"]["w"],
            BASE,
            STACKED(),
            ZEROS,
            X,
        ),
        says("activations of the axes [6, 9]", "axes are [54], not [6, 9]"),
    ),
    "tokens_materialized": (
        lambda: bank.each(lambda p, x: x @ jnp.tanh(p["one"]["w"]), BASE, STACKED(), ZEROS, X),
        says('the primitive "tanh"'),
    ),
    "tokens_returned": (
        lambda: bank.each(lambda p, x: p["one"]["w"] * 2.0, BASE, STACKED(), ZEROS, X),
        says("a weight that is returned"),
    ),
    "tokens_wrapped": (
        lambda: bank.each(jax.jit(jlora.lora(model)), BASE, STACKED(), ZEROS, X),
        says("a function that wraps `jlora.lora`"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        call()
