"""config.json of the model families that `llama.Llama` implements, read as its `Config`.

Every key of a config.json is used, or known to change no numbers, or has a value that changes none;
anything else is an error, because a model that ignores an option runs and is wrong.
"""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from llama import ACTIVATIONS, Config
from rope import Dynamic, Linear, Llama3, LongRope, Scaling, Yarn

Entries = dict[str, Any]
NONE: Mapping[str, Any] = MappingProxyType({})
MOST_LAYERS = 10_000


class Family(NamedTuple):
    """What a model_type adds to Llama."""

    architecture: str
    keys: str = ""  # that are used, besides USED
    options: Mapping[str, Any] = NONE  # of `Config`, whatever config.json says
    defaults: Mapping[str, Any] = NONE  # of keys that config.json may leave out, besides DEFAULTS


USED = """architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_act
    tie_word_embeddings eos_token_id rope_theta rope_scaling rope_parameters quantization_config"""
DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
BIASES, WINDOWS = "attention_bias mlp_bias", "sliding_window layer_types"
TANH = "gelu_pytorch_tanh"
GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": TANH}
GEMMA2 = {**GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 256}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", BIASES),
    "mistral": Family("MistralForCausalLM", "sliding_window", NONE, {"sliding_window": 4096}),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        f"{BIASES} {WINDOWS} use_sliding_window no_rope_layers no_rope_layer_interval",
        NONE,
        {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", f"{WINDOWS} use_sliding_window max_window_layers", {"qkv_bias": True}
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        f"attention_bias {WINDOWS} use_sliding_window max_window_layers",
        {"qk_norm": True},
        {"head_dim": 128},
    ),
    "gemma": Family("GemmaForCausalLM", "attention_bias hidden_activation", {"gemma": True}, GEMMA),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        f"attention_bias hidden_activation {WINDOWS} query_pre_attn_scalar attn_logit_softcapping "
        "final_logit_softcapping",
        {"gemma": True, "post_norms": True},
        {**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        f"attention_bias hidden_activation {WINDOWS} query_pre_attn_scalar rope_local_base_freq "
        "final_logit_softcapping sliding_window_pattern _sliding_window_pattern",
        {"gemma": True, "post_norms": True, "qk_norm": True},
        {**GEMMA2, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "sliding_window original_max_position_embeddings partial_rotary_factor",
        {"fused": True},
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
}
# Keys that change numbers, and the values that do not. A family's own keys come before these.
NO = (False, None)
SWITCHES = ("attention_bias", "mlp_bias", "use_sliding_window")
ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "use_sliding_window"), NO),
    **dict.fromkeys(("use_bidirectional_attention", "rope_interleaved", "use_mrope"), NO),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), NO),
    **dict.fromkeys(("sliding_window", "layer_types", "attn_logit_softcapping"), (None,)),
    **dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop"), (0.0, None)),
    **dict.fromkeys(("interpolate_factor", "full_attn_mod", "partial_rotary_factor"), (1, None)),
    "pruned_heads": ({}, None),
}
# Keys that change no logits: tokens, how a model began, how it is stored, run and sampled from.
HARMLESS = set(
    """_name_or_path name_or_path transformers_version transformers.js_config auto_map torch_dtype
    dtype use_bfloat16 torchscript tokenizer_class bos_token_id pad_token_id sep_token_id
    unk_token_id initializer_range use_cache cache_implementation return_dict output_attentions
    output_hidden_states output_router_logits _attn_implementation attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled pretraining_tp is_llama_config is_decoder
    max_window_layers id2label label2id num_labels problem_type finetuning_task prefix
    task_specific_params chunk_size_feed_forward unsloth_fixed unsloth_version max_length min_length
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty num_beams
    num_return_sequences early_stopping no_repeat_ngram_size suppress_tokens bad_words_ids
    """.split()
)


def hf_config(path: Path, entries: Entries, layers: int | None) -> tuple[Config, int]:
    """The sizes and the end token. Raises if the model needs what this decoder lacks.

    `layers` keeps only the first layers.
    """
    kind = entries.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    classes = entries.get("architectures") or [family and family.architecture]
    if family is None or family.architecture not in classes:
        known = ", ".join(f"{x.architecture} ({name!r})" for name, x in FAMILIES.items())
        raise ValueError(
            f"`--model {path}`: architecture {reprlib.repr(classes)} of model_type "
            f"{reprlib.repr(kind)} is unknown here; this example's decoder implements {known}."
        )
    check_keys(path, entries, family)
    entries = {**DEFAULTS, **family.defaults, **entries}
    try:
        return read_config(path, entries, family, layers), end_token(entries)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"`--model {path}`: config.json lacks an entry, or has one of the wrong type ({error})."
        ) from error


