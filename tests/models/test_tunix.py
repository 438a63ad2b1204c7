"""Tunix's Llama 3, Qwen 2, Qwen 3 and Gemma 3, as published, on every weight matrix."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from holds import holds
from tunix_models import gemma3, llama3, qwen2, qwen3

pytestmark = [
    pytest.mark.usefixtures("usual_promotion"),
    # What these files still write as Flax and JAX had it before.
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_res:DeprecationWarning"),
]

BATCH, TIME, VOCAB, KV_HEADS, HEAD = 2, 7, 41, 3, 10
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 22,
    "hidden_dim": 37,
    "num_heads": 6,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD,
}
LLAMA = {"vocab_size": VOCAB, "rope_theta": 10_000, "norm_eps": 1e-5}
GEMMA = {"num_embed": VOCAB, "sliding_window_size": 3, "param_dtype": jnp.float32}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama3": (llama3.Llama3, llama3, LLAMA),
    "qwen2": (qwen2.Qwen2, qwen2, LLAMA),
    "qwen3": (qwen3.Qwen3, qwen3, LLAMA),
    "gemma3": (gemma3.Gemma3, gemma3, GEMMA),
}
every = pytest.mark.parametrize("family", FAMILIES)


def model(family: str, **changes: Any) -> tuple[Any, Any]:
    """The graph and the state of a small model; the state of shapes, for `holds` to fill."""
    make, file, sizes = FAMILIES[family]
    if remat := changes.pop("remat", None):
        changes["remat_config"] = file.RematConfig[remat]
    config = file.ModelConfig(**SIZES | sizes | changes)
    # Without a mesh of devices: the sharding that the files name has nothing to act on.
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))


def forward(graph: Any) -> Callable[..., Any]:
    return lambda state, *args: nnx.merge(graph, state)(*args)


def prompt() -> tuple[Any, ...]:
    """Tokens, positions, no cache, and the causal mask."""
    tokens = np.random.default_rng(3).integers(0, VOCAB, (BATCH, TIME))
    positions = np.broadcast_to(np.arange(TIME), (BATCH, TIME))
    mask = np.broadcast_to(np.tril(np.ones((TIME, TIME), bool)), (BATCH, TIME, TIME))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32), None, jnp.array(mask)


@every
def test_model(family: str) -> None:
    graph, state = model(family)
    holds(forward(graph), state, *prompt(), eager=family == "llama3")


@every
def test_cache(family: str) -> None:
    """A prompt into an empty cache, and one step from it."""
    graph, state = model(family, num_layers=1)
    tokens, positions, _, mask = prompt()
    kv = jnp.zeros((BATCH, TIME, KV_HEADS, HEAD))
    cache = {"layer_0": {"k": kv, "v": kv, "end_index": jnp.zeros(BATCH, jnp.int32)}}

    def decode(state: Any, tokens: Any, positions: Any, cache: Any, mask: Any) -> Any:
        net = nnx.merge(graph, state)
        first, cache = net(tokens[:, :-1], positions[:, :-1], cache, mask[:, :-1])
        return first, *net(tokens[:, -1:], positions[:, -1:], cache, mask[:, -1:])

    holds(decode, state, tokens, positions, cache, mask)


@pytest.mark.parametrize(
    ("family", "remat"),
    [("llama3", "BLOCK"), ("qwen2", "DECODER"), ("qwen3", "BLOCK"), ("gemma3", "DECODER")],
)
def test_remat(family: str, remat: str) -> None:
    graph, state = model(family, remat=remat, num_layers=1)
    holds(forward(graph), state, *prompt())


@pytest.mark.parametrize(
    ("family", "option"), [("llama3", "weight_tying"), ("qwen3", "use_tied_embedding")]
)
def test_tied_head(family: str, option: str) -> None:
    graph, state = model(family, num_layers=1, **{option: True})
    assert "lm_head" not in state
    holds(forward(graph), state, *prompt())


def test_experts() -> None:
    graph, state = model("qwen3", num_layers=1, num_experts=3, num_experts_per_tok=2)
    report = holds(forward(graph), state, *prompt())
    assert sum("mlp/gate_proj" in use.name for use in report.uses) == 3


def test_fused_projection() -> None:
    """Gemma 3 with as many key heads as query heads keeps the three in one array."""
    graph, state = model("gemma3", num_layers=1, num_kv_heads=SIZES["num_heads"])
    report = holds(forward(graph), state, *prompt())
    assert sum("qkv_einsum" in use.name for use in report.uses) == 1
