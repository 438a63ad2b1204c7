"""The ready names of Tunix's models, against transformers' own models of the same families."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from holds import distance
from tunix_small import (
    BATCH,
    FAMILIES,
    MARKS,
    MARKS_OF_TRANSFORMERS,
    SIZES,
    TIME,
    TOLERANCE,
    VOCAB,
    WIDTH,
    arranged,
    forward,
    layouts,
    model,
    prompt,
)

import jlora.peft
from jlora._paths import leaves_with_paths, map_with_paths

pytestmark = [*MARKS, *MARKS_OF_TRANSFORMERS]
every = pytest.mark.parametrize("family", FAMILIES)

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES: dict[str, Callable[[str], Any]] = {
    "llama3": jlora.peft.tunix_names,
    "qwen2": jlora.peft.tunix_names,
    "qwen3": jlora.peft.tunix_names,
    "gemma3": jlora.peft.tunix_gemma3_names,
}


def theirs(family: str) -> torch.nn.Module:
    """transformers' model of the sizes of `tunix_small.model(family)`, with random weights."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": SIZES["hidden_dim"],
        "num_hidden_layers": SIZES["num_layers"],
        "num_attention_heads": SIZES["num_heads"],
        "num_key_value_heads": SIZES["num_kv_heads"],
        "head_dim": SIZES["head_dim"],
        "rms_norm_eps": 1e-5,
        "attn_implementation": "eager",
    }
    plain = {"tie_word_embeddings": False}
    made: dict[str, Callable[[], Any]] = {
        # Tunix 0.1.7 never hands the rope_theta of Llama and Qwen 3 on, and turns by 1,000,000.
        "llama3": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, **plain, rope_theta=1e6)
        ),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**sizes, **plain, rope_theta=1e4)
        ),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**sizes, **plain, rope_theta=1e6)
        ),
        "gemma3": lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **sizes | {"rms_norm_eps": 1e-6},
                sliding_window=3,
                query_pre_attn_scalar=SIZES["head_dim"],
                layer_types=["sliding_attention"] * SIZES["num_layers"],
            )
        ),
    }
    torch.manual_seed(0)
    net = made[family]().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            scale = 0.3 if "norm" in name or name.endswith("bias") else 1 / math.sqrt(p.shape[-1])
            p.add_(torch.randn_like(p) * scale)
    return net


def filled(family: str, net: torch.nn.Module, state: Any, sides: dict[str, str]) -> Any:
    """The weights of transformers' model in Tunix's state; every one of both is used."""
    tensors = {name: p.detach().numpy() for name, p in net.named_parameters()}

    def take(path: str, like: Any) -> Any:
        names = NAMES[family](path)
        assert names is not None, path
        if isinstance(names, list):
            layout = sides[path][-3:]
            parts = [arranged(tensors.pop(n), like.shape[1:], layout) for n in names]
            return jnp.asarray(np.stack(parts))
        embedding = "embedding" in path
        w = tensors.pop(names)
        return jnp.asarray(w if embedding else arranged(w, like.shape, sides.get(path)))

    state = map_with_paths(take, state)
    assert not tensors, f"without a leaf: {sorted(tensors)}"
    return state


def adapter(net: torch.nn.Module, folder: Path) -> torch.nn.Module:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(MATRICES), init_lora_weights=False
    )
    net = peft.get_peft_model(net, config).eval()
    net.save_pretrained(folder)
    return net


@pytest.mark.sample(6)
@every
def test_every_weight_has_its_name_and_an_adapter_its_numbers(family, tmp_path):
    """transformers' weights in Tunix's model, plain and with an adapter of PEFT's: the logits."""
    graph, state = model(family, embed_dim=WIDTH)
    net = theirs(family)
    sides = layouts(family, graph, state)
    state = filled(family, net, state, sides)
    tokens, *rest = prompt()
    ids = torch.tensor(np.asarray(tokens)).long()
    run = lambda fn, params: np.asarray(jax.jit(fn)(params, tokens, *rest)[0])
    with torch.no_grad():
        plain = net(ids).logits.numpy()
        adapted = adapter(net, tmp_path / "peft")(ids).logits.numpy()
    assert plain.shape == (BATCH, TIME, VOCAB)
    assert distance(run(forward(graph), state), plain) <= TOLERANCE
    assert distance(adapted, plain) > 0.05, "the adapter does nothing here"
    params = jlora.peft.load(tmp_path / "peft", state, names=NAMES[family], layouts=sides)
    assert distance(run(jlora.lora(forward(graph), fallback="error"), params), adapted) <= TOLERANCE

    # And back: the same tensors, which PEFT takes without a missing or an unexpected key.
    jlora.peft.save(tmp_path / "ours", params, names=NAMES[family])
    files = [(tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("peft", "ours")]
    assert files[0] == files[1]


@every
def test_names_and_layouts_are_found_by_value(family, tmp_path):
    graph, state = model(family, embed_dim=WIDTH)
    net = theirs(family)
    sides = layouts(family, graph, state)
    state = filled(family, net, state, sides)
    net.save_pretrained(tmp_path)
    names, found = jlora.peft.match(state, tmp_path)
    assert names == {path: NAMES[family](path) for path, _ in leaves_with_paths(state)}
    # Keys and values in one leaf have a name each, and so an A each.
    fused = {path for path, name in names.items() if isinstance(name, list)}
    assert {p: x for p, x in found.items() if p not in fused} == {
        p: x for p, x in sides.items() if p not in fused
    }
    assert all(found[path] == sides[path][1:] for path in fused) and len(fused) % 2 == 0


@pytest.mark.sample(6)
@every
def test_an_adapter_of_every_matrix_loads_in_peft(family, tmp_path):
    graph, state = model(family, embed_dim=WIDTH)
    sides = layouts(family, graph, state)
    state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state)
    rules = {path: jlora.LoraSpec(3) for path, x in leaves_with_paths(state) if x.ndim > 1}
    params = jlora.attach(state, rules, key=jax.random.key(0), layouts=sides)
    jlora.peft.save(tmp_path, params, names=NAMES[family])
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    net = peft.PeftModel(theirs(family), config)
    result = net.load_adapter(str(tmp_path), "default")
    assert not result.missing_keys and not result.unexpected_keys
    trained = sum("lora_" in name for name, _ in net.named_parameters())
    heads = 1 if family == "gemma3" else 2
    assert trained == 2 * (len(MATRICES) * SIZES["num_layers"] + heads)


def test_llama_names_are_those_of_transformers():
    """The examples' decoder and transformers' Llama have the same parameters."""
    from llama import Config, Llama

    sizes = Config(VOCAB, 24, 36, 2, 4, 2, 6, 32, tied=False)
    shapes = jax.eval_shape(Llama(sizes).init, jax.random.key(0), jnp.ones((1, 3), jnp.int32))
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=False,
    )
    tensors = dict(transformers.LlamaForCausalLM(config).named_parameters())
    for path, leaf in leaves_with_paths(shapes):
        want = tuple(tensors.pop(jlora.peft.llama_names(path)).shape)
        assert leaf.shape == (want[::-1] if path.endswith("kernel") else want), path
    assert not tensors
