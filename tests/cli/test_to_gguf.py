"""`jlora quantize FOLDER OUT --format q4_1`: the GGUF model of a Hugging Face folder."""

import json

import gguf
import gguf_file
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
import weights
from checkpoints import run
from tiny_gguf import write_gguf
from tiny_llama import TINY, byte_tokenizer, tiny_tensors
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import jlora

ENTRIES = {**TINY, "intermediate_size": 64}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = "It's 1234  naïve\n\n x12 don't<end>12"


def tokenizer_of(kind):
    """Byte-level BPE of 256 bytes and a merge, "12", which cuts text as llama.cpp's `kind`."""
    vocab = {token: n for n, token in enumerate([*BYTES, "<end>", "12"])}
    made = Tokenizer(models.BPE(vocab, [("1", "2")], ignore_merges=kind == "llama-bpe"))
    cuts = gguf_file.SPLITS[kind]
    words = not any(isinstance(cut, pre_tokenizers.Split) for cut in cuts)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if cuts else last
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    made.add_special_tokens(["<end>"])
    return made


def folder_of(folder, entries=ENTRIES, tokenizer=None, **tensors):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entries))
    found = tiny_tensors({**ENTRIES, "tie_word_embeddings": entries["tie_word_embeddings"]}) | {
        k.replace("__", "."): x for k, x in tensors.items()
    }
    safetensors.numpy.save_file(
        {k: x for k, x in found.items() if x is not None}, folder / "model.safetensors"
    )
    (tokenizer or tokenizer_of("gpt-2")).save(str(folder / "tokenizer.json"))
    return folder


def test_is_what_the_converter_writes(tmp_path, capsys, monkeypatch):
    """Every matrix and entry, q and k in llama.cpp's order; the embedding keeps its dtype."""
    monkeypatch.setattr("jlora.gguf._convert._CHUNK", 32 * 5)
    folder = folder_of(tmp_path / "model")
    words = ["quantize", folder, tmp_path / "out.gguf", "--format", "q4_1", "--json"]
    run(*words, "--dry-run")
    assert not (tmp_path / "out.gguf").exists()
    run(*words)
    said = json.loads(capsys.readouterr().out.rpartition("}\n{")[2].join(["{", ""]))
    assert said["quantized"] == 14 and said["unchanged"] == 7
    ours, want = map(gguf.GGUFReader, (tmp_path / "out.gguf", write_gguf(tmp_path / "w", ENTRIES)))
    by_name = {x.name: x for x in ours.tensors}
    assert len(by_name) == len(want.tensors)
    for y in want.tensors:
        x = by_name[y.name]
        assert list(x.shape) == list(y.shape)
        if x.name not in ("token_embd.weight", "output.weight"):
            np.testing.assert_array_equal(x.data, y.data)
            assert x.tensor_type == y.tensor_type
    raw = tiny_tensors(ENTRIES)
    embedding = by_name["token_embd.weight"].data
    np.testing.assert_array_equal(embedding, raw["model.embed_tokens.weight"])
    a, b = ({k: f.contents() for k, f in r.fields.items()} for r in (ours, want))
    differ = {k for k in b if a[k] != b[k]}
    assert differ == {"GGUF.kv_count", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
    assert a["tokenizer.ggml.tokens"][256:] == [
        "<end>",
        "12",
        *(f"[PAD{n}]" for n in range(258, 264)),
    ]
    assert a["tokenizer.ggml.token_type"][256:] == [3, 1] + [5] * 6 and a["general.file_type"] == 3
    run(*words, code=2)
    assert "exists. Give another file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", gguf_file.SPLITS)
