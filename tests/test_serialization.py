"""Nodes in the formats of others: Flax's bytes and state dicts, `jax.export`, pickle, JSON."""

import copy
import dataclasses
import functools
import json
import pickle
import sys
import types

import flax.linen as nn
import flax.serialization as serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax import export

import jlora
from jlora import LoraSpec

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


def base():
    w = jax.random.normal(jax.random.key(1), (4, 6))
    return {"w": w, "v": w.T.astype(jnp.bfloat16), "bias": jnp.ones(6)}


RULES = {
    "plain": {"w": LoraSpec(2)},
    "dora": {"w": LoraSpec(2, dora=True, dtype=jnp.bfloat16), "bias": "full"},
    "slices": {"w": LoraSpec(2, slices=((0, 2), (3, 6)))},
    "residual": {"w": LoraSpec(2, init=jlora.initializers.pissa)},
    "lora_xs": {"[wv]": LoraSpec(2, form="lora_xs")},
}


def tree(name="plain"):
    return jlora.attach(base(), RULES[name], key=KEY)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b) and np.array_equal(a, b)


@pytest.mark.parametrize("name", RULES)
def test_flax_bytes_and_pickle_give_the_tree_back(name):
    params = tree(name)
    trainable, frozen = jlora.partition(params)
    for part in (FrozenDict(params), trainable, frozen):
        same(serialization.from_bytes(part, serialization.to_bytes(part)), part)
    same(pickle.loads(pickle.dumps(params)), params)
    same(copy.deepcopy(params), params)
    assert copy.copy(params["w"]).lora_a is params["w"].lora_a


def test_a_state_dict_has_only_dictionaries_arrays_and_one_text_a_node():
    state = serialization.to_state_dict(tree("dora"))
    assert set(state["w"]) == {"static", "base", "lora_a", "lora_b", "scaling", "extra"}
    assert set(state["bias"]) == {"static", "base", "value"}
    assert set(state["w"]["extra"]) == {"magnitude"} and json.loads(state["w"]["static"])
    # The target may be of shapes: none of its values are read.
    shapes = jax.eval_shape(lambda: tree("dora"))
    same(serialization.from_state_dict(shapes, state), tree("dora"))


def test_a_train_state_of_tied_parameters():
    params = jlora.attach({"v": X, "w": X}, {"[vw]": LoraSpec(1)}, key=KEY)
    params = jlora.tie(params, {"[vw]": ("lora_a",)})
    state = TrainState.create(apply_fn=None, params=params, tx=jlora.freeze(optax.adam(1e-2)))
    same(serialization.from_bytes(state, serialization.to_bytes(state)), state)


def test_a_stored_base():
    params = {"w": Int8(jnp.ones((4, 6), jnp.int8), jnp.float32(0.5))}
    params = jlora.attach(params, {"w": LoraSpec(2)}, key=KEY)
    same(serialization.from_bytes(params, serialization.to_bytes(params)), params)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Int8:
    codes: jax.Array
    scale: jax.Array
    dtype = jnp.dtype("float32")
    shape = property(lambda self: self.codes.shape)

    def dequantize(self):
        return self.codes.astype(self.dtype) * self.scale


def other(rules):
    return jlora.attach(base(), rules, key=KEY)


