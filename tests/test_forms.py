"""LoRA-FA, LoRA-XS and VeRA against their formulas, and what trains, is saved and is refused."""

import dataclasses

import form_loha
import form_miss
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora.peft
from jlora import LoraSpec, checkpoint, forms, initializers

assert form_miss and form_loha  # registered from outside by being imported
NEW = ("lora_fa", "lora_xs", "vera", "adalora", "mica", "miss", "loha")
every = pytest.mark.parametrize("form", NEW)
X = jax.random.normal(jax.random.key(3), (4, 11))
LAYOUTS = {"io": (11, 7), "oi": (7, 11), "ioo": (11, 3, 5), "iiio": (3, 2, 4, 7)}


def attached(form, shape=(11, 7), layout="io", rank=2, **spec):
    """A node as it begins."""
    w = jax.random.normal(jax.random.key(0), shape)
    given = LoraSpec(rank, alpha=3, layout=layout, form=form, **spec)
    return jlora.attach({"w": w}, {"w": given}, key=jax.random.key(1))["w"]


def moved(node):
    """A node whose trained parts have other values."""
    trainable, frozen = jlora.partition(node)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jlora.combine(tree.unflatten(leaves), frozen)


def matrices(node):
    """W, A and B as (stack, in, out), (stack, in, r), (stack, r, out), by numpy alone."""
    split = len(node.shape) - len(node.layout)
    order = sorted(range(len(node.layout)), key=lambda k: node.layout[k])
    w = np.transpose(node.base, [*range(split), *(split + k for k in order)])
    ins = int(
        np.prod([n for n, k in zip(node.shape[split:], node.layout, strict=True) if k == "i"])
    )
    w = np.asarray(w, np.float64).reshape(-1, ins, w.size // ins // int(np.prod(w.shape[:split])))
    a = np.asarray(node.lora_a, np.float64).reshape(w.shape[0], ins, -1)
    b = np.asarray(node.lora_b, np.float64).reshape(w.shape[0], a.shape[-1], -1)
    return w, a, b


def papers(node):
    """The update by the formula of the node's paper, (stack, in, out)."""
    _, a, b = matrices(node)
    extra = {name: np.asarray(x, np.float64) for name, x in node.extra.items()}
    if node.form in ("lora_fa", "mica"):
        return 1.5 * a @ b
    if node.form == "miss":
        return 1.5 * np.stack([[x[i % 2] for i in range(a.shape[1])] for x in b])
    if node.form == "loha":
        second = extra["second_a"].reshape(a.shape) @ extra["second_b"].reshape(b.shape)
        return 1.5 * (a @ b) * second
    if node.form == "lora_xs":
        return 1.5 * a @ extra["core"].reshape(-1, 2, 2) @ b
    of_ranks = extra["singular_values" if node.form == "adalora" else "lambda_d"]
    d = np.stack([np.diag(x) for x in of_ranks.reshape(-1, 2)])
    if node.form == "adalora":
        return 1.5 * a @ d @ b
    of_b = extra["lambda_b"].reshape(a.shape[0], -1)
    return 1.5 * a @ d @ b @ np.stack([np.diag(x) for x in of_b])


@pytest.mark.sample(8)
@every
@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_update_is_the_papers(form, layout, stack):
    node = moved(attached(form, (*stack, *LAYOUTS[layout]), layout))
    whole = dataclasses.replace(node, base=jlora.merge({"w": node})["w"])
    w, _, _ = matrices(node)
    np.testing.assert_allclose(matrices(whole)[0] - w, papers(node), rtol=1e-4, atol=2e-5)


TRAINED = {
    "lora_fa": {"lora_b": (2, 7)},
    "lora_xs": {"core": (2, 2)},
    "vera": {"lambda_d": (2,), "lambda_b": (7,)},
    "adalora": {"lora_a": (11, 2), "lora_b": (2, 7), "singular_values": (2,)},
    "mica": {"lora_a": (11, 2)},
    "miss": {"lora_b": (2, 7)},
    "loha": {
        **{"lora_a": (11, 2), "lora_b": (2, 7)},
        **{"second_a": (11, 2), "second_b": (2, 7)},
    },
}


@pytest.mark.sample(3)
@every
def test_what_trains(form):
    node = attached(form)
    trainable, _ = jlora.partition({"w": node})
    has = {**vars(trainable["w"]), **trainable["w"].parts}
    assert {k: x.shape for k, x in has.items() if isinstance(x, jax.Array)} == TRAINED[form]
    trained = sum(int(np.prod(shape)) for shape in TRAINED[form].values())
    assert jlora.summary({"w": node}).startswith(f"trainable params: {trained} || ")
    state = optax.adam(1e-3).init(trainable)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * trained + 1

    tx = jlora.freeze(optax.sgd(0.1))

    @jax.jit
    def step(params, state):
        apply = jlora.lora(lambda p, x: x @ p["w"], fallback="error")
        grads = jax.grad(lambda p: jnp.sin(apply(p, X)).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = {"w": node}, tx.init({"w": node})
    for _ in range(3):
        params, state = step(params, state)
    for name, before in {"base": node.base, **node.parts}.items():
        after = {"base": params["w"].base, **params["w"].parts}[name]
        assert bool((before == after).all()) == (name not in TRAINED[form]), name


@pytest.mark.sample(8)
@every
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_the_first_step_moves_the_model(form, dora):
    """Zero at first, but not stuck there."""
    node = attached(form, dora=dora)
    np.testing.assert_allclose(jlora.merge({"w": node})["w"], node.base, rtol=1e-6)
    trainable, frozen = jlora.partition({"w": node})
    apply = jlora.lora(lambda p: X @ p["w"], fallback="error")
    grads = jax.grad(lambda t: jnp.sin(apply(jlora.combine(t, frozen))).sum())(trainable)
    assert any(bool(x.any()) for x in jax.tree.leaves(grads))


def test_lora_xs_stands_between_singular_vectors():
    node = attached("lora_xs", rank=3)
    u, s, vt = np.linalg.svd(np.asarray(node.base, np.float64), full_matrices=False)
    ab = np.asarray(node.lora_a, np.float64) @ np.asarray(node.lora_b, np.float64)
    np.testing.assert_allclose(ab, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(node.lora_a.T @ node.lora_a, np.eye(3), atol=1e-6)


def test_veras_factors_have_the_papers_bounds():
    a, b = initializers.vera(jax.random.key(0), jnp.ones((600, 400)), 50)
    for x, bound in ((a, (6 / 600) ** 0.5), (b, (6 / 50) ** 0.5)):
        assert 0.99 * bound < abs(x).max() <= bound
        np.testing.assert_allclose(x.var(), bound**2 / 3, rtol=0.03)


@pytest.mark.sample(4)
@every
def test_a_checkpoint_is_exact(form, tmp_path):
    node = moved(attached(form, (3, 11, 7), dora=True))
    checkpoint.save(tmp_path / "a", {"w": node})
    got = checkpoint.restore(tmp_path / "a", {"w": node.base})["w"]
    assert jax.tree.structure(got) == jax.tree.structure(node) and got.form == node.form
    jax.tree.map(np.testing.assert_array_equal, got, node)


@pytest.mark.sample(4)
@every
def test_vmap_over_adapters(form):
    base, one = jlora.detach({"w": moved(attached(form))})
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), one)
    apply = jlora.lora(lambda p: X @ p["w"], fallback="error")
    got = jax.vmap(lambda adapter: apply(jlora.bind(base, adapter)))(both)
    for k in range(2):
        alone = jlora.bind(base, jax.tree.map(lambda x, k=k: x[k], both))
        np.testing.assert_allclose(got[k], X @ jlora.merge(alone)["w"], rtol=1e-4, atol=1e-5)


def test_a_frozen_a_keeps_no_inputs():
    """The gradient of A needs each layer's input, normed and so kept for nothing else."""

    def norm(x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def model(p, x):
        for layer in p:
            x = x + jnp.tanh(norm(x) @ layer["up"]) @ layer["down"]
        return (x * x).mean()

    keys = jax.random.split(jax.random.key(0), 4)
    base = [
        {"up": jax.random.normal(k, (64, 128)), "down": jax.random.normal(k, (128, 64))}
        for k in keys
    ]
    x = jnp.ones((1024, 64))  # many tokens, beside which the factors are small

    def cost(form):
        params = jlora.attach(base, {".*": LoraSpec(4, form=form)}, key=jax.random.key(0))
        trainable, frozen = jlora.partition(params)
        run = jlora.lora(model, fallback="error")
        step = jax.jit(jax.grad(lambda t, f, x: run(jlora.combine(t, f), x)))
        compiled = step.lower(trainable, frozen, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    memory, flops = cost("lora")
    inputs = 4 * x.size * 4  # of the four layers, in bytes
    for form in ("lora_fa", "lora_xs", "vera"):
        less, fewer = cost(form)
        assert memory - less >= 0.95 * inputs and fewer < flops, form


@pytest.mark.sample(3)
@every
def test_pefts_files_hold_it_as_plain_lora(form, tmp_path):
    """Of a node without a base too: what stands between A and B goes into B."""
    params = {"w": moved(attached(form))}
    jlora.peft.save(tmp_path, jlora.detach(params)[1], names={"w": "m.w.weight"})
    got = jlora.peft.load(tmp_path, {"w": params["w"].base}, names={"w": "m.w.weight"})
    assert got["w"].extra == {} and got["w"].form == "lora"
    np.testing.assert_allclose(
        jlora.merge(got)["w"], jlora.merge(params)["w"], rtol=1e-5, atol=1e-6
    )


ERRORS = {
    "slices": (
        lambda: LoraSpec(2, form="vera", slices=((0, 3),)),
        r"slices=...\)`: the parts between A and B belong to all outputs together",
    ),
    "residual": (
        lambda: attached("lora_xs", init=initializers.pissa),
        r'the initializer of "w" subtracts A B from the weight.*form="lora_xs"',
    ),
    "lambda_d": (
        lambda: jlora.merge({"w": attached("vera").with_parts({"lambda_d": jnp.ones(3)})}),
        r'"w".* rank 2 needs a lambda_d of shape \(2,\); got \(3,\)',
    ),
    "lambda_b": (
        lambda: jlora.merge({"w": attached("vera").with_parts({"lambda_b": jnp.ones(3)})}),
        r'"w".* needs a lambda_b of shape \(7,\), one per output; got \(3,\)',
    ),
}


ERRORS |= {
    "miss_residual": (
        lambda: attached("miss", init=initializers.pissa),
        r'subtracts A B from the weight, but with `form="miss"` A is fixed',
    ),
    "unknown": (
        lambda: LoraSpec(2, form="lora_x"),
        r"form='lora_x'\)`: give one of 'lora', 'lora_fa'.*there is no form 'lora_x'.*register",
    ),
    "unknown_node": (
        lambda: jlora.merge({"w": dataclasses.replace(attached("vera"), form="lora_x")}),
        r"LoraArray\(..., form='lora_x'\)`: give one of .*there is no form 'lora_x'",
    ),
    "other_parts": (
        lambda: jlora.merge({"w": dataclasses.replace(attached("vera"), form="lora_xs")}),
        r'"w".* of the form \'lora_xs\' has the parts \[\'core\', .*got \[\'lambda_b\'',
    ),
    "part_out": (
        lambda: jlora.merge({"w": attached("vera").with_parts({"lambda_d": None})}),
        r'"w" is a part of a LoraArray',
    ),
    "axes": (lambda: forms.Part("s rank"), r"Part\('s rank'\)`: the axes begin with the stack"),
    "twice": (
        lambda: forms.register(forms.Form("miss", form_miss.blocks)),
        r"register\(Form\('miss', ...\)\)`: a form of this name is already registered",
    ),
    "field": (
        lambda: forms.register(forms.Form("x", form_miss.blocks, extra={"base": forms.Part("s")})),
        r"LoraArray has a field 'base'",
    ),
    "frozen": (
        lambda: forms.register(forms.Form("x", form_miss.blocks, frozen=("second_a",))),
        r"frozen=\('second_a',\)\)`: it takes \"lora_a\" and",
    ),
}


@pytest.mark.parametrize(("make", "match"), ERRORS.values(), ids=ERRORS)
def test_what_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
