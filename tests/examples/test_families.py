"""Every family that the examples read, against transformers: logits, generation, PEFT, refusals."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import families
import jax
import llama
import numpy as np
import param_tree
import peft
import pytest
import rope
import torch
import transformers
import weights
from merged import write_merged
from tiny_llama import byte_tokenizer

import jlora

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "initializer_range": 0.3,
    "rms_norm_eps": 0.01,
}
LENGTH = 24  # beyond the windows and the original contexts below
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]}
GEMMA = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 11}
# model_type and what its configuration has besides SIZES.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama3": (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "rope_theta": 50.0},
    ),
    "llama_linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama_dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    ),
    "mistral": ("mistral", {"sliding_window": 6, "head_dim": 8}),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2_yarn": ("qwen2", {"rope_scaling": YARN, "rope_theta": 100.0}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_yarn": ("qwen3", {"head_dim": 8, "rope_scaling": {**YARN, "attention_factor": 1.3}}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        {**GEMMA, "sliding_window_pattern": 2, "rope_local_base_freq": 30.0, "rope_theta": 200.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": ("phi3", {"sliding_window": 6, "original_max_position_embeddings": 64}),
    "phi3_long": (
        "phi3",
        {"hidden_size": 32, "partial_rotary_factor": 0.75, "rope_scaling": LONG}
        | {"original_max_position_embeddings": 16},
    ),
    "phi3_short": (
        "phi3",
        {"hidden_size": 32, "partial_rotary_factor": 0.75, "rope_scaling": LONG}
        | {"original_max_position_embeddings": 32, "tie_word_embeddings": True},
    ),
}


class Case(NamedTuple):
    """A family's tiny random model, in transformers and here."""

    folder: Path
    theirs: Any
    config: llama.Config
    params: Any


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, more = CASES[request.param]
    return make(tmp_path_factory.mktemp("family"), kind, more)


def in_ci(*names: str) -> pytest.MarkDecorator:
    """All cases, but only those of these names outside the nightly run."""
    marks = lambda name: () if name in names else pytest.mark.nightly
    cases = [pytest.param(name, marks=marks(name)) for name in CASES]
    return pytest.mark.parametrize("case", cases, indirect=True)


