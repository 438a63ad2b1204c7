"""SmolLM2's real weights in Tunix's Llama 3, against examples' own model: one adapter for both.

The two write one function with other shapes and in another order of operations. Tunix 0.1.7 never
hands its `rope_theta` on, so its Llama 3 turns by 1,000,000 whatever its config says. The models
are therefore compared twice: as Tunix is, with examples' model told that number; and on SmolLM2's
own frequencies, with that one default of Tunix's replaced.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import llama
import pytest
import weights
from flax import nnx
from holds import adapt, distance
from tunix_models import llama3

import jlora
from jlora._paths import leaves_with_paths, map_with_paths

pytestmark = [
    pytest.mark.usefixtures("usual_promotion"),
    # What Tunix still writes as Flax and JAX had it before.
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_res:DeprecationWarning"),
]

# Relative to the largest logit, in float32: two orders of summation, through every layer.
TOLERANCE = 2e-5
TUNIX_THETA = 1_000_000.0

# Where a parameter of Tunix's is in examples' tree.
NAMES = {
    r"embedder/input_embedding": r"embed/embedding",
    r"layers/(\d+)/attn/(\w+)/w": r"layers_\1/attn/\2/kernel",
    r"layers/(\d+)/mlp/(\w+)/kernel": r"layers_\1/mlp/\2/kernel",
    r"layers/(\d+)/input_layernorm/w": r"layers_\1/attn_norm/scale",
    r"layers/(\d+)/post_attention_layernorm/w": r"layers_\1/mlp_norm/scale",
    r"final_norm/w": r"final_norm/scale",
}


def tunix(config: llama.Config) -> tuple[Any, Any]:
    """The graph of the same model in Tunix, and the shapes of its state."""
    sizes = llama3.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocab,
        embed_dim=config.width,
        hidden_dim=config.hidden,
        num_heads=config.heads,
        head_dim=config.head_dim,
        num_kv_heads=config.kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps,
        weight_tying=config.tied,
    )
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: llama3.Llama3(sizes, rngs=nnx.Rngs(0))))


def in_tunix(params: Any, state: Any, layouts: dict[str, str]) -> Any:
    """Put examples' parameters, plain or adapted, into Tunix's state: the numbers, reshaped."""
    ours = dict(leaves_with_paths(params, lambda x: isinstance(x, jlora.LoraArray)))

    def find(name: str, like: Any) -> Any:
        source = next(re.sub(k, v, name) for k, v in NAMES.items() if re.fullmatch(k, name))
        node = ours.pop(source)
        if not isinstance(node, jlora.LoraArray):
            return node.reshape(like.shape)
        sides = {
            side: [n for n, letter in zip(like.shape, layouts[name], strict=True) if letter == side]
            for side in "io"
        }
        return jlora.LoraArray(
            node.base.reshape(like.shape),
            node.lora_a.reshape(*sides["i"], node.rank),
            node.lora_b.reshape(node.rank, *sides["o"]),
            node.scaling,
            layouts[name],
        )

    filled = map_with_paths(find, state)
    assert not ours, f"left over: {sorted(ours)}"
    return filled


def compare(layers: int | None, theta: float) -> None:
    config, params, tokenizer, _ = weights.load(None, layers=layers)
    config = dataclasses.replace(config, rope_theta=theta)
    text = "The quick brown fox jumps over the lazy dog, and nobody wonders why. Pronounce: cat"
    tokens = jnp.array([tokenizer.encode(text).ids], jnp.int32)
    time = tokens.shape[1]
    positions, mask = jnp.arange(time)[None], jnp.tril(jnp.ones((1, time, time), bool))
    graph, state = tunix(config)

    def ours(params: Any) -> Any:
        return llama.Llama(config).apply({"params": params}, tokens)

    def theirs(state: Any) -> Any:
        return nnx.merge(graph, state)(tokens, positions, None, mask)[0]

    adapted = adapt(ours, params, others={}, rank=4)
    layouts = jlora.layouts(theirs, state)
    their_params, their_adapted = (in_tunix(p, state, layouts) for p in (params, adapted))

    plain = jax.jit(ours)(params)
    assert distance(jax.jit(theirs)(their_params), plain) <= TOLERANCE

    report = jlora.explain(theirs, their_adapted)
    assert report.materialized == 0 and report.unused == (), f"\n{report}"
    want = jax.jit(jlora.lora(ours, fallback="error"))(adapted)
    assert distance(plain, want) > 1e-2, "the adapter does nothing here"
    assert distance(jax.jit(jlora.lora(theirs, fallback="error"))(their_adapted), want) <= TOLERANCE
    assert distance(jax.jit(theirs)(jlora.merge(their_adapted)), want) <= TOLERANCE
    assert distance(jax.jit(ours)(jlora.merge(adapted)), want) <= TOLERANCE


@pytest.mark.nightly
def test_logits_as_tunix_is() -> None:
    compare(layers=2, theta=TUNIX_THETA)


@pytest.mark.nightly
@pytest.mark.parametrize("layers", [2, None])
def test_logits_of_smollm2_itself(layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SmolLM2's own frequencies; every layer under the marker `nightly`."""
    own = weights.load(None, layers=1)[0].rope_theta
    assert own != TUNIX_THETA
    turn = functools.partial(llama3.apply_rope, rope_theta=own)
    monkeypatch.setattr(llama3, "apply_rope", turn)
    compare(layers, theta=own)
