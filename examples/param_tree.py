"""The parameters of `llama.Llama`, and the names of its leaves in other formats."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from llama import Config
from tokenizers import Tokenizer
from tqdm import tqdm

Params = dict[str, Any]
Model = tuple[Config, Params, Tokenizer, int]  # the last is the token that ends a text

# Path within a layer: (llama.cpp's name, Hugging Face's name).
LAYER_NAMES = {
    "attn/q_proj/kernel": ("attn_q", "self_attn.q_proj"),
    "attn/k_proj/kernel": ("attn_k", "self_attn.k_proj"),
    "attn/v_proj/kernel": ("attn_v", "self_attn.v_proj"),
    "attn/o_proj/kernel": ("attn_output", "self_attn.o_proj"),
    "mlp/gate_proj/kernel": ("ffn_gate", "mlp.gate_proj"),
    "mlp/up_proj/kernel": ("ffn_up", "mlp.up_proj"),
    "mlp/down_proj/kernel": ("ffn_down", "mlp.down_proj"),
    "attn_norm/scale": ("attn_norm", "input_layernorm"),
    "mlp_norm/scale": ("ffn_norm", "post_attention_layernorm"),
}


def names(config: Config) -> Iterator[tuple[str, str, str]]:
    """(path in params, name in a GGUF file, name in a Hugging Face file) of every weight."""
    yield "embed/embedding", "token_embd.weight", "model.embed_tokens.weight"
    yield "final_norm/scale", "output_norm.weight", "model.norm.weight"
    if not config.tied:
        yield "lm_head/kernel", "output.weight", "lm_head.weight"
    for i in range(config.layers):
        for path, (cpp, hf) in LAYER_NAMES.items():
            yield f"layers_{i}/{path}", f"blk.{i}.{cpp}.weight", f"model.layers.{i}.{hf}.weight"


def build(
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    which: int,
    source: Path,
) -> Params:
    """Build the tree from `read(name)`; `which` selects the name: 0 for llama.cpp, 1 for HF.

    `shapes` are those of the file, (out, in). They are compared with the configuration first:
    a damaged one may ask for a billion layers.
    """
    params, count = Params(), 0
    for path, shape, *aliases in expected(config):
        name, count = aliases[which], count + 1
        if name not in shapes:
            raise ValueError(f"`--model {source}`: the weight {name} is in none of its files.")
        found = shapes[name][::-1] if path.endswith("/kernel") else shapes[name]
        if found != shape:
            raise ValueError(
                f"`--model {source}`: {name} gives {path} the shape {found}, but its own "
                f"configuration asks for {shape}."
            )
    weights = tqdm(expected(config), desc="load weights", unit="array", leave=False, total=count)
    for path, _, *aliases in weights:
        *parents, module, leaf = path.split("/")
        value = read(aliases[which])
        node = params
        for part in [*parents, module]:
            node = node.setdefault(part, {})
        value = np.ascontiguousarray(value.T if leaf == "kernel" else value, dtype=np.float32)
        node[leaf] = jnp.asarray(value, config.dtype)
    return params


def stacked(params: Params, layers: int) -> Params:
    """Join the trees of the layers along a new leading axis; empties `params` on the way."""

    def join(nodes: list[Any]) -> Any:
        if isinstance(nodes[0], dict):
            return {name: join([node.pop(name) for node in nodes]) for name in [*nodes[0]]}
        return jnp.stack(nodes)

    trees = [params.pop(f"layers_{i}") for i in range(layers)]
    return {**params, "layers": join(trees)}


def stacked_layouts() -> dict[str, str]:
    """The layouts of the kernels that `stacked` joins, for `jlora.attach`."""
    return {f"layers/{path}": "io" for path in LAYER_NAMES if path.endswith("/kernel")}


def expected(config: Config) -> Iterator[tuple[str, tuple[int, ...], str, str]]:
    """`names`, with the shape of each weight in params, one by one."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = {"q_proj": (c.width, q), "k_proj": (c.width, kv), "v_proj": (c.width, kv)}
    sizes |= {"o_proj": (q, c.width), "gate_proj": (c.width, c.hidden)}
    sizes |= {"up_proj": (c.width, c.hidden), "down_proj": (c.hidden, c.width)}
    sizes |= {"embed": (c.vocab, c.width), "lm_head": (c.width, c.vocab)}
    for path, *aliases in names(c):
        yield path, sizes.get(path.split("/")[-2], (c.width,)), *aliases
