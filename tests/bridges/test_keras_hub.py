"""Keras-Hub's `.lora.h5`, against Keras's own layers with `enable_lora`."""

import os

# Keras reads both once, as it is imported: nobody's own settings count, and none are written.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = os.devnull

import h5py
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import jlora
import jlora.keras

pytestmark = pytest.mark.usefixtures("usual_promotion")


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    """A query of heads, its output, and a dense layer."""
    x = keras.Input((None, 6))
    y = layers.EinsumDense("btd,dnh->btnh", (None, 3, 4), name="query")(x)
    y = layers.EinsumDense("btnh,nhd->btd", (None, 6), name="out")(y)
    net = keras.Model(x, layers.Dense(5, name="value")(layers.Rescaling(0.5)(y)))
    for n, v in enumerate(net.variables):
        v.assign(drawn(*v.shape, seed=n))
    return net


def written(file, pairs, rank=2):
    """As `Backbone.save_lora_weights` does, by the number of a layer with weights."""
    with h5py.File(file, "w") as f:
        f["lora/vars/rank"] = rank
        for index, (a, b) in pairs.items():
            f[f"lora/{index}/vars/lora_kernel_a"] = a
            f[f"lora/{index}/vars/lora_kernel_b"] = b
    return file


@pytest.mark.nightly
def test_the_merged_model_is_keras_own(tmp_path, net):
    """The kernels of Keras's layers with LoRA enabled, and ours merged."""
    own = [x for x in net._flatten_layers(include_self=False) if x.weights]
    names = [x.name for x in own]
    pairs, want = {}, {}
    for name in ("query", "out", "value"):
        layer = own[names.index(name)]
        shape = layer.kernel.shape
        pairs[names.index(name)] = (drawn(*shape[:-1], 2, seed=7), drawn(2, shape[-1], seed=8))
        config = keras.saving.serialize_keras_object(layer)
        twin = keras.saving.deserialize_keras_object(config)
        twin.enable_lora(2, lora_alpha=3)
        kernel = next(v for v in layer.weights if v.name == "kernel")
        twin._kernel.assign(kernel.value)
        twin.lora_kernel_a.assign(pairs[names.index(name)][0])
        twin.lora_kernel_b.assign(pairs[names.index(name)][1])
        want[kernel.path] = np.asarray(twin.kernel)
    params = {v.path: v.value for v in net.variables}
    file = written(tmp_path / "a.lora.h5", pairs)
    adapted = jlora.keras.load(file, net, params, alpha=3)
    assert sum(isinstance(x, jlora.LoraArray) for x in adapted.values()) == 3
    merged = jlora.merge(adapted)
    for path, kernel in want.items():
        np.testing.assert_allclose(merged[path], kernel, rtol=1e-6, atol=1e-6)
    assert merged.keys() == params.keys()
    by_default = jlora.keras.load(file, net, params)
    assert {float(by_default[path].scaling) for path in want} == {1.0}


A, B = drawn(6, 3, 2), drawn(2, 4)


def wrong(tmp_path, case, good):
    file = tmp_path / "a.lora.h5"
    match case:
        case "text":
            file.write_text("text")
        case "cut":
            written(file, {good: (A, B)})
            file.write_bytes(file.read_bytes()[:900])
        case "rank":
            written(file, {good: (A, B)}, rank=0)
        case "names":
            written(file, {"query": (A, B)})
        case "dtype":
            written(file, {good: (A.astype(np.float64), B)})
        case "hollow":
            with h5py.File(written(file, {good: (A, B)}), "a") as f:
                del f[f"lora/{good}/vars/lora_kernel_b"]
                f.create_dataset(f"lora/{good}/vars/lora_kernel_b", (2**40, 2**20), np.float32)
        case "layer":
            written(file, {99: (A, B)})
        case "shape":
            written(file, {good: (A[:, :1], B)})
    return file


WRONG = {
    "text": "is not a complete .lora.h5 file",
    "cut": "is not a complete .lora.h5 file",
    "names": "is not a complete .lora.h5 file",
    "dtype": "is not float32, or lacks values",
    "hollow": "is not float32, or lacks values",
    "rank": "the file has rank 0",
    "layer": "the file has LoRA of layer 99",
    "shape": "does not fit A",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path, net, case):
    own = [x.name for x in net._flatten_layers(include_self=False) if x.weights]
    params = {v.path: jnp.asarray(v.value) for v in net.variables}
    file = wrong(tmp_path, case, own.index("query"))
    with pytest.raises(ValueError, match=WRONG[case]):
        jlora.keras.load(file, net, params)


def test_no_file(tmp_path, net):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        jlora.keras.load(tmp_path / "a.lora.h5", net, {})
