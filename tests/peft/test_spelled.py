"""Keys as other writers leave them: the adapter's name inside, wrappers' prefixes before."""

import jax
import jax.numpy as jnp
import pytest
from helpers import says
from peft_cases import PREFIX, SMALL_NAMES, entries, load, tensors, write, zeros

from jlora import peft


def same(folder, file, config=None):
    """The file gives what the plain one gives."""
    plain, odd = folder / "plain", folder / "odd"
    plain.mkdir()
    odd.mkdir()
    want = load(write(plain, tensors(), entries()))
    got = load(write(odd, file, config or entries()))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert bool(jnp.array_equal(g, w))


PREFIXES = [
    "",
    "base_model.",
    "module.",
    "_orig_mod.",
    PREFIX + "_orig_mod.",
    PREFIX + "module.",
    PREFIX + PREFIX,
    "_orig_mod.module." + PREFIX,
    "module._orig_mod." + PREFIX + "_orig_mod.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_prefixes_are_taken_off(tmp_path, prefix):
    same(tmp_path, {prefix + k.removeprefix(PREFIX): x for k, x in tensors().items()})


def test_a_layer_compiled_by_itself(tmp_path):
    same(tmp_path, {k.replace("_proj.", "_proj._orig_mod."): x for k, x in tensors().items()})


@pytest.mark.parametrize("adapter", ["default", "other", "lora"])
def test_an_adapters_name_left_in_is_taken_out(tmp_path, adapter):
    same(tmp_path, {k.replace(".weight", f".{adapter}.weight"): x for k, x in tensors().items()})


def test_an_adapters_name_in_every_kind_of_key(tmp_path):
    file = {
        "base_model.model.m.embed.lora_embedding_A.default": zeros(2, 5),
        "base_model.model.m.embed.lora_embedding_B.default": zeros(4, 2) + 2,
        "base_model.model.m.q.lora_A.default.weight": zeros(2, 5),
        "base_model.model.m.q.lora_B.default.weight": zeros(4, 2) + 3,
        "base_model.model.m.head.modules_to_save.default.weight": zeros(3, 4) + 4,
    }
    params = {
        "embed": {"embedding": jnp.ones((5, 4))},
        "q": {"kernel": jnp.ones((5, 4))},
        "head": {"kernel": jnp.ones((4, 3))},
    }
    names = lambda path: "m." + path.partition("/")[0] + ".weight"
    got = peft.load(write(tmp_path, file, entries()), params, names=names)
    assert (got["embed"]["embedding"].lora_b == 2).all() and (got["q"]["kernel"].lora_b == 3).all()
    assert (got["head"]["kernel"].value == 4).all()


def test_several_adapters_in_one_file_are_refused(tmp_path):
    names = iter(("one", "two", "one", "two"))
    file = {k.replace(".weight", f".{next(names)}.weight"): x for k, x in tensors().items()}
    with pytest.raises(ValueError, match=says("several adapters, ['one', 'two']", "selected_")):
        load(write(tmp_path, file, entries()))


def test_two_keys_of_one_name_are_refused(tmp_path):
    file = tensors() | {"module.m.q_proj.lora_A.weight": zeros(2, 5)}
    with pytest.raises(ValueError, match=says("both mean", '"m.q_proj.lora_A.weight"', "one out")):
        load(write(tmp_path, file, entries()))


@pytest.mark.parametrize("own", ["module.", "_orig_mod.", "base_model.model.", "m.base_model."])
def test_a_model_that_has_such_a_name_itself_keeps_it(tmp_path, own):
    names = {path: own + name for path, name in SMALL_NAMES.items()}
    file = {PREFIX + own + k.removeprefix(PREFIX): x for k, x in tensors().items()}
    got = load(write(tmp_path, file, entries()), names=names)
    assert (got["k"]["kernel"].lora_b == 4).all()


def test_another_prefix_of_every_key_is_named(tmp_path):
    file = {PREFIX + "student.net." + k.removeprefix(PREFIX): x for k, x in tensors().items()}
    match = says("4 keys are unexpected", 'has the prefix "student.net.", which `names` does not')
    with pytest.raises(ValueError, match=match):
        load(write(tmp_path, file, entries()))
