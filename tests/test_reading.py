"""What initializers read of a weight on a mesh, and the axes that a mesh does not divide."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, initializers

KEY = jax.random.key(0)
NITER = functools.partial(initializers.pissa, niter=4)


def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def struct(shape, *names, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(), P(*names)))


@pytest.mark.parametrize("init", [initializers.pissa, initializers.milora])
def test_exact_initializers_say_the_bytes_that_they_gather(init):
    tree = {"a": struct((3, 16, 8), None, "x"), "b": struct((8, 8), "x", "y"), "c": struct((8, 8))}
    rules = {".*": LoraSpec(2, layout="io", init=init)}
    # By blocks: R of four matrices [R; block] (12, 8), and the singular values of R (8, 8).
    size = f"{4 * (4 * 12 * 8 + 8 * 8):,}"
    words = rf"`{init.__name__}` decomposes \"a\" bfloat16\[3,16,8\].*{size} bytes for each layer"
    with pytest.warns(UserWarning, match=rf"{words}.*also for 1 more leaves.*niter=16"):
        jlora.attach(tree, rules, key=KEY)
    jlora.attach({"c": tree["c"]}, rules, key=KEY)  # on every device already


@pytest.mark.parametrize("init", [NITER, initializers.olora, initializers.kaiming, None])
def test_others_gather_nothing(init):
    tree = {"a": struct((3, 16, 8), None, "x"), "b": struct((8, 8), "x", "y")}
    jlora.attach(tree, {".*": LoraSpec(2, layout="io", init=init)}, key=KEY)


def test_olora_is_the_leading_part_of_the_decomposition():
    w = jax.random.normal(KEY, (12, 20))
    a, b, rest = initializers.olora(KEY, w, 4, 2.0)
    q, r = jnp.linalg.qr(w.T)
    assert jnp.allclose(a, r[:4].T, atol=1e-5) and jnp.allclose(b, q[:, :4].T, atol=1e-5)
    assert jnp.allclose(rest + 2 * a @ b, w, atol=1e-5)


def test_an_axis_that_is_not_divided_is_replicated_and_said():
    tree = {"w": struct((6, 8), "x", "y"), "even": struct((8, 8), "x", "y")}
    words = r"axis 0 of \"w\" bfloat16\[6,8\] is sharded along 'x'.*does not divide"
    with pytest.warns(UserWarning, match=rf"`jlora.attach`: {words}"):
        params = jlora.attach(tree, {".*": LoraSpec(2)}, key=KEY)
    assert params["w"].lora_a.sharding.spec == P(None, None)
    assert params["w"].lora_b.sharding.spec == P(None, "y")
    with pytest.warns(UserWarning, match=rf"`jlora.shardings\(params\)`: {words}"):
        assert jlora.shardings(params)["w"].lora_a.spec == P(None, None)
    specs = {"w": P("x", "y"), "even": P("x", "y")}
    assert jlora.specs(params, specs)["w"].lora_a == P("x", None)  # of an unknown mesh
    with (
        jax.set_mesh(mesh()),
        pytest.warns(UserWarning, match=rf"`jlora.specs\(params, base_specs\)`: {words}"),
    ):
        found = jlora.specs(params, specs)
    assert found["w"].lora_a == P(None, None) and found["w"].base == P("x", "y")
    assert found["even"].lora_a == P("x", None)


def test_it_is_said_once():
    tree = {f"w{n}": struct((6, 8), "x", "y") for n in range(3)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        jlora.attach(tree, {".*": LoraSpec(2)}, key=KEY)
    assert len(seen) == 1 and "also for 2 more axes" in str(seen[0].message)
