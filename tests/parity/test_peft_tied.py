"""Models whose head is their embedding, and rows of it that train: PEFT's merged weights."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from helpers import says
from live import entries, quiet
from safetensors.torch import load_file
from transformed import SIZES, tree

import jlora
import jlora.peft

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(tied=True):
    torch.manual_seed(0)
    sizes = SIZES | dict(num_hidden_layers=1)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=tied))


def written(folder, tied=True, targets=("q_proj",), **options):
    """Write an adapter of PEFT's with random numbers; return PEFT's merged embedding and head."""
    chosen = peft.LoraConfig(r=2, target_modules=list(targets), **options)
    model = quiet(peft.get_peft_model, llama(tied), chosen)
    generator = torch.Generator().manual_seed(1)
    parts = ("lora_", "modules_to_save", "trainable_tokens")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in parts):
                p.copy_(torch.randn(p.shape, generator=generator) / 5)
    quiet(model.save_pretrained, folder)
    merged = quiet(peft.PeftModel.from_pretrained, llama(tied), str(folder))
    merged = quiet(merged.merge_and_unload)
    found = dict(merged.named_parameters(remove_duplicate=False))
    return found[EMBED].detach().numpy(), found[HEAD].detach().numpy()


def ours(folder, tied=True, **more):
    params, names = tree(llama(tied))
    return jlora.peft.load(folder, params, names=names, **more), names


SAVED = [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]]


@pytest.mark.parametrize("saved", SAVED)
def test_a_head_that_stays_tied(tmp_path, saved):
    embed, head = written(tmp_path, modules_to_save=list(saved), ensure_weight_tying=True)
    assert np.array_equal(embed, head) and HEAD in str(load_file(tmp_path / FILE).keys())
    params, _ = ours(tmp_path)
    np.testing.assert_array_equal(jlora.merge(params)["model/embed_tokens/embedding"], embed)


FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_adapters_that_stay_tied(tmp_path, compare, targets):
    """PEFT's merge adds the update to the one weight twice: for the embedding and for the head."""
    options = dict(targets=["q_proj", *targets], ensure_weight_tying=True)
    merged, _ = written(tmp_path, **options)
    assert any("lm_head.lora_A" in key for key in load_file(tmp_path / FILE))
    model = quiet(peft.PeftModel.from_pretrained, llama(), str(tmp_path)).base_model.model
    with torch.no_grad():
        embed = model.model.embed_tokens(torch.arange(SIZES["vocab_size"])).numpy()
        head = model.lm_head(torch.eye(SIZES["hidden_size"])).numpy().T
    params, _ = ours(tmp_path)
    table = jlora.merge(params)["model/embed_tokens/embedding"]
    compare(table, embed, "the rows that PEFT looks up", 1e-6)
    compare(table, head, "the rows of PEFT's head", 1e-6)
    compare(embed + (embed - llama().lm_head.weight.detach().numpy()), merged, "twice", 1e-6)


def test_a_saved_embedding_is_the_head_too(tmp_path):
    """PEFT's head keeps the old rows. Here the two are one leaf, and both change."""
    embed, head = written(tmp_path, modules_to_save=["embed_tokens"])
    old = llama().model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(head, old) and np.abs(embed - old).max() > 0.1
    params, _ = ours(tmp_path)
    merged = jlora.merge(params)["model/embed_tokens/embedding"]  # what the head reads as well
    np.testing.assert_array_equal(merged, embed)
    params, names = tree(llama())
    untied = {**params, "lm_head/kernel": jnp.asarray(old.T)}
    names = {**names, "lm_head/kernel": HEAD}
    merged = jlora.merge(jlora.peft.load(tmp_path, untied, names=names))
    np.testing.assert_array_equal(merged["model/embed_tokens/embedding"], embed)
    np.testing.assert_array_equal(merged["lm_head/kernel"].T, head)


