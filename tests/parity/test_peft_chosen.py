"""What a configuration chooses in models of transformers: PEFT's modules, and jlora's rules."""

import warnings

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from live import quiet
from transformed import SIZES, tree

import jlora.peft


def adapted(model):
    """The modules to which PEFT gave A and B, and those that it saves whole."""
    found = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters()]
    lora = {name.rpartition(".lora_A")[0] for name in found if ".lora_A" in name}
    saved = {name.partition(".modules_to_save")[0] for name in found if "modules_to_save" in name}
    return lora, saved


def ours(rules, names):
    modules = {path.replace("\\", ""): rule for path, rule in rules.items()}
    lora = {names[p].rpartition(".")[0] for p, rule in modules.items() if rule != "full"}
    full = {names[p].rpartition(".")[0] for p, rule in modules.items() if rule == "full"}
    return lora, full


def bert(kind):
    return lambda: kind(tf.BertConfig(**SIZES, num_labels=3))


HEADS = {
    "SEQ_CLS": bert(tf.BertForSequenceClassification),
    "TOKEN_CLS": bert(tf.BertForTokenClassification),
    "QUESTION_ANS": bert(tf.BertForQuestionAnswering),
}


# "all-linear" would give the head of the other two A and B as well, and there PEFT fails.
TASKS = [(task, ["query", "value"]) for task in HEADS] + [("SEQ_CLS", "all-linear")]


@pytest.mark.parametrize(("task", "targets"), TASKS)
def test_a_task_has_its_head_trained(task, targets):
    """The configuration that a user writes names no head: PEFT adds it on wrapping the model."""
    model = HEADS[task]()
    params, names = tree(model)
    entries = peft.LoraConfig(target_modules=targets, task_type=task).to_dict()
    assert entries["modules_to_save"] is None
    found = jlora.peft.rules(entries, params, names=names)
    wrapped = quiet(peft.get_peft_model, model, peft.LoraConfig(**entries))
    assert ours(found, names) == adapted(wrapped)


class Mixed(torch.nn.Module):
    """A linear layer among what "all-linear" leaves alone."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(9, 4)
        self.conv1 = torch.nn.Conv1d(4, 5, 3)
        self.router = torch.nn.Module()
        self.router.weight = torch.nn.Parameter(torch.zeros(2, 4))
        self.q_proj = torch.nn.Linear(4, 4)
        self.gated = torch.nn.Linear(4, 6)


MIXED = {
    "embed_tokens/weight": np.zeros((9, 4), np.float32),
    "conv1/kernel": np.zeros((3, 4, 5), np.float32),
    "router/kernel": np.zeros((4, 2), np.float32),
    "q_proj/kernel": np.zeros((4, 4), np.float32),
    "gated/w": np.zeros((4, 6), np.float32),
}
KINDS = {
    "embed_tokens/weight": "embedding",
    "conv1/kernel": "conv",
    "router/kernel": "parameter",
    "gated/w": "linear",
}


def test_all_linear_is_no_embedding_no_convolution_and_no_router():
    config = peft.LoraConfig(target_modules="all-linear")
    entries, names = config.to_dict(), lambda path: path.rpartition("/")[0] + ".weight"
    theirs, _ = adapted(quiet(peft.get_peft_model, Mixed(), config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # with `kinds` there is nothing to say
        found = jlora.peft.rules(entries, MIXED, names=names, kinds=KINDS)
    assert {path.partition("/")[0] for path in found} == theirs == {"q_proj", "gated"}
    with pytest.warns(UserWarning, match="which paths do not tell") as said:
        assert jlora.peft.rules(entries, MIXED, names=names) == found
    for path, kind in KINDS.items():
        assert f'"{path}" is "{kind}"' in str(said[0].message)
    assert "q_proj" not in str(said[0].message)
    other = jlora.peft.rules(entries, MIXED, names=names, kinds=KINDS | {"gated/w": "embedding"})
    assert list(other) == ["q_proj/kernel"]


def test_an_idle_entry_is_passed_over():
    targets = ["q_proj", "v_proj", "query_key_value"]
    config = peft.LoraConfig(target_modules=targets)
    theirs, _ = adapted(quiet(peft.get_peft_model, Mixed(), config))
    names = lambda path: path.rpartition("/")[0] + ".weight"
    with pytest.warns(UserWarning, match=r"\['query_key_value', 'v_proj'\].*choose nothing"):
        found = jlora.peft.rules(config.to_dict(), MIXED, names=names)
    assert {path.partition("/")[0] for path in found} == theirs == {"q_proj"}


@pytest.mark.parametrize("targets", [[], ["v_proj"]])
def test_what_chooses_nothing_is_refused_by_both(targets):
    config = peft.LoraConfig(target_modules=targets)
    entries = config.to_dict()
    with pytest.raises(ValueError, match=r"No `target_modules` passed|not found in the base model"):
        quiet(peft.get_peft_model, Mixed(), config)
    with pytest.raises(ValueError, match=r"is empty|choose nothing"):
        jlora.peft.rules(entries, MIXED, names=lambda path: path.rpartition("/")[0] + ".weight")
