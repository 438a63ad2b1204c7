"""Heads with parts of their own, as RoBERTa's: saved so that PEFT reads them back."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from helpers import says
from live import entries, quiet, randomize
from transformed import SIZES, tree

import jlora
import jlora.peft

CLASSIFIERS = {
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig, "query"),
    "xlm_roberta": (tf.XLMRobertaForSequenceClassification, tf.XLMRobertaConfig, "query"),
    "electra": (tf.ElectraForSequenceClassification, tf.ElectraConfig, "query"),
    "distilbert": (tf.DistilBertForSequenceClassification, tf.DistilBertConfig, "q_lin"),
}


def made(name):
    torch.manual_seed(0)
    kind, sizes, target = CLASSIFIERS[name]
    bert = dict(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    return kind(sizes(**(bert if name == "distilbert" else SIZES), num_labels=3)).eval(), target


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_with_parts_comes_back(tmp_path, compare, name):
    model, target = made(name)
    params, names = tree(model)
    options = dict(r=2, target_modules=[target], task_type="SEQ_CLS")
    wrapped = quiet(peft.get_peft_model, model, peft.LoraConfig(**options)).eval()
    randomize(wrapped)
    quiet(wrapped.save_pretrained, tmp_path / "theirs")
    read = jlora.peft.load(tmp_path / "theirs", params, names=names)
    jlora.peft.save(tmp_path / "ours", read, names=names, task_type="SEQ_CLS")
    saved = entries(tmp_path / "ours")["modules_to_save"]
    assert saved == (["classifier", "pre_classifier"] if name == "distilbert" else ["classifier"])
    again = quiet(peft.PeftModel.from_pretrained, made(name)[0], str(tmp_path / "ours")).eval()
    ids = torch.arange(7)[None] + 2
    compare(again(ids).logits.detach(), wrapped(ids).logits.detach(), name, 1e-6)


def test_a_part_of_a_head_is_refused(tmp_path):
    """PEFT adds "classifier" to what it reads, and dies of a file of classifier.out_proj alone."""
    model, target = made("roberta")
    params, names = tree(model)
    rules = {rf".*{target}/kernel": jlora.LoraSpec(2), "classifier/out_proj/.*": "full"}
    adapted = jlora.attach(params, rules, key=jax.random.key(0))
    match = says('saves all of "classifier"', "fails on", "classifier.dense.bias", "task_type out")
    with pytest.raises(ValueError, match=match):
        jlora.peft.save(tmp_path, adapted, names=names, task_type="SEQ_CLS")
    jlora.peft.save(tmp_path, adapted, names=names)
    assert entries(tmp_path)["modules_to_save"] == ["classifier.out_proj"]
    file = jlora.peft.load(tmp_path, params, names=names)
    assert bool(jnp.array_equal(file["classifier/out_proj/bias"].value, np.zeros(3)))


def test_several_parts_become_the_highest_module(tmp_path):
    """What is saved is named from above: one name for all of a module, however deep it is."""
    params = {k: jnp.ones((4, 4)) for k in ("q", "a/kernel", "b/kernel", "c/kernel", "d/kernel")}
    names = {
        "q": "m.q.weight",
        "a/kernel": "m.head.up.a.weight",
        "b/kernel": "m.head.up.b.weight",
        "c/kernel": "m.head.down.weight",
        "d/kernel": "m.tail.only.weight",
    }
    rules = {"q": jlora.LoraSpec(2), "[abcd]/kernel": "full"}
    adapted = jlora.attach(params, rules, key=jax.random.key(0), layouts={"q": "io"})
    jlora.peft.save(tmp_path, adapted, names=names)
    assert entries(tmp_path)["modules_to_save"] == ["m.head", "m.tail.only"]
    some = {**adapted, "c/kernel": params["c/kernel"]}
    jlora.peft.save(tmp_path, some, names=names)
    assert entries(tmp_path)["modules_to_save"] == ["m.head.up", "m.tail.only"]
