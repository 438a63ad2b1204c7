"""A checkpoint restored onto weights on a mesh: each part on the devices and axes of its base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from stored import pack

import jlora
from jlora import LoraSpec, checkpoint, peft

SHAPES = {"b": (8,), "conv": (4, 8), "fused": (4, 12), "stack": (2, 4, 8), "w": (4, 8)}
RULES = {
    "b": "full",
    "fused": LoraSpec(2, slices=((0, 3), (6, 9))),
    "stack": LoraSpec(2, layout="io", dora=True),
    "conv": LoraSpec(2, layout="oi", form="vera"),
    "w": LoraSpec(2),
}
SPECS = {
    "b": P("y"),
    "conv": P("x", "y"),
    "fused": P(None, ("x", "y")),
    "stack": P("x", None, "y"),
    "w": P("x", "y"),
}
WANT = {
    "b": {"value": P("y")},
    "conv": {"lora_a": P("y"), "lora_b": P(None, "x"), "lambda_b": P("x"), "lambda_d": P()},
    "fused": {"lora_a": P(), "lora_b": P()},  # slices of outputs are not sharded
    "stack": {
        **{"lora_a": P("x"), "lora_b": P("x", None, "y")},
        **{"magnitude": P("x", "y"), "scaling": P("x")},
    },
    "w": {"lora_a": P("x"), "lora_b": P(None, "y"), "scaling": P()},
}


def base():
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=n).astype(np.float32)) for k, n in SHAPES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and what was saved into it."""
    params = jlora.attach(base(), RULES, key=jax.random.key(0))
    folder = tmp_path_factory.mktemp("saved") / "a"
    checkpoint.save(folder, params)
    return folder, params


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)


def parts(node):
    is_full = isinstance(node, jlora.FullArray)
    return {"value": node.value} if is_full else {**node.parts, "scaling": node.scaling}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_onto_a_mesh(saved, kind):
    folder, params = saved
    mesh = mesh_of(kind)
    placed = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in base().items()}
    got = checkpoint.restore(folder, placed)
    for path, want in WANT.items():
        found = parts(got[path])
        assert got[path].base is placed[path]
        for name, spec in want.items():
            sharding = NamedSharding(mesh, spec)
            assert found[name].sharding.is_equivalent_to(sharding, found[name].ndim), (path, name)
            assert found[name].sharding.mesh == mesh
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_onto_shapes_with_shardings(saved):
    """Structs for the base, real arrays for the adapter: to compile before the base is loaded."""
    mesh = mesh_of(AxisType.Auto)
    structs = {
        k: jax.ShapeDtypeStruct(n, jnp.float32, sharding=NamedSharding(mesh, SPECS[k]))
        for k, n in SHAPES.items()
    }
    got = checkpoint.restore(saved[0], structs)
    assert got["w"].lora_b.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)


def test_onto_one_device(saved):
    device = jax.devices()[3]
    got = checkpoint.restore(saved[0], jax.device_put(base(), device))
    assert {x.sharding for x in jax.tree.leaves(got)} == {SingleDeviceSharding(device)}
    free = checkpoint.restore(saved[0], base())  # follows the other arguments of a program
    assert not any(x.committed for x in jax.tree.leaves(free))
    plain = checkpoint.restore(saved[0], jax.tree.map(np.asarray, base()))
    assert isinstance(plain["w"].base, np.ndarray)


def test_a_stored_weight_tells_the_mesh(tmp_path):
    mesh = mesh_of(AxisType.Auto)
    params = {"w": pack(base()["w"])}
    checkpoint.save(tmp_path / "a", jlora.attach(params, {"w": LoraSpec(2)}, key=jax.random.key(0)))
    got = checkpoint.restore(tmp_path / "a", jax.device_put(params, NamedSharding(mesh, P("x"))))
    assert got["w"].lora_a.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)


def test_pefts_files_onto_a_mesh(tmp_path):
    names = {"w": "m.w.weight"}
    layouts = {"w": "io"}
    params = jlora.attach({"w": base()["w"]}, {"w": LoraSpec(2)}, key=jax.random.key(0))
    peft.save(tmp_path, params, names=names, layouts=layouts)
    assert safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    mesh = mesh_of(AxisType.Auto)
    placed = {"w": jax.device_put(base()["w"], NamedSharding(mesh, P("x", "y")))}
    got = peft.load(tmp_path, placed, names=names, layouts=layouts)["w"]
    assert got.lora_a.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
    assert got.lora_b.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)
