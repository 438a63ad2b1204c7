"""What NNX modules change in place, and layers that they share, through jlora's functions."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora._paths import leaves_with_paths

pytestmark = pytest.mark.usefixtures("usual_promotion")

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(5).standard_normal((3, 4)), jnp.float32)
RULES = {".*/kernel": jlora.LoraSpec(2)}


class Net(nnx.Module):
    """One layer used twice, dropout and running statistics."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = self.first
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.drop(self.second(jnp.tanh(self.first(x)))))


def net() -> Net:
    return Net(nnx.Rngs(0))


def moved(params):
    """Give the adapter a part in the result: B starts at zero."""
    move = lambda x: x.with_parts({"lora_b": x.lora_b + 0.3})
    is_node = lambda x: isinstance(x, jlora.LoraArray)
    return jax.tree.map(lambda x: move(x) if is_node(x) else x, params, is_leaf=is_node)


def adapted():
    """The module with an adapter, and the same merged."""
    graph, state = nnx.split(net())
    params = moved(jlora.attach(state, RULES, key=KEY))
    return nnx.merge(graph, params, copy=True), nnx.merge(graph, jlora.merge(params), copy=True)


def same_state(one, other):
    """Whether everything but the parameters agrees."""
    states = [nnx.state(module, nnx.Not(nnx.Param)) for module in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("jit", [False, True])
def test_a_module_is_changed_as_by_a_plain_call(jit):
    model, merged = adapted()
    apply = jlora.lora(lambda m, x: m(x), fallback="error")
    run, plain = (nnx.jit(apply), nnx.jit(lambda m, x: m(x))) if jit else (apply, Net.__call__)
    outs = []
    for _ in range(2):
        outs.append(run(model, X))
        np.testing.assert_allclose(outs[-1], plain(merged, X), rtol=1e-4, atol=1e-5)
        same_state(model, merged)
    assert model.drop.rngs.count[...] == 2 and not np.array_equal(*outs), "the mask is the same"


def test_a_module_of_another_trace_is_not_written_to():
    """As by a plain call: a tracer that escapes would break a later one."""
    model, _ = adapted()
    with pytest.raises(flax.errors.TraceContextError, match="from a different trace level"):
        jax.jit(lambda x: jlora.lora(Net.__call__)(model, x))(X)
    assert model.drop.rngs.count[...] == 0


@pytest.mark.parametrize("rules", [{}, {".*/bias": "full"}])
def test_a_module_without_low_rank_nodes_is_changed_too(rules):
    model = jlora.attach(net(), rules, key=KEY)
    jlora.lora(lambda m, x: m(x))(model, X)
    assert model.drop.rngs.count[...] == 1


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_state_whose_change_would_be_lost_is_refused(name):
    graph, state = nnx.split(net())
    rules = RULES if name == "lora" else {".*/bias": "full"}
    params = jlora.attach(state, rules, key=KEY)
    apply = jlora.lora(lambda p, x: nnx.merge(graph, p)(x))
    for run in (apply, jax.jit(apply), jax.grad(lambda p, x: apply(p, x).sum(), allow_int=True)):
        with pytest.raises(ValueError, match=r"lost.*same dropout mask(?s:.*)nnx.merge\(graph, p"):
            run(params, X)
    # The report is of one call, so nothing is lost.
    assert jlora.explain(lambda p, x: nnx.merge(graph, p)(x), params, X).materialized == 0
    copied = jlora.lora(lambda p, x: nnx.merge(graph, p, copy=True)(x))
    assert copied(params, X).shape == (3, 4)


def test_the_lines_of_the_error_work():
    graph, params, state = nnx.split(net(), nnx.Param, ...)
    params = moved(jlora.attach(params, RULES, key=KEY))

    def fn(params, state, x):
        model = nnx.merge(graph, params, state)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    run = jax.jit(jlora.lora(fn, fallback="error"))
    _, merged = adapted()
    for _ in range(2):
        y, state = run(params, state, X)
        np.testing.assert_allclose(y, merged(X), rtol=1e-4, atol=1e-5)
    assert state["drop"]["rngs"]["count"][...] == 2


def test_part_of_a_state_is_not_enough():
    graph, state = nnx.split(net())
    params = jlora.attach(state, RULES, key=KEY)

    def fn(params, x):
        model = nnx.merge(graph, params)
        return model(x), nnx.state(model, nnx.BatchStat)

    with pytest.raises(ValueError, match=r'"drop/rngs/count" uint32.*nnx.RngCount, in place'):
        jlora.lora(fn)(params, X)


class Scanned(nnx.Module):
    """Blocks run by `nnx.scan` and `nnx.jit`, which write all their Variables anew."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.vmap(Net)(rngs.split(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        step = nnx.remat(lambda x, block: block(x))
        run = nnx.jit(lambda m, x: nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, m))
        return run(self.blocks, x)


@pytest.mark.sample(2)
@pytest.mark.parametrize("train", [False, True])
def test_variables_that_loops_write_unchanged_are_no_change(train):
    modes = {"deterministic": not train, "use_running_average": not train}
    graph, state = nnx.split(nnx.view(Scanned(nnx.Rngs(0)), **modes))
    layouts = {"blocks/first/kernel": "io"}
    params = jlora.attach(state, RULES, key=KEY, layouts=layouts)
    apply = jlora.lora(lambda p, x: nnx.merge(graph, p)(x), fallback="error")
    if train:
        with pytest.raises(ValueError, match="would be lost"):
            apply(params, X)
    else:
        assert apply(params, X).shape == (3, 4)


def test_a_layer_used_twice_has_one_adapter():
    _, state = nnx.split(net())
    for params in (jlora.attach(state, RULES, key=KEY), jlora.attach(net(), RULES, key=KEY)):
        nodes = [p for p, x in leaves_with_paths(nnx.state(params), _is_node) if _is_node(x)]
        assert nodes == ["first/kernel"]
    model = jlora.attach(net(), jlora_rules_of(net()), key=KEY)
    assert model.second is model.first and isinstance(model, Net)
    merged = jlora.merge(model)
    assert merged.second is merged.first
    np.testing.assert_array_equal(merged.first.kernel[...], net().first.kernel[...])


def _is_node(x):
    return isinstance(x, jlora.LoraArray)


def jlora_rules_of(model):
    """Rules by literal paths, from the layouts of the module itself."""
    found = jlora.layouts(lambda m, x: m(x), model, X)
    assert found == {"first/kernel": "io"}
    return dict.fromkeys(found, jlora.LoraSpec(2))


def test_the_gradient_of_a_layer_used_twice_is_one_sum():
    model, _ = adapted()
    graph, params, _ = nnx.split(model, nnx.Param, ...)
    loss = lambda m, x: (m.second(jnp.tanh(m.first(x))) ** 2).sum()
    of_module = nnx.grad(jlora.lora(loss, fallback="error"))(model, X)
    rest = nnx.split(model, nnx.Param, ...)[2]
    of_state = jax.grad(jlora.lora(lambda p: loss(nnx.merge(graph, p, rest, copy=True), X)))
    want = of_state(params)
    got = of_module["first"]["kernel"].get_value().lora_b
    np.testing.assert_allclose(got, want["first"]["kernel"].get_value().lora_b, rtol=1e-5)
    report = jlora.explain(loss, model, X)
    assert [use.name for use in report.uses] == ["first/kernel"] * 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("jit", [False, True])
def test_an_optimizer_of_nnx_trains_the_adapter(jit):
    """As optax does alone; the state of the weights that are frozen is empty."""
    model, _ = adapted()
    tx = jlora.freeze(optax.adam(0.05))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = jlora.lora(lambda m, x: (m.first(x) ** 2).sum())

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model, X))

    step = nnx.jit(step) if jit else step
    state, want = tx.init(params), params
    apply = jlora.lora(lambda p: ((X @ p["first"]["kernel"] + p["first"]["bias"]) ** 2).sum())
    for _ in range(3):
        step(model, optimizer)
        updates, state = tx.update(jax.grad(apply)(want), state, want)
        want = optax.apply_updates(want, updates)
    got = nnx.as_pure(nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    node, before = got["first"]["kernel"], params["first"]["kernel"]
    assert np.array_equal(node.base, before.base) and not np.array_equal(node.lora_b, before.lora_b)