@pytest.mark.parametrize("saved", SAVED[1:])
def test_a_head_of_other_weights_needs_a_leaf(tmp_path, saved):
    """Google's recipe for Gemma saves both, and they differ."""
    embed, head = written(tmp_path, modules_to_save=list(saved))
    assert np.abs(embed - head).max() > 0.1
    match = says(HEAD, "has the shape of", "gives the head other weights", "a leaf of its own")
    with pytest.raises(ValueError, match=match):
        ours(tmp_path)
    params, names = tree(llama())
    old = params["model/embed_tokens/embedding"]
    merged = jlora.merge(
        jlora.peft.load(
            tmp_path,
            {**params, "lm_head/kernel": old.T},
            names={**names, "lm_head/kernel": HEAD},
        )
    )
    np.testing.assert_array_equal(merged["lm_head/kernel"].T, head)
    np.testing.assert_array_equal(merged["model/embed_tokens/embedding"], embed)


TOKENS = {
    "list": ([3, 1, 7], True),
    "list_untied": ([3, 1, 7], False),
    "by_name": ({"embed_tokens": [3]}, True),
    "both": ({"embed_tokens": [3, 0], "lm_head": [4]}, False),
    "both_tied": ({"embed_tokens": [3, 0], "lm_head": [3, 0]}, True),
    "head": ({"lm_head": [5, 2]}, False),
}


@pytest.mark.parametrize(("indices", "tied"), TOKENS.values(), ids=TOKENS)
def test_rows_of_an_embedding(tmp_path, indices, tied):
    there, back = tmp_path / "there", tmp_path / "back"
    embed, head = written(there, tied, trainable_token_indices=indices)
    params, names = ours(there, tied)
    merged = jlora.merge(params)
    np.testing.assert_array_equal(merged["model/embed_tokens/embedding"], embed)
    if tied:
        np.testing.assert_array_equal(head, embed)  # one leaf here
    else:
        np.testing.assert_array_equal(merged["lm_head/kernel"].T, head)

    said = {"embed_tokens": [3, 0]} if indices == TOKENS["both_tied"][0] else indices
    jlora.peft.save(back, params, names=names, trainable_token_indices=said)
    first, second = (load_file(folder / FILE) for folder in (there, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert entries(back)["modules_to_save"] is None
    quiet(peft.PeftModel.from_pretrained, llama(tied), str(back))


def test_rows_that_do_not_fit(tmp_path):
    written(tmp_path, trainable_token_indices=[3, 1])
    file = tmp_path / "adapter_config.json"
    text = file.read_text()
    flat = text.replace("\n", "").replace(" ", "")
    for odd, match in (("[3,40]", "has 40 rows here"), ("[3,3]", "and once")):
        file.write_text(flat.replace("[3,1]", odd))
        with pytest.raises(ValueError, match=match):
            ours(tmp_path)
    for odd, match in (
        ("[3]", r"\[2, 16\], where .* needs \[1, 16\]"),
        ('"x"', "list of integers"),
    ):
        file.write_text(flat.replace("[3,1]", odd))
        with pytest.raises(ValueError, match=match):
            ours(tmp_path)
    file.write_text(text)
    params, names = tree(llama())
    names = {path: name for path, name in names.items() if name != EMBED}
    with pytest.raises(ValueError, match=r"1 keys are unexpected: .*trainable_tokens_delta"):
        jlora.peft.load(tmp_path, params, names=names)
    with pytest.raises(ValueError, match="trains some rows of an embedding, and a rule all of it"):
        jlora.peft.rules(tmp_path, params, names=names)


def test_rows_are_written_alone_where_only_they_changed(tmp_path):
    written(tmp_path, trainable_token_indices=[3, 1])
    params, names = ours(tmp_path)
    for odd in ([3], {"embed_tokens": [1]}):
        with pytest.raises(ValueError, match="and others have too"):
            jlora.peft.save(tmp_path / "x", params, names=names, trainable_token_indices=odd)
    adapter = jlora.detach(params)[1]
    with pytest.raises(ValueError, match=r"original is not here.*`jlora.bind"):
        jlora.peft.save(tmp_path / "x", adapter, names=names, trainable_token_indices=[3, 1])
    with pytest.raises(ValueError, match="names other embeddings than those"):
        odd = {"lm_head": [3]}
        jlora.peft.save(tmp_path / "x", params, names=names, trainable_token_indices=odd)
    jlora.peft.save(tmp_path / "x", params, names=names)
    assert entries(tmp_path / "x")["modules_to_save"] == ["model.embed_tokens"]