def check_keys(path: Path, entries: Entries, family: Family) -> None:
    """Raise for a key that may change numbers and is not read."""
    used = {*USED.split(), *family.keys.split()}
    for key, value in entries.items():
        if key in used and (key not in SWITCHES or value in NO or value is True):
            continue
        if key in used:
            raise refused(path, key, value)
        if key in ONLY and not any(value == other for other in ONLY[key]):
            raise refused(path, key, value)
        if key not in ONLY and key not in HARMLESS:
            raise ValueError(
                f"`--model {path}`: config.json has {key[:60]}={reprlib.repr(value)}, which is "
                f"unknown for model_type {entries['model_type']!r}. It may change the numbers, so "
                "it is not ignored; if it changes none, remove it from config.json."
            )


def refused(path: Path, key: str, value: Any) -> ValueError:
    return ValueError(f"`--model {path}`: {key}={reprlib.repr(value)} is not implemented here.")


def read_config(path: Path, e: Entries, family: Family, layers: int | None) -> Config:
    """The `Config` of entries whose keys are known."""
    heads, width, count = e["num_attention_heads"], e["hidden_size"], e["num_hidden_layers"]
    if not 0 < count <= MOST_LAYERS:
        raise refused(path, "num_hidden_layers", count)
    options: Entries = {
        "rope_theta": e["rope_theta"],
        "head_dim": e.get("head_dim") or width // heads,
        "activation": activation(path, e, family),
        "qkv_bias": bool(e.get("attention_bias")),
        "out_bias": bool(e.get("attention_bias")),
        "mlp_bias": bool(e.get("mlp_bias")),
        **family.options,
    }
    if "query_pre_attn_scalar" in family.keys:
        options["query_scale"] = number("query_pre_attn_scalar", e["query_pre_attn_scalar"]) ** -0.5
    for ours, key in (("score_cap", "attn_logit"), ("logit_cap", "final_logit")):
        cap = e.get(f"{key}_softcapping")
        options[ours] = None if cap is None else number(f"{key}_softcapping", cap)
    return Config(
        vocab=e["vocab_size"],
        width=width,
        hidden=e["intermediate_size"],
        layers=min(layers or count, count),
        heads=heads,
        kv_heads=e.get("num_key_value_heads") or heads,
        context=e["max_position_embeddings"],
        norm_eps=e["rms_norm_eps"],
        tied=e.get("tie_word_embeddings", False),
        **{**options, **windows(path, e, family), **ropes(path, e, family, options["head_dim"])},
    )


def end_token(entries: Entries) -> int:
    stop = entries.get("eos_token_id")
    return int(stop[0] if isinstance(stop, list) else stop)


def activation(path: Path, e: Entries, family: Family) -> str:
    """The name of the MLP's activation. Gemma has two keys for it, and means tanh's by "gelu"."""
    name = e["hidden_act"]
    if family.options.get("gemma"):
        inner = e["hidden_activation"] or TANH
        if name not in (inner, "gelu", DEFAULTS["hidden_act"]):
            raise refused(path, "hidden_act", name)
        name = inner
    if name not in ACTIVATIONS:
        raise refused(path, "hidden_act", name)
    return name


def windows(path: Path, e: Entries, family: Family) -> Entries:
    """Which layers have a sliding window, and which have rotary positions."""
    window, count = e.get("sliding_window"), e["num_hidden_layers"]
    if "use_sliding_window" in family.keys and not e.get("use_sliding_window"):
        window = None
    windowed: tuple[bool, ...] = (True,)
    rotated: tuple[bool, ...] = (True,)
    if "no_rope_layers" in family.keys:
        every = number("no_rope_layer_interval", e["no_rope_layer_interval"])
        listed = e.get("no_rope_layers") or [(i + 1) % every for i in range(count)]
        rotated = tuple(bool(x) for x in listed[:count])
        windowed = tuple(not x for x in rotated)
    if "max_window_layers" in family.keys:
        windowed = tuple(i >= e.get("max_window_layers", 28) for i in range(count))
    if "query_pre_attn_scalar" in family.keys:
        every = 2
        if "sliding_window_pattern" in family.keys:
            every = e.get("sliding_window_pattern", e.get("_sliding_window_pattern", 6))
        windowed = tuple(bool((i + 1) % number("the pattern", every)) for i in range(count))
    if (types := e.get("layer_types")) is not None:
        windowed = tuple(x == "sliding_attention" for x in types)
        if len(types) != count or {*types} - {"sliding_attention", "full_attention"}:
            raise refused(path, "layer_types", types)
        if any(windowed) and window is None:
            raise refused(path, "sliding_window", None)
    window = window if any(windowed) else None
    return {"window": window, "windowed": windowed if window else (True,), "rotated": rotated}