def make(folder: Path, kind: str, more: dict[str, Any], shard: str = "1GB") -> Case:
    """Write the model as transformers does, with random biases and norms, and read it here."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SIZES, **more}))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs = theirs.eval()
    with torch.no_grad():
        for x in theirs.parameters():
            if x.ndim == 1:
                x.add_(torch.randn_like(x) * 0.3)
        if config.tie_word_embeddings:  # or the largest logit is that of the last token
            theirs.get_input_embeddings().weight.mul_(0.25)
    theirs.save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return Case(folder, theirs, *weights.load(str(folder))[:2])


def tokens_of(length: int = LENGTH, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 256, (rows, length)).astype(np.int32)


def theirs_on(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), use_cache=False).logits.numpy()


def apply_of(config: llama.Config) -> Any:
    return lambda params, *args: llama.Llama(config).apply({"params": params}, *args)


def close(ours: Any, theirs: np.ndarray) -> bool:
    """To 1e-5 of the largest logit."""
    return float(np.abs(np.asarray(ours) - theirs).max()) < 1e-5 * float(np.abs(theirs).max())


def test_logits_are_those_of_transformers(case: Case) -> None:
    tokens = tokens_of()
    want = theirs_on(case.theirs, tokens)
    assert want.std() > 0.1
    assert close(jax.jit(apply_of(case.config))(case.params, tokens), want)


# These are in the shapes and the names of the weights.
SHAPES = {"vocab", "width", "hidden", "layers", "heads", "kv_heads", "head_dim", "context"}
SHAPES |= {"tied", "fused", "post_norms"}


@pytest.mark.nightly
def test_every_option_changes_the_logits(case: Case) -> None:
    """So the test above would fail if one of them were ignored."""
    plain, tokens = {x.name: x.default for x in dataclasses.fields(llama.Config)}, tokens_of()
    want = theirs_on(case.theirs, tokens)
    for name, value in vars(case.config).items():
        if name in SHAPES or value == plain[name]:
            continue
        change = {name: plain[name]}
        if name == "rope_width":
            change["rope_scaling"] = None  # which has a number for each pair
        config = dataclasses.replace(case.config, **change)
        assert not close(jax.jit(apply_of(config))(case.params, tokens), want), name
    if case.config.window is not None:
        config = dataclasses.replace(case.config, window=case.config.window + 1)
        assert not close(jax.jit(apply_of(config))(case.params, tokens), want)


@in_ci("gemma3", "phi3_long", "smollm3")
def test_generated_tokens_are_the_largest_logits_of_the_full_text(case: Case) -> None:
    """With a cache; the text exceeds windows and original contexts while it is generated."""
    prompts = tokens_of()[:, : LENGTH - 6]
    ones, apply = np.ones_like(prompts), apply_of(case.config)

    @jax.jit
    def run(params: Any) -> tuple[Any, Any]:
        said = llama.generate(apply, case.config, params, prompts, ones, steps=6, stop=-1)
        return said, apply(params, jax.numpy.concatenate([prompts, said], axis=1))

    said, logits = map(np.asarray, run(case.params))
    assert len(np.unique(said)) > 2
    np.testing.assert_array_equal(said, logits[:, LENGTH - 7 : -1].argmax(-1))


def adapted(case: Case) -> Any:
    """The parameters with a random adapter on every projection."""
    rules = {r".*_proj/kernel": jlora.LoraSpec(rank=2, alpha=3)}
    params = jlora.attach(case.params, rules, key=jax.random.key(0))
    draw = np.random.default_rng(1)
    new = lambda x: jax.numpy.asarray(draw.normal(size=x.shape, scale=0.2), x.dtype)
    trainable, frozen = jlora.partition(params)
    return jlora.combine(jax.tree.map(new, trainable), frozen)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@in_ci("gemma2", "phi3_long")
def test_adapters_to_and_from_peft(case: Case, tmp_path: Path) -> None:
    """And the merged model, as transformers loads it."""
    params, tokens, names = adapted(case), tokens_of(), jlora.peft.llama_names
    ours = jax.jit(jlora.lora(apply_of(case.config)))(params, tokens)
    jlora.peft.save(tmp_path / "ours", params, names=names, task_type="CAUSAL_LM")
    kind = type(case.theirs)
    load = lambda folder: kind.from_pretrained(folder, attn_implementation="eager").eval()
    theirs = peft.PeftModel.from_pretrained(load(case.folder), str(tmp_path / "ours")).eval()
    want = theirs_on(theirs, tokens)
    assert not close(want, theirs_on(case.theirs, tokens)) and close(ours, want)

    theirs.save_pretrained(tmp_path / "theirs")
    again = jlora.peft.load(tmp_path / "theirs", case.params, names=names)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    write_merged(tmp_path / "merged", case.folder, case.config, params)
    assert close(ours, theirs_on(load(tmp_path / "merged"), tokens))


@pytest.mark.nightly
@in_ci("gemma3")
def test_scanned_layers_equal_unrolled_ones(case: Case) -> None:
    """Also in the loss, by rows of logits; and generation with a stacked cache."""
    config = dataclasses.replace(case.config, scan=True, remat=True, chunk=7)
    scanned = param_tree.stacked(jax.tree.map(lambda x: x, case.params), config.layers)
    tokens, at = tokens_of(), np.arange(2 * LENGTH, dtype=np.int32)
    target = np.roll(tokens, -1, axis=1).reshape(-1)

    @jax.jit
    def run(params: Any, scanned: Any) -> Any:
        prompts, ones = tokens[:, :18], np.ones((2, 18), np.int32)
        said = [
            llama.generate(apply_of(c), c, p, prompts, ones, steps=6, stop=-1)
            for c, p in ((case.config, params), (config, scanned))
        ]
        logits = apply_of(case.config)(params, tokens)
        losses = apply_of(config)(scanned, tokens, None, None, None, at, target)
        return logits, apply_of(config)(scanned, tokens), losses, *said

    logits, again, losses, *said = map(np.asarray, run(case.params, scanned))
    assert close(again, logits)
    want = llama.cross_entropy(jax.numpy.asarray(logits.reshape(2 * LENGTH, -1)), target)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_array_equal(*said)


@pytest.mark.parametrize("name", [pytest.param("mistral", marks=pytest.mark.nightly), "phi3_long"])
def test_packed_rows_equal_separate_ones(name: str, tmp_path: Path) -> None:
    """Windows and lengths are those of each text, not of the row."""
    case = make(tmp_path, *CASES[name])
    a, b = tokens_of(19, 1), tokens_of(9, 1)
    tokens = np.concatenate([b, a, np.zeros((1, 3), np.int32)], axis=1)
    positions = np.array([[*range(9), *range(19), 0, 0, 0]], np.int32)
    segments = np.array([[1] * 9 + [2] * 19 + [0] * 3], np.int32)

    @jax.jit
    def run(params: Any) -> Any:
        apply = apply_of(case.config)
        return apply(params, tokens, positions, segments), apply(params, b), apply(params, a)

    packed, first, second = run(case.params)
    assert close(packed[:, :9], np.asarray(first)) and close(packed[:, 9:28], np.asarray(second))


def test_shards(tmp_path: Path) -> None:
    """Of a tied model with biases and norms, several files and an index."""
    case = make(tmp_path, *CASES["gemma2"], shard="8KB")
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 2
    whole = make(tmp_path / "whole", *CASES["gemma2"]).params
    jax.tree.map(np.testing.assert_array_equal, case.params, whole)


# ------------------------------------------------------------------------------------- config.json

HUB: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "attention_dropout": 0.0,
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
NO_ROPE = [1, 1, 1, 0, 1, 1, 1, 0]
# What published models have in their config.json, apart from sizes, and what is read.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SmolLM2": (
        {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False}
        | {"rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True}
        | {"transformers.js_config": {"dtype": "q4"}, "pretraining_tp": 1},
        {"rope_theta": 100000, "tied": True},
    ),
    "Llama-3.2": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False}
        | {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "head_dim": 16},
        {"rope_scaling": rope.Llama3(8.0, 1.0, 4.0, 8192.0), "tied": False},
    ),
    "Mistral-7B-v0.1": ({"model_type": "mistral", "sliding_window": 40}, {"window": 40}),
    "Mistral-7B-v0.3": ({"model_type": "mistral", "sliding_window": None}, {"window": None}),
    "SmolLM3": (
        {"model_type": "smollm3", "max_window_layers": 28, "no_rope_layers": NO_ROPE}
        | {"no_rope_layer_interval": 4, "sliding_window": None, "use_sliding_window": False}
        | {"layer_types": ["full_attention"] * 8, "pretraining_tp": 2, "rope_theta": 5e6},
        {"rotated": tuple(map(bool, NO_ROPE)), "window": None, "tied": True},
    ),
    "Qwen2.5": (
        {"model_type": "qwen2", "max_window_layers": 21, "sliding_window": 131072}
        | {"use_sliding_window": False, "rope_theta": 1e6, "use_mrope": False},
        {"qkv_bias": True, "out_bias": False, "window": None},
    ),
    "Qwen3": (
        {"model_type": "qwen3", "attention_bias": False, "max_window_layers": 28}
        | {"sliding_window": None, "use_sliding_window": False, "head_dim": 128},
        {"qk_norm": True, "qkv_bias": False, "head_dim": 128},
    ),
    "gemma-2b": (
        {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "head_dim": 256},
        {"activation": "gelu_pytorch_tanh", "gemma": True, "tied": True},
    ),
    "gemma-2": (
        {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "h"}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256}
        | {"query_pre_attn_scalar": 224, "sliding_window": 4096},
        {"windowed": (True, False) * 4, "window": 4096, "query_scale": 224**-0.5},
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "rope_local_base_freq": 10000, "rope_theta": 1000000}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "cache_implementation": "hybrid"},
        {"local_theta": 10000.0, "windowed": ((True,) * 5 + (False,)) * 1 + (True, True)},
    ),
    "Phi-4-mini": (
        {"model_type": "phi3", "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
        | {"full_attn_mod": 1, "partial_rotary_factor": 0.75, "sliding_window": 262144}
        | {"auto_map": {"AutoConfig": "x.Y"}, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        | {"original_max_position_embeddings": 1024, "attention_bias": False}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}}
        | {"tie_word_embeddings": True},
        {"fused": True, "rope_width": 12, "tied": True},
    ),
}
PUBLISHED["Phi-4-mini"][0]["rope_scaling"]["long_factor"] = [1.5] * 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    entries, want = PUBLISHED[name]
    config, stop = families.hf_config(Path("m"), {**HUB, **entries}, None)
    assert stop == 2 and {key: getattr(config, key) for key in want} == want
    for path, _, hf in param_tree.names(config):
        assert jlora.peft.llama_names(path) == hf


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"logit_scale": 0.5}, "logit_scale=0.5, which is unknown for model_type 'llama'"),
    ("llama", {"sliding_window": 7}, "sliding_window=7 is not implemented"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not implemented"),
    ("llama", {"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
    ("llama", {"rope_scaling": {"rope_type": "su"}}, "rope scaling 'su' is not implemented"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 is not implemented",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "slope": 3}},
        "rope_scaling of type 'linear' with slope=3 is not implemented",
    ),
    ("llama", {"rope_scaling": {"type": "linear"}}, "lacks an entry.*factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, not a number above"),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 5.0}},
        r"low_freq_factor=5.0 is not below high_freq_factor=4.0",
    ),
    ("llama", {"attention_bias": "no"}, "attention_bias='no' is not implemented"),
    (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 0.5}},
        "factor=0.5 is not implemented",
    ),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not implemented"),
    ("mistral", {"layer_types": ["full_attention"] * 8}, "layer_types=.*is not implemented"),
    ("qwen2", {"attention_bias": True}, "attention_bias=True is not implemented"),
    ("qwen3", {"layer_types": ["full_attention"] * 7}, "layer_types=.*is not implemented"),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 8},
        "sliding_window=None is not implemented",
    ),
    ("gemma", {"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
    ("gemma2", {"hidden_activation": "silu2"}, "hidden_act='silu2' is not implemented"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "the rope of sliding_attention=",
    ),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias=True is not implemented"),
    ("phi3", {"rope_scaling": LONG}, "short_factor and long_factor have 3 and 3 numbers, for 8"),
    ("gemma3", {}, "model_type 'gemma3' is unknown here.*Gemma3ForCausalLM"),
]


@pytest.mark.parametrize(("kind", "change", "match"), REFUSED)
def test_what_would_change_numbers_is_refused(
    kind: str, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        families.hf_config(Path("m"), {**HUB, "model_type": kind, **change}, None)
