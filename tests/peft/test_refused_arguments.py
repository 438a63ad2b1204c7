"""Arguments and parameters that `jlora.peft` refuses, and nothing is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says
from peft_cases import SMALL_NAMES, base, entries, load, tensors, write, zeros

import jlora
from jlora import FullArray, LoraArray, LoraSpec, peft

ARGUMENTS = {
    "unknown_path": (
        {"q/kernal": "m.q"},
        {},
        KeyError,
        says('`names` has "q/kernal"', '"q/kernel"'),
    ),
    "unknown_layout": (SMALL_NAMES, {"layouts": {"v": "io"}}, KeyError, says('`layouts` has "v"')),
    "unknown_kind": (SMALL_NAMES, {"kinds": {"v": "conv"}}, KeyError, says('`kinds` has "v"')),
    "kind": (
        SMALL_NAMES,
        {"kinds": {"q/kernel": "x"}},
        ValueError,
        says("'x'; give one of", "Conv1D"),
    ),
    "twice": (
        {"k/kernel": "m.q.weight", "q/kernel": "m.q.weight"},
        {},
        ValueError,
        says('gives "m.q.weight" to both "k/kernel" and "q/kernel"', "tied"),
    ),
    "no_string": (lambda path: 3, {}, TypeError, says('gives 3 for "k/kernel"')),
    "too_deep": (
        {"q/kernel": "m.{}.{}.{}.weight"},
        {},
        ValueError,
        says("unrolls 3 dimensions", '"q/kernel" float32[5,4]'),
    ),
    "wrong_list": ({"q/kernel": ["m.a.weight"]}, {}, ValueError, says("has 1 names", "each index")),
    "ragged": (
        {"q/kernel": ["m.{}.weight", "m.b.weight", "m.c.weight", "m.d.weight", "m.e.weight"]},
        {},
        ValueError,
        says('names of "q/kernel" unroll another number of dimensions'),
    ),
}


@pytest.mark.parametrize(("names", "more", "error", "match"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_refused(tmp_path, names, more, error, match):
    write(tmp_path, tensors(), entries())
    with pytest.raises(error, match=match):
        load(tmp_path, names, **more)


def test_a_weight_whose_sides_are_not_known(tmp_path):
    write(tmp_path, tensors(), entries())
    weights = {"q": jnp.ones((5, 2, 2)), "k": jnp.ones((5, 3))}
    names = {"q": "m.q_proj.weight", "k": "m.k_proj.weight"}
    with pytest.raises(ValueError, match=says('[5, 2, 2] of "q" are input', "layouts")):
        peft.load(tmp_path, weights, names=names)
    assert peft.load(tmp_path, weights, names=names, layouts={"q": "ioo"})["q"].rank == 2
    with pytest.raises(ValueError, match=says("layout 'i' has 1 letters", "needs its {}")):
        peft.load(tmp_path, weights, names=names, layouts={"q": "i"})


def test_layers_of_one_stack_must_be_alike(tmp_path):
    file = {f"m.{n}.q.lora_{s}.weight": zeros(2, 4) for n in range(2) for s in "A"}
    file |= {f"m.{n}.q.lora_B.weight": zeros(4, 2) for n in range(2)}
    names, weights = {"q": "m.{}.q.weight"}, {"q": jnp.ones((3, 4, 4))}
    write(tmp_path, file, entries())
    with pytest.raises(ValueError, match=says("1 keys are missing", "m.2.q.lora_A.weight")):
        peft.load(tmp_path, weights, names=names, layouts={"q": "io"})
    file |= {"m.2.q.lora_A.weight": zeros(1, 4), "m.2.q.lora_B.weight": zeros(4, 1)}
    write(tmp_path, file, entries(rank_pattern={"2.q": 1}))
    with pytest.raises(ValueError, match=says('"q" is one stacked leaf', '"m.2.q.weight" rank 1')):
        peft.load(tmp_path, weights, names=names, layouts={"q": "io"})
    config = entries(target_modules=["q"], rank_pattern={"2.q": 1})
    with pytest.raises(ValueError, match=says('"q" is one stacked leaf', "Unstack")):
        peft.rules(config, weights, names=names)


def node(**changes):
    parts = {
        "base": jnp.ones((5, 4)),
        "lora_a": jnp.ones((5, 2)),
        "lora_b": jnp.ones((2, 4)),
        "scaling": jnp.float32(2),
        "layout": "io",
    }
    return LoraArray(**{**parts, **changes})


def full(*shape):
    return FullArray(jnp.ones(shape), jnp.ones(shape))


SAVES = {
    "nothing": (base(), SMALL_NAMES, {}, says("nothing in `params` is adapted")),
    "unnamed": (
        {"q": node(), "k": node()},
        {"q": "m.q.weight"},
        {},
        says('"k" is adapted, but `names` gives it no PyTorch name', 'Closest: "q"'),
    ),
    "not_for_the_caller": ({"q": node()}, {"q": "m.q.weight"}, {"r": 3}, says('"r" cannot be set')),
    "init": (
        {"q": node()},
        {"q": "m.q.weight"},
        {"init_lora_weights": "pissa"},
        says("init_lora_weights='pissa' makes PEFT move the base"),
    ),
    "no_json": ({"q": node()}, {"q": "m.q.weight"}, {"revision": {1}}, says("are not JSON")),
    "no_alpha": (
        {"q": node(scaling=jnp.float32("nan"))},
        {"q": "m.q.weight"},
        {},
        says('scalings of "q" are [nan]'),
    ),
    "experts_of_two_alphas": (
        {"q": LoraArray(None, jnp.ones((2, 5, 1)), jnp.ones((2, 1, 4)), jnp.arange(2.0), "io")},
        {"q": "m.e.q"},
        {},
        says('scalings of "q" are [0.0, 1.0]', 'one finite alpha for "m.e.q"'),
    ),
    "half_a_module": (
        {"q": node(), "n": {"scale": full(4), "bias": jnp.ones(4)}},
        {"q": "m.q.weight", "n/scale": "m.n.weight", "n/bias": "m.n.bias"},
        {},
        says('for "m.n" [', "m.n.bias", "must be fully trained too"),
    ),
    "a_module_of_the_same_end": (
        {"q": node(), "a": full(4, 6), "b": jnp.ones((4, 6))},
        {"q": "m.q.weight", "a": "head.weight", "b": "m.head.weight"},
        {},
        says('for "head" [', "m.head"),
    ),
    "some_biases": (
        {"q": node(), "a": full(4), "b": jnp.ones(4), "c": jnp.ones(4)},
        {"q": "m.q.weight", "a": "m.a.bias", "b": "m.b.bias", "c": "m.q.bias"},
        {},
        says("1 of 3 train, and not ['m.b.bias', 'm.q.bias']"),
    ),
    "half_an_attention": (
        {"q": node()},
        {"q": "m.mha.in_proj_weight"},
        {},
        says('both projections of "m.mha" or none', "m.mha.out_proj.weight"),
    ),
    "attention_of_two_ranks": (
        {"q": node(), "o": node(scaling=jnp.float32(1))},
        {"q": "m.mha.in_proj_weight", "o": "m.mha.out_proj.weight"},
        {},
        says('one rank and alpha for "m.mha"'),
    ),
    "a_parameter_of_the_same_end": (
        {"q": node(), "o": jnp.ones((5, 4))},
        {"q": "e.w", "o": "m.e.w"},
        {},
        says('PEFT would adapt "m.e.w" too'),
    ),
    "double": (
        {"q": FullArray(jnp.ones(3), np.ones(3))},
        {"q": "m.q.weight"},
        {},
        says('"base_model.model.m.q.weight" would be of dtype float64'),
    ),
    "half_a_node": (
        {"q": node(lora_b=None)},
        {"q": "m.q.weight"},
        {},
        says('"q" is a part of a LoraArray', "jlora.combine(trainable, frozen)"),
    ),
    "half_a_full_node": (
        {"q": FullArray(jnp.ones(3), None)},
        {"q": "m.q.weight"},
        {},
        says('the value of "q" is taken out', "jlora.combine(trainable, frozen)"),
    ),
    "two_ranks": (
        {"q": node(base=None, lora_b=jnp.ones((3, 4)))},
        {"q": "m.q.weight"},
        {},
        says("needs lora_a (5, 2) and lora_b (2, 4); got (5, 2) and (3, 4)"),
    ),
    "a_window_at_no_end": (
        {"q": node(base=None, lora_a=jnp.ones((3, 3, 4, 2)), layout="iioi")},
        {"q": "m.q.weight"},
        {},
        says("a convolution's kernel [3, 3, 4, 4] with the layout 'iioi'", '"oiii" for OIHW'),
    ),
    "stack_without_braces": (
        {"q": node(base=None, lora_a=jnp.ones((2, 3, 5, 2)), lora_b=jnp.ones((2, 3, 2, 4)))},
        {"q": "m.q.weight"},
        {},
        says("leaves the shape [2, 3, 5, 4]", "needs its {}"),
    ),
}


@pytest.mark.parametrize(("params", "names", "config", "match"), SAVES.values(), ids=SAVES)
def test_save_refuses_and_writes_nothing(tmp_path, params, names, config, match):
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path / "new", params, names=names, **config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("argument", ["kinds", "layouts"])
def test_save_refuses_what_speaks_of_no_leaf(tmp_path, argument):
    params = jlora.attach({"emb": jnp.ones((6, 4))}, {"emb": LoraSpec(2)}, key=jax.random.key(0))
    wrong = {"embb": {"kinds": "embedding", "layouts": "io"}[argument]}
    for tree in (params, jlora.detach(params)[1]):
        with pytest.raises(KeyError, match=says(f'`{argument}` has "embb"', '"emb"')):
            peft.save(tmp_path / "a", tree, names={"emb": "m.emb.weight"}, **{argument: wrong})
    assert not list(tmp_path.iterdir())