REFUSED = {
    "rank": ({"w": LoraSpec(3)}, r'the lora_a of "./w" has \(4, 3\) in `target` and \(4, 2\)'),
    "layout": ({"w": LoraSpec(2, layout="oi")}, r'"layout": "oi".*but that of `state` has .*"io"'),
    "form": ({"w": LoraSpec(2, form="mica")}, r'"form": "mica".*but that of `state` has'),
    "dora": ({"w": LoraSpec(2, dora=True)}, r"the extra of .* has .*magnitude.* and nothing in"),
    "full": ({"w": "full"}, "is a `FullArray`, but that of `state` is not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_of_another_tree_is_refused(name):
    rules, match = REFUSED[name]
    state = serialization.to_bytes(tree())
    with pytest.raises(ValueError, match=match):
        serialization.from_bytes(other(rules), state)


def test_plain_parameters_are_no_state_of_a_node():
    with pytest.raises(
        ValueError, match=r'"./w" of `target` is a `LoraArray`, but that of `state`'
    ):
        serialization.from_bytes(tree(), serialization.to_bytes(base()))


def test_dora_is_not_dropped_on_the_way_to_a_tree_without():
    with pytest.raises(
        ValueError, match=r"the extra of .* has nothing in `target` and .*magnitude"
    ):
        serialization.from_bytes(
            other({"w": LoraSpec(2, dtype=jnp.bfloat16), "bias": "full"}),
            serialization.to_bytes(tree("dora")),
        )


def test_flax_may_be_loaded_after_a_tree_was_made(monkeypatch):
    params, entered = tree(), []
    for loading in (True, False):
        flax = types.SimpleNamespace()
        if not loading:
            flax.is_serializable = entered.__contains__
            flax.register_serialization_state = lambda kind, *_: entered.append(kind)
        monkeypatch.setitem(sys.modules, "flax.serialization", flax)
        assert not entered
        jax.tree.map(lambda x: x, params)  # makes nodes
    assert {jlora.LoraArray, jlora.FullArray} <= set(entered)


@pytest.mark.parametrize("name", ["dora", "slices"])
def test_an_exported_function_takes_adapted_parameters(name):
    params = tree(name)
    run = jax.jit(jlora.lora(lambda p, x: x @ p["w"] + p["bias"][None]))
    written = export.export(run)(params, X).serialize()
    read = export.deserialize(written)
    np.testing.assert_array_equal(read.call(params, X), run(params, X))
    with pytest.raises(ValueError, match=r"tree"):
        read.call(jlora.merge(params), X)


def test_an_exported_function_takes_tied_parameters():
    params = jlora.attach({"a": X, "b": X}, {".": LoraSpec(1)}, key=KEY)
    tied = jlora.tie(params, {"a|b": ("lora_a",)})
    run = jax.jit(lambda p, x: jlora.lora(lambda p, x: x @ p["a"].T @ p["b"])(jlora.untie(p), x))
    read = export.deserialize(export.export(run)(tied, X).serialize())
    np.testing.assert_array_equal(read.call(tied, X), run(tied, X))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_a_spec_is_json_and_equal_specs_are_equal(dtype):
    spec = LoraSpec(4, 8, dtype=getattr(jnp, dtype), slices=[(0, 2), (3, 4)], dora=True)
    read = LoraSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert read == spec and hash(read) == hash(spec) and read.dtype == dtype
    for given in (dtype, jnp.dtype(dtype)):
        same_spec = dataclasses.replace(spec, dtype=given)
        assert same_spec == spec and len({same_spec, spec}) == 1
    assert pickle.loads(pickle.dumps(spec)) == spec == copy.deepcopy(spec)


def test_an_initializer_gets_a_dtype():
    def init(key, weight, rank, scaling, dtype):
        assert dtype == jnp.bfloat16 and dtype.itemsize == 2
        return jlora.initializers.kaiming(key, weight, rank, scaling, dtype)

    params = jlora.attach({"w": X}, {"w": LoraSpec(1, init=init, dtype="bfloat16")}, key=KEY)
    assert params["w"].lora_a.dtype == jnp.bfloat16


def test_a_weight_has_one_adapter():
    params = tree()
    adapter = jlora.detach(params)[1]
    with pytest.raises(
        ValueError, match=r'"w" float32\[4,6\] is adapted already in `base`.*detach'
    ):
        jlora.bind(params, adapter)
    # Another weight's adapter may follow.
    second = jlora.detach(other({"v": LoraSpec(1, layout="oi")}))[1]
    both = jlora.bind(params, second)
    assert both["w"].base.shape == (4, 6) and both["v"].rank == 1


def test_a_bound_linen_module():
    model, variables = nn.Dense(6), {"params": {"kernel": base()["w"], "bias": jnp.ones(6)}}
    params = jlora.attach(variables, {".*kernel": LoraSpec(2)}, key=KEY)
    params = jax.tree.map(lambda x: x + 0.1, params)
    got = jlora.lora(lambda p, x: model.bind(p)(x), fallback="error")(params, X)
    np.testing.assert_allclose(got, model.bind(jlora.merge(params))(X), rtol=1e-5)
    with pytest.raises(TypeError, match=r"jlora.lora\(fn\)\(params, ...\)"):
        model.bind(params)(X)


def test_keys_with_newlines_match_as_others():
    params = {"a\nb": {"w": X}, "c": {"w": X}}
    params = jlora.attach(params, {".*": LoraSpec(1)}, key=KEY)
    tied = jlora.tie(params, {".*": ("lora_a",)})
    assert tied["c"]["w"].lora_a.owner == "a\nb/w"
