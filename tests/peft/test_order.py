"""Which of several parameters of one module is which: the order in which PyTorch declares them."""

import jax.numpy as jnp
import pytest
from helpers import says
from peft_cases import KEY, config, keys

import jlora
from jlora import LoraSpec, peft

LAYOUTS = {"e/a": "io", "e/b": "io"}
SORTED, DECLARED = {"e/a": "m.e.a", "e/b": "m.e.b"}, {"e/b": "m.e.b", "e/a": "m.e.a"}
INNER, OUTER = "base_model.model.m.e.base_layer.lora_A.weight", "base_model.model.m.e.lora_A.weight"


def experts(a=(3, 4, 4), b=(3, 4, 4)):
    return {"e": {"a": jnp.ones(a), "b": jnp.ones(b)}}


def adapted(weights):
    """A of a is full of ones and s of b is 2, so that neither can pass for the other."""
    init = lambda key, w, rank, **_: (w[:, :rank] * 0 + 1, w[:rank] * 0)
    rules = {"e/a": LoraSpec(2, 2, layout="io", init=init), "e/b": LoraSpec(2, 4, layout="io")}
    return jlora.attach(weights, rules, key=KEY)


def outermost(folder):
    """Whether a, the ones, is outermost, as what is declared last is."""
    tensors = dict(keys(folder))
    ones = jnp.ones(48, jnp.float32)[: len(tensors[OUTER]["data"]) // 4].tobytes()
    return tensors[OUTER]["data"] == ones


def test_the_order_is_that_of_names(tmp_path):
    params = adapted(experts())
    peft.save(tmp_path, params, names=DECLARED)
    assert outermost(tmp_path)
    got = peft.load(tmp_path, experts(), names=DECLARED, layouts=LAYOUTS)
    assert (got["e"]["a"].lora_a == 1).all() and (got["e"]["b"].scaling == 2).all()


def test_the_order_of_a_tree_says_nothing(tmp_path):
    """Names that were made by going over the leaves are in the tree's order, and not PyTorch's."""
    params = adapted(experts())
    for names in (SORTED, SORTED.get):
        match = says(
            'several parameters of "m.e"', "Give `declared=['m.e.a', 'm.e.b']`", "no fixed"
        )
        with pytest.raises(ValueError, match=match):
            peft.save(tmp_path, params, names=names)
        peft.save(tmp_path, params, names=names, declared=["e.b", "e.a"])
        assert outermost(tmp_path)
        match = says("['a', 'b'], with equal shapes", "Give `declared=")
        with pytest.raises(ValueError, match=match):
            peft.load(tmp_path, experts(), names=names, layouts=LAYOUTS)
        read = dict(names=names, layouts=LAYOUTS, declared=["e.b", "e.a"])
        got = peft.load(tmp_path, experts(), **read)
        assert (got["e"]["a"].lora_a == 1).all() and (got["e"]["b"].scaling == 2).all()


@pytest.mark.parametrize("given", [["m.e.a", "m.e.b"], ["m.e.b", "m.e.a"]])
def test_the_order_of_target_parameters_says_nothing(tmp_path, given):
    params = adapted(experts())
    peft.save(tmp_path, params, names=DECLARED, target_parameters=given)
    assert outermost(tmp_path)
    read = dict(names=DECLARED, layouts=LAYOUTS, target_parameters=given)
    got = peft.load(tmp_path, experts(), **read)
    assert (got["e"]["a"].lora_a == 1).all()
    with pytest.raises(ValueError, match=says("Give `declared=")):
        peft.save(tmp_path, params, names=SORTED, target_parameters=given)


def test_shapes_come_before_any_order(tmp_path):
    weights = experts(b=(3, 4, 6))
    params = adapted(weights)
    peft.save(tmp_path, params, names=DECLARED)
    got = peft.load(tmp_path, weights, names=SORTED, layouts=LAYOUTS, declared=["m.e.a", "m.e.b"])
    assert (got["e"]["a"].lora_a == 1).all() and got["e"]["b"].lora_b.shape == (3, 2, 6)


def test_a_file_without_a_configuration_has_its_parameters_from_the_call(tmp_path):
    params = adapted(experts(b=(3, 4, 6)))
    peft.save(tmp_path, params, names=DECLARED)
    assert config(tmp_path)["target_parameters"] == ["m.e.a", "m.e.b"]
    (tmp_path / "adapter_config.json").unlink()
    read = dict(names=SORTED, layouts=LAYOUTS, alpha=2)
    got = peft.load(tmp_path, experts(b=(3, 4, 6)), target_parameters=["m.e.b", "m.e.a"], **read)
    assert (got["e"]["a"].lora_a == 1).all()