def test_tokens_are_those_of_the_folder(tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    folder = folder_of(tmp_path / "model", tokenizer=tokenizer)
    run("quantize", folder, tmp_path / "m.gguf", "--format", "q4_1")
    fields, _ = gguf_file.open_gguf(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.pre"] == kind
    read = gguf_file.gguf_tokenizer(tmp_path / "m.gguf", fields)
    assert read.encode(TEXT).ids == tokenizer.encode(TEXT).ids


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 48, "rope_theta": 5000.0}


@pytest.mark.parametrize("case", ["llama3", "linear", "qwen2", "qwen3", "tied"])
def test_models(tmp_path, case):
    """Rotary positions, biases and norms are in the file, and a tied head is not."""
    entries, more, d = dict(ENTRIES), {}, 8
    if case == "llama3":
        entries["rope_parameters"] = LLAMA3
    if case == "linear":
        entries["rope_scaling"] = {"type": "linear", "factor": 2.0}
    if case == "tied":
        more["lm_head__weight"] = tiny_tensors(ENTRIES)["model.embed_tokens.weight"]
        entries["tie_word_embeddings"] = True
    if case in ("qwen2", "qwen3"):
        entries |= {"model_type": case, "tie_word_embeddings": True, "head_dim": d}
    for n in range(2):
        at = f"model__layers__{n}__self_attn__"
        if case == "qwen2":
            more |= {
                f"{at}{x}_proj__bias": np.arange(s, dtype=np.float16)
                for x, s in (("q", 32), ("k", 16), ("v", 16))
            }
        if case == "qwen3":
            more |= {f"{at}{x}_norm__weight": np.ones(d, jnp.bfloat16) for x in "qk"}
    folder = folder_of(tmp_path / "model", entries, **more)
    run("quantize", folder, tmp_path / "m.gguf", "--format", "q4_1")
    config, params, _, _ = weights.load(str(tmp_path / "m.gguf"))
    found = jlora.gguf.read(tmp_path / "m.gguf")
    assert params and config.tied == (case in ("qwen2", "qwen3", "tied"))
    if case == "llama3":
        of = transformers.LlamaConfig(**entries, head_dim=d)
        plain = 5000.0 ** -(np.arange(0, d, 2) / d)
        want = plain / ROPE_INIT_FUNCTIONS["llama3"](of, None)[0].numpy()
        np.testing.assert_allclose(found["rope_freqs.weight"], want, rtol=1e-6)
        assert want[0] == 1 and 1.1 < want[1] < 3.9 and 3.99 < want[3] < 4.01
    if case == "linear":
        assert config.rope_scaling.factor == 2
    if case == "qwen2":
        np.testing.assert_array_equal(found["blk.1.attn_q.bias"], np.arange(32, dtype=np.float32))
    if case == "qwen3":
        assert found["blk.0.attn_q_norm.weight"].dtype == np.float32


BROKEN = {
    "kind": ({"model_type": "mamba"}, {}, "the model_type 'mamba' is none of llama, qwen2, qwen3"),
    "size": ({"hidden_size": "32"}, {}, "config.json has hidden_size '32', not a size"),
    "head": ({"head_dim": 0}, {}, "config.json has head_dim 0, not a size"),
    "number": ({"rope_theta": "x"}, {}, "config.json has rope_theta 'x', not a number"),
    "act": ({"hidden_act": "gelu"}, {}, "config.json has hidden_act 'gelu'"),
    "rope": ({"rope_scaling": {"type": "yarn"}}, {}, "has the rotary positions"),
    "rope_number": ({"rope_scaling": {"type": "linear"}}, {}, "has the rotary positions"),
    "rope_list": ({"rope_scaling": [1]}, {}, "has the rotary positions [1]"),
    "heads": ({"num_attention_heads": 5}, {}, "which 5 heads do not divide"),
    "extra": ({}, {"model__x__weight": np.ones(2)}, '"model.x.weight" is no tensor of llama'),
    "lacks": ({}, {"model__norm__weight": None}, 'BASE has no "model.norm.weight"'),
    "codes": ({}, {"lm_head__weight": np.ones((264, 32), np.int8)}, "is I8[264, 32]; a weight has"),
    "eos": ({"eos_token_id": None}, {}, "says the token that ends text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused(tmp_path, capsys, case):
    entries, tensors, said = BROKEN[case]
    folder = folder_of(tmp_path / "m", {**ENTRIES, **entries}, **tensors)
    run("quantize", folder, tmp_path / "o", "--format", "q4_1", code=2)
    err = capsys.readouterr().err
    assert err.startswith("error: `jlora quantize BASE OUT") and said in err
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


TOKENIZERS = {
    "missing": (None, "and llama.cpp needs its tokens"),
    "not_json": (lambda x: "{", "is not a tokenizer of Hugging Face"),
    "a_list": (lambda x: "[]", "is not a tokenizer of Hugging Face"),
    "merges": (lambda x: byte_tokenizer().to_str(), "has no merges, which llama.cpp requires"),
    "number": (lambda x: x.replace('"12":257', '"12":999'), 'the token "12" has the number 999'),
    "prefix": (lambda x: x.replace('prefix_space":false', 'prefix_space":true'), "cuts text as"),
    "normalizer": (
        lambda x: x.replace('"normalizer":null', '"normalizer":{"type":"NFC"}'),
        "this tokenizer is none of byte-level BPE",
    ),
    "fallback": (lambda x: x.replace('fallback":false', 'fallback":true'), "cuts text as"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_refused_tokenizers(tmp_path, capsys, case):
    change, said = TOKENIZERS[case]
    folder = folder_of(tmp_path / "m")
    file = folder / "tokenizer.json"
    if change is None:
        file.unlink()
    else:
        text = json.dumps(json.loads(file.read_text()), separators=(",", ":"))
        assert change(text) != text
        file.write_text(change(text))
    run("quantize", folder, tmp_path / "o", "--format", "q4_1", code=2)
    assert said in capsys.readouterr().err and [f.name for f in tmp_path.iterdir()] == ["m"]
