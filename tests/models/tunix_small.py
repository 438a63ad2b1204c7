"""Small models of Tunix's families, their prompt, and where transformers' weights go in them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix_models import gemma3, llama3, qwen2, qwen3

import jlora

MARKS = [
    pytest.mark.usefixtures("usual_promotion"),
    # What these files still write as Flax and JAX had it before.
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:jax.interpreters.pxla.thread_res:DeprecationWarning"),
]
# And of PyTorch and transformers.
MARKS_OF_TRANSFORMERS = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
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


# Relative to the largest logit, in float32: two orders of summation.
TOLERANCE = 2e-5


WIDTH = 24  # transformers wants a multiple of the heads


def layouts(family: str, graph: Any, state: Any) -> dict[str, str]:
    return jlora.layouts(forward(graph), state, *prompt())


def arranged(w: np.ndarray, like: Any, layout: str | None) -> np.ndarray:
    """A weight of PyTorch's, (out, in), as an einsum's: its inputs and outputs by letters."""
    if layout is None or w.ndim < 2:
        return w.reshape(like)
    ins = [n for n, side in zip(like, layout, strict=True) if side == "i"]
    outs = [n for n, side in zip(like, layout, strict=True) if side == "o"]
    w = w.reshape(*outs, *ins)
    from_outs, from_ins = iter(range(len(outs))), iter(range(len(outs), w.ndim))
    return w.transpose([next(from_ins if side == "i" else from_outs) for side in layout])
