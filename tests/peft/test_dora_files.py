"""DoRA's magnitudes and biases of lora_B in PEFT's files: round trips, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import says
from peft_cases import (
    KEY,
    LAYOUTS,
    NAMES,
    SMALL_NAMES,
    base,
    config,
    entries,
    keys,
    load,
    model,
    same,
    tensors,
    write,
    zeros,
)

import jlora
from jlora import LoraSpec, peft

LAYERS = {"dense", "torch", "query", "out", "gemma", "conv", "embed", "layers"}
BIASES = {path: "full" for path in ("dense/bias", "query/bias")}


def small(**spec):
    """An adapter whose every trained part has moved."""
    params = jlora.attach(base(), {".*kernel": LoraSpec(2, 3, **spec), "q/bias": "full"}, key=KEY)
    trainable, frozen = jlora.partition(params)
    return jlora.combine(jax.tree.map(lambda x: x + 0.25, trainable), frozen)


def magnitudes(**changes):
    ends = {"q": 4, "k": 3}
    given = {f"m__{m}_proj__lora_magnitude_vector": np.ones(n, np.float32) for m, n in ends.items()}
    return tensors(**given | changes)


def test_every_layer_comes_back_bit_for_bit(tmp_path):
    """A stack, heads, convolutions either way around, an embedding, another dtype."""
    inside = {k: v for k, v in model().items() if k in LAYERS}
    names = {path: name for path, name in NAMES.items() if path.partition("/")[0] in LAYERS}
    rules = {
        **BIASES,
        "torch": LoraSpec(2, dora=True, layout="oi", dtype=jnp.bfloat16),
        "layers.*": LoraSpec(2, dora=True, layout="io"),
        ".*": LoraSpec(2, dora=True),
    }
    params = jlora.attach(inside, rules, key=KEY, layouts=LAYOUTS)
    peft.save(tmp_path, params, names=names)
    assert config(tmp_path)["use_dora"] is True
    shapes = {k: tuple(v["shape"]) for k, v in keys(tmp_path) if k.endswith("magnitude_vector")}
    shapes = {
        k.split(".", 3)[3].removesuffix(".lora_magnitude_vector"): s for k, s in shapes.items()
    }
    assert shapes == {
        **{"dense": (7,), "torch": (7,), "q_proj": (6,), "o_proj": (6,), "k_proj": (6,)},
        **{"conv": (1, 8, 1, 1), "oihw": (1, 8, 1, 1), "embed": (6,)},
        **{f"layers.{n}.fc": (4,) for n in range(3)},
    }
    base = jlora.detach(params)[0]
    again = peft.load(tmp_path, base, names=names, layouts=LAYOUTS, dtype=None)
    same(again, params)


def test_slices_are_written_whole_and_keep_their_magnitude(tmp_path):
    params = jlora.attach(
        {"w": jnp.ones((5, 9))}, {"w": LoraSpec(2, dora=True, slices=((0, 3), (6, 9)))}, key=KEY
    )
    peft.save(tmp_path, params, names={"w": "m.w.weight"})
    again = peft.load(tmp_path, {"w": jnp.ones((5, 9))}, names={"w": "m.w.weight"})
    assert (
        jnp.array_equal(again["w"].extra["magnitude"], params["w"].extra["magnitude"])
        and again["w"].rank == 4
    )


def test_the_older_spelling_of_the_key(tmp_path):
    file = {k + (".weight" if "magnitude" in k else ""): x for k, x in magnitudes().items()}
    write(tmp_path, file, entries(use_dora=True))
    assert jnp.array_equal(load(tmp_path)["q"]["kernel"].extra["magnitude"], jnp.ones(4))


def test_a_bias_of_lora_b_is_a_part_of_the_layers(tmp_path):
    b = np.arange(4, dtype=np.float32)
    file = tensors(
        m__q_proj__lora_B__bias=b, m__k_proj__lora_A__weight=None, m__k_proj__lora_B__weight=None
    )
    write(tmp_path, file, entries(lora_bias=True))
    params = load(tmp_path)
    np.testing.assert_array_equal(params["q"]["bias"].value, 1 + 1.5 * b)
    assert not hasattr(params["k"]["kernel"], "lora_a")
    names = {k: v for k, v in SMALL_NAMES.items() if k != "k/kernel"}
    peft.save(tmp_path / "again", params, names=names, lora_bias=True)
    assert config(tmp_path / "again")["lora_bias"] and config(tmp_path / "again")["bias"] == "none"
    same(peft.load(tmp_path / "again", base(), names=names), params)


def test_biases_of_a_stack_and_of_heads(tmp_path):
    tree = {
        "layers": {"kernel": jnp.ones((3, 5, 4)), "bias": jnp.ones((3, 4))},
        "query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))},
    }
    names = {
        "layers/kernel": "m.{}.fc.weight",
        "layers/bias": "m.{}.fc.bias",
        "query/kernel": "m.q.weight",
        "query/bias": "m.q.bias",
    }
    layouts = {"layers/kernel": "io", "query/kernel": "ioo"}
    rules = {".*kernel": LoraSpec(2, 4), ".*bias": "full"}
    params = jlora.attach(tree, rules, key=KEY, layouts=layouts)

    def move(node):
        if not isinstance(node, jlora.FullArray):
            return node
        steps = jnp.arange(1.0, 1 + node.value.size).reshape(node.shape)
        return dataclasses.replace(node, value=node.value + steps)

    def is_node(x):
        return isinstance(x, jlora.FullArray | jlora.LoraArray)

    moved = jax.tree.map(move, params, is_leaf=is_node)
    peft.save(tmp_path, moved, names=names, lora_bias=True)
    stored = {k: tuple(v["shape"]) for k, v in keys(tmp_path) if k.endswith("lora_B.bias")}
    assert sorted(stored.values()) == [(4,), (4,), (4,), (6,)]
    same(peft.load(tmp_path, tree, names=names, layouts=layouts), moved)


def test_the_rules_of_both(tmp_path):
    params = {"q": base()["q"]}
    names = {k: v for k, v in SMALL_NAMES.items() if k != "k/kernel"}
    dora = peft.rules(entries(target_modules=["q_proj"], use_dora=True), params, names=names)
    assert dora["q/kernel"].dora is True and list(dora) == ["q/kernel"]
    biased = peft.rules(entries(target_modules=["q_proj"], lora_bias=True), params, names=names)
    assert biased["q/bias"] == "full" and biased["q/kernel"].dora is False
    with pytest.raises(
        ValueError, match=says('lora_B of "m.k_proj" has a bias', '"m.k_proj.bias"')
    ):
        peft.rules(entries(target_modules=["k_proj"], lora_bias=True), base(), names=SMALL_NAMES)
    experts, names = {"w": jnp.ones((4, 5, 6))}, {"w": "m.experts.w"}
    with pytest.raises(ValueError, match=says("PEFT has no DoRA", "a parameter", '"m.experts.w"')):
        peft.rules(entries(target_parameters=["w"], use_dora=True), experts, names=names)


FILES = {
    "missing": (
        magnitudes(m__k_proj__lora_magnitude_vector=None),
        {"use_dora": True},
        says("1 keys are missing", "m.k_proj.lora_magnitude_vector"),
    ),
    "misshaped": (
        magnitudes(m__k_proj__lora_magnitude_vector=zeros(5)),
        {"use_dora": True},
        says("another shape", 'm.k_proj.lora_magnitude_vector" [5], where "k/kernel" needs [3]'),
    ),
    "alone": (
        tensors(m__v_proj__lora_magnitude_vector=zeros(4)),
        {},
        says("1 keys are unexpected", "m.v_proj.lora_magnitude_vector"),
    ),
    "bias_missing": (
        tensors(),
        {"lora_bias": True},
        says("2 keys are missing", "q_proj.lora_B.bias"),
    ),
    "bias_of_another_shape": (
        tensors(
            m__q_proj__lora_B__bias=zeros(3),
            m__k_proj__lora_A__weight=None,
            m__k_proj__lora_B__weight=None,
        ),
        {"lora_bias": True},
        says('m.q_proj.lora_B.bias" [3], where "q/bias" needs [4]'),
    ),
    "no_bias": (
        tensors(m__q_proj__lora_B__bias=zeros(4), m__k_proj__lora_B__bias=zeros(3)),
        {"lora_bias": True},
        says('lora_B of "m.k_proj" has a bias', 'names no "m.k_proj.bias"', "cannot merge"),
    ),
    "both": (
        magnitudes(m__q_proj__lora_B__bias=zeros(4), m__k_proj__lora_B__bias=zeros(3)),
        {"lora_bias": True, "use_dora": True},
        says("PEFT has no lora_bias=True together with use_dora=True"),
    ),
    "dora_kind": (tensors(), {"use_dora": "yes"}, says("use_dora is 'yes'", "true or false")),
    "bias_kind": (tensors(), {"lora_bias": "yes"}, says("lora_bias is 'yes'", "true or false")),
}


@pytest.mark.parametrize(("file", "more", "match"), FILES.values(), ids=FILES)
def test_a_file_is_refused(tmp_path, file, more, match):
    write(tmp_path, file, entries(**more))
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


def no_original():
    params = small()
    return {
        **params,
        "q": {**params["q"], "bias": dataclasses.replace(params["q"]["bias"], base=None)},
    }


def unscaled():
    params = small()
    node = dataclasses.replace(params["q"]["kernel"], scaling=jnp.zeros(()))
    return {"q": {**params["q"], "kernel": node}, "k": base()["k"]}


def of_q(params):
    return {**params, "k": base()["k"]}


def half():
    plain, dora = small(), small(dora=True)
    return {"q": plain["q"], "k": dora["k"]}


UNFIT = {
    "half": (half, {}, says("in all adapted layers or in none", "1 of 2", '"q/kernel"')),
    "no_bias": (small, {"lora_bias": True}, says('lora_B of "m.k_proj" has a bias')),
    "no_original": (
        lambda: of_q(no_original()),
        {"lora_bias": True},
        says('the bias of "m.q_proj"', '"q/bias" is not trained with its original kept'),
    ),
    "frozen": (
        lambda: of_q({"q": {**small()["q"], "bias": jnp.ones(4)}}),
        {"lora_bias": True},
        says('"q/bias" is not trained with its original kept', "jlora.bind(base, adapter)"),
    ),
    "unscaled": (unscaled, {"lora_bias": True}, says("but its scaling is 0")),
    "both": (
        lambda: of_q(small(dora=True)),
        {"lora_bias": True},
        says("PEFT has no lora_bias=True together with use_dora=True"),
    ),
    "init": (
        lambda: of_q(small()),
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        says("PEFT has no lora_bias=True together with init_lora_weights='gaussian'"),
    ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize(("params", "more", "match"), UNFIT.values(), ids=UNFIT)
def test_saving_is_refused_and_nothing_written(tmp_path, params, more, match):
    with pytest.raises(ValueError, match=match):
        peft.save(tmp_path / "a", params(), names=SMALL_NAMES, **more)
    assert not (tmp_path / "a").exists()


def test_a_bias_of_an_embedding(tmp_path):
    params = jlora.attach(
        {"embedding": jnp.ones((5, 4)), "bias": jnp.ones(4)},
        {"embedding": LoraSpec(2), "bias": "full"},
        key=KEY,
    )
    names = {"embedding": "m.e.weight", "bias": "m.e.bias"}
    with pytest.raises(ValueError, match=says("PEFT trains no bias of lora_B", "an embedding")):
        peft.save(tmp_path / "a", params, names=names, lora_bias=True)
