"""Initializers that decompose the weight: what they leave of it, and the way back to plain LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits, says

import jlora
from jlora import LoraSpec, arithmetic, checkpoint, peft
from jlora.initializers import milora, olora, orthogonal, pissa

KEY = jax.random.key(0)
RESIDUAL = {
    "pissa": pissa,
    "pissa_niter_2": functools.partial(pissa, niter=2),
    "milora": milora,
    "olora": olora,
}
every = pytest.mark.parametrize("init", RESIDUAL.values(), ids=RESIDUAL)
# name: shape, layout, slices
WEIGHTS = {
    "dense": ((13, 9), "io", None),
    "wide": ((5, 23), "io", None),
    "torch": ((9, 13), "oi", None),
    "attention": ((8, 3, 4), "ioo", None),
    "gemma": ((3, 8, 4), "oio", None),
    "conv": ((3, 3, 4, 8), "iiio", None),
    "layers": ((2, 7, 6), "io", None),
    "experts": ((2, 3, 7, 6), "io", None),
    "sliced": ((7, 15), "io", ((0, 5), (10, 15))),
}
weights = pytest.mark.parametrize(("shape", "layout", "slices"), WEIGHTS.values(), ids=WEIGHTS)


def drawn(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def attached(init, shape, layout="io", slices=None):
    """Base weights and what `attach` makes of them."""
    base = {"w": drawn(shape), "other": jnp.ones((3, 2))}
    spec = LoraSpec(2, 7, init=init, layout=layout, slices=slices)
    return base, jlora.attach(base, {"w": spec}, key=KEY)


def double(node):
    """`base + s · A B` in float64, as the transform would multiply by it."""
    wide = dataclasses.replace(
        node,
        base=np.zeros(node.shape),
        lora_a=np.float64(node.lora_a.astype(jnp.float32)),
        lora_b=np.float64(node.lora_b.astype(jnp.float32)),
    )
    with jax.enable_x64(True):
        delta = np.float64(jlora.merge({"w": jax.tree.map(jnp.asarray, wide)})["w"])
    return np.float64(node.base.astype(jnp.float32)) + delta


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.sample(8)
@every
@weights
def test_residual_and_factors_are_the_weight(init, shape, layout, slices):
    base, params = attached(init, shape, layout, slices)
    node = params["w"]
    assert node.residual and node.base is not base["w"] and params["other"] is base["other"]
    assert node.lora_a.dtype == node.base.dtype == jnp.float32
    assert distance(double(node), np.float64(base["w"])) < 1e-6
    assert distance(node.base, base["w"]) > 1e-3, "nothing was taken out"
    if slices is not None:
        np.testing.assert_array_equal(node.base[:, 5:10], base["w"][:, 5:10])


@pytest.mark.sample(4)
@every
@pytest.mark.parametrize("narrow", [False, True], ids=["float32_factors", "bfloat16_factors"])
def test_a_bfloat16_weight_costs_one_rounding_of_the_residual(init, narrow):
    """Rounded factors cost nothing more: the residual is what those leave."""
    dtype = jnp.bfloat16 if narrow else jnp.float32
    base = {"w": drawn((64, 48), jnp.bfloat16)}
    spec = LoraSpec(2, 7, init=init, dtype=dtype)
    node = jlora.attach(base, {"w": spec}, key=KEY)["w"]
    assert node.base.dtype == jnp.bfloat16 and node.lora_a.dtype == dtype
    w = np.float64(base["w"].astype(jnp.float32))
    largest = np.abs(np.float64(node.base.astype(jnp.float32)))
    step = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-30))) - 8)  # half a step of bfloat16
    assert (np.abs(double(node) - w) <= step * 1.01 + 1e-6).all()
    # Of a float32 residual of the same weight the same A and B miss nothing.
    exact = jlora.attach({"w": base["w"].astype(jnp.float32)}, {"w": spec}, key=KEY)["w"]
    assert distance(double(exact), w) < 1e-6


def test_the_parts_are_the_largest_and_the_smallest():
    w = drawn((13, 9))
    u, s, vt = np.linalg.svd(np.float64(w), full_matrices=False)
    for init, some in ((pissa, slice(0, 2)), (milora, slice(7, 9))):
        a, b, rest = init(KEY, w, 2, 3.5)
        part = (u[:, some] * s[some]) @ vt[some]
        np.testing.assert_allclose(3.5 * np.float64(a) @ np.float64(b), part, atol=1e-5)
        np.testing.assert_allclose(rest, w - part, atol=1e-5)
        # The two share the singular values evenly.
        np.testing.assert_allclose(jnp.linalg.norm(a, axis=0), jnp.linalg.norm(b, axis=1), 1e-5)


@pytest.mark.parametrize("init", [pissa, milora])
@pytest.mark.parametrize("alpha", [0, -4])
def test_no_scaling_below_zero(init, alpha):
    with pytest.raises(ValueError, match=says("cannot be a part of the weight", "alpha above 0")):
        attach = functools.partial(jlora.attach, {"w": drawn((4, 4))}, key=KEY)
        attach({"w": LoraSpec(2, alpha, init=init)})


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValueError, match=says("orthogonal(rank=3)", "LoraSpec(rank=4)")):
        jlora.attach({"w": drawn((4, 4))}, {"w": LoraSpec(3, init=orthogonal)}, key=KEY)


def trained(params):
    """Other A and B, as after training."""
    rng = np.random.default_rng(1)
    trainable, frozen = jlora.partition(params)
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype), trainable
    )
    return jlora.combine(moved, frozen)


@pytest.mark.sample(3)
@every
def test_the_model_starts_as_it_was_and_only_the_factors_train(init):
    base = {"up": drawn((6, 9)), "layers": drawn((2, 9, 9)) / 3}
    rules = {".*": LoraSpec(2, 5, init=init, layout="io")}
    params = jlora.attach(base, rules, key=KEY)

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["up"], p["layers"])[0]

    x, apply = drawn((4, 6)), jlora.lora(fn, fallback="error")
    np.testing.assert_allclose(jax.jit(apply)(params, x), fn(base, x), rtol=0, atol=1e-5)
    tx = jlora.freeze(optax.sgd(0.1))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: (apply(p, x) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates)

    after = step(params, tx.init(params))
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for path in base:
        assert bits(after[path].base) == bits(params[path].base)
        assert not np.array_equal(after[path].lora_a, params[path].lora_a)
        assert not np.array_equal(after[path].lora_b, params[path].lora_b)


@pytest.mark.sample(8)
@every
@weights
def test_conversion_to_plain_lora(init, shape, layout, slices):
    base, initial = attached(init, shape, layout, slices)
    params = trained(initial)
    plain = arithmetic.residual_to_lora(params, initial, base)
    node = plain["w"]
    assert node.rank == 4 and not node.residual and node.base is base["w"]
    assert bits(node.scaling) == bits(initial["w"].scaling)
    assert distance(double(node), double(params["w"])) < 1e-6
    assert distance(double(node), np.float64(base["w"])) > 1e-2, "nothing was learned"
    # From detached adapters too, and nothing changes what is plain already.
    parts = [jlora.detach(tree)[1] for tree in (params, initial)]
    again = arithmetic.residual_to_lora(*parts, base)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(plain)))


def test_conversion_keeps_the_rest_and_follows_the_scaling():
    base = {"w": drawn((6, 5)), "v": drawn((6, 5)), "b": drawn((5,))}
    rules = {"w": LoraSpec(2, 6, init=pissa), "v": LoraSpec(2), "b": "full"}
    initial = jlora.attach(base, rules, key=KEY)
    params = trained(initial)
    louder = dataclasses.replace(params["w"], scaling=jnp.float32(0.5))
    plain = arithmetic.residual_to_lora({**params, "w": louder}, initial, base)
    assert distance(double(plain["w"]), double(louder)) < 1e-6
    assert plain["v"].lora_a is params["v"].lora_a and plain["v"].rank == 2
    assert plain["b"].value is params["b"].value and plain["b"].base is base["b"]


def test_conversion_refuses():
    base, initial = attached(pissa, (6, 5))
    other = attached(olora, (6, 5))[1]
    call = arithmetic.residual_to_lora
    with pytest.raises(ValueError, match="there is nothing to convert"):
        call(jlora.attach(base, {"w": LoraSpec(2)}, key=KEY), initial, base)
    with pytest.raises(ValueError, match=r'"w".*does not match the node in `initial`'):
        call(initial, jlora.attach(base, {"w": LoraSpec(2)}, key=KEY), base)
    with pytest.raises(ValueError, match=r'"w".*does not match the node in `initial`'):
        call(initial, base, base)
    with pytest.raises(ValueError, match=r"the trees differ in 1 places"):
        call(other, initial, {"w": base["w"]})
    with pytest.raises(ValueError, match=r"A or B of \"w\" is missing.*jlora.combine"):
        call(jlora.partition(initial)[1], initial, base)


def test_a_checkpoint_returns_to_its_own_base(tmp_path):
    base, initial = attached(pissa, (6, 5))
    params = trained(initial)
    checkpoint.save(tmp_path / "own", params)
    restored = checkpoint.restore(tmp_path / "own", initial)
    assert restored["w"].residual and jax.tree.structure(restored) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(params)))
    with pytest.raises(ValueError, match=says('of "w" was trained over a residual', "_to_lora")):
        checkpoint.restore(tmp_path / "own", base)
    plain = arithmetic.residual_to_lora(params, initial, base)
    checkpoint.save(tmp_path / "plain", plain)
    assert checkpoint.restore(tmp_path / "plain", base)["w"].rank == 4
    with pytest.raises(ValueError, match=says('base of "w" in `params` is a residual')):
        checkpoint.restore(tmp_path / "plain", initial)


def test_peft_s_files_are_of_the_original_weights(tmp_path):
    names = {"w": "m.w.weight"}
    base, initial = attached(pissa, (6, 5))
    params = trained(initial)
    for tree in (params, jlora.detach(params)[1]):
        with pytest.raises(ValueError, match=says('base of "w" is a residual', "residual_to_lora")):
            peft.save(tmp_path, tree, names=names)
    assert not [*tmp_path.iterdir()]
    plain = arithmetic.residual_to_lora(params, initial, base)
    peft.save(tmp_path, plain, names=names)
    assert all(
        map(
            np.array_equal,
            jax.tree.leaves(peft.load(tmp_path, base, names=names)),
            jax.tree.leaves(plain),
        )
    )
    with pytest.raises(ValueError, match=says('base of "w" is a residual', "original weights")):
        peft.load(tmp_path, initial, names=names)


def test_a_tied_adapter_is_untied_first():
    base, params = attached(pissa, (6, 6))
    tied = jlora.tie(params, {"w": ("lora_a",)})
    trained = {**tied, "w": dataclasses.replace(tied["w"], lora_a=jlora._arrays.Tied("v"))}
    with pytest.raises(ValueError, match=r'"w" is tied.*`jlora.untie\(params\)`'):
        arithmetic.residual_to_lora(trained, params, base)