# --------------------------------------------------------------------------------- rotary positions

# The keys that a rope type reads, besides ROPE.
ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
CONTEXT = "original_max_position_embeddings"
SCALINGS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", CONTEXT},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "truncate", CONTEXT}
    | {"mscale", "mscale_all_dim"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", CONTEXT},
}


def ropes(path: Path, e: Entries, family: Family, head_dim: int) -> Entries:
    """The options of rotary positions, from the old keys or from `rope_parameters`."""
    rope = e.get("rope_scaling") or e.get("rope_parameters") or {}
    found: Entries = {}
    if "rope_local_base_freq" in family.keys:
        rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
        if local.get("rope_type", "default") != "default" or {*local} - ROPE:
            raise refused(path, "the rope of sliding_attention", local)
        theta = local.get("rope_theta", e["rope_local_base_freq"])
        found["local_theta"] = number("rope_local_base_freq", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if family.options.get("fused") and kind in ("su", "yarn"):  # Phi-3's older names
        kind = "longrope"
    if kind not in SCALINGS:
        raise ValueError(
            f"`--model {path}`: rope scaling {reprlib.repr(kind)} is not implemented here."
        )
    for key in rope:
        if key not in ROPE | SCALINGS[kind] | {CONTEXT}:
            raise refused(path, f"rope_scaling of type {kind!r} with {key[:60]}", rope[key])
    found["rope_theta"] = rope.get("rope_theta", e["rope_theta"])
    share = rope.get("partial_rotary_factor", e.get("partial_rotary_factor", 1.0))
    if share != 1 and "partial_rotary_factor" not in family.keys:
        raise refused(path, "partial_rotary_factor", share)
    rotated = int(head_dim * share)
    given = {CONTEXT: e["max_position_embeddings"], **rope}
    if CONTEXT in family.keys:
        given[CONTEXT] = e[CONTEXT]
    found["rope_width"] = None if rotated == head_dim else rotated
    found["rope_scaling"] = scaling(path, kind, given, e["max_position_embeddings"], rotated // 2)
    return found


def scaling(path: Path, kind: str, rope: Entries, context: int, pairs: int) -> Scaling | None:
    """The scaling of a type. `context` is the new one, and `rope` has the old one."""
    of = lambda key: number(key, rope[key])
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(of("factor"))
    if kind == "dynamic":
        if of("factor") < 1:
            raise refused(path, "factor", rope["factor"])
        return Dynamic(of("factor"), context)
    if kind == "llama3":
        low, high = of("low_freq_factor"), of("high_freq_factor")
        if low >= high:
            raise ValueError(
                f"`--model {path}`: its rope scaling is out of range: low_freq_factor={low} is not "
                f"below high_freq_factor={high}."
            )
        return Llama3(of("factor"), low, high, of(CONTEXT))
    old, amplitude = of(CONTEXT), rope.get("attention_factor")
    factor = context / old if rope.get("factor") is None else of("factor")
    if kind == "longrope":
        if amplitude is None:
            amplitude = math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0
        short, long = (
            tuple(number(key, x) for x in rope[key]) for key in ("short_factor", "long_factor")
        )
        if not len(short) == len(long) == pairs:
            raise ValueError(
                f"`--model {path}`: short_factor and long_factor have {len(short)} and "
                f"{len(long)} numbers, for {pairs} pairs of a head."
            )
        return LongRope(short, long, int(old), number("attention_factor", amplitude))
    if amplitude is None:
        scales = [number(key, rope.get(key) or 1) for key in ("mscale", "mscale_all_dim")]
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        top, bottom = (0.1 * x * math.log(max(factor, 1)) + 1 for x in scales)
        amplitude = top / bottom if both else 0.1 * math.log(max(factor, 1)) + 1
    turns = [number(key, rope.get(key) or x) for key, x in (("beta_fast", 32), ("beta_slow", 1))]
    amplitude = number("attention_factor", amplitude)
    return Yarn(factor, old, amplitude, *turns, bool(rope.get("truncate", True)))


def number(key: str, value: Any) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TypeError(f"{key} is {reprlib.repr(value)}, not a number above 0")
    return float(value)
