"""The parameters of `llama.Llama`, and the names of its leaves in other formats."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llama import Config
from tokenizers import Tokenizer
from tqdm import tqdm

from jlora.quant import QuantArray

Params = dict[str, Any]
Model = tuple[Config, Params, Tokenizer, int]  # the last is the token that ends a text
Store = Callable[[str, Any], Any]  # what becomes of the weight at a path

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
    read: Callable[[str], Any],
    which: int,
    source: Path,
    store: Store | None = None,
) -> Params:
    """Build the tree from `read(name)`; `which` selects the name: 0 for llama.cpp, 1 for HF.

    `read` returns an array or a `QuantArray`, (out, in). With `store`, the tree has what it returns
    for each weight; there is one weight in float32 at a time.

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
        if isinstance(value, QuantArray):
            value = dataclasses.replace(value, kind=config.dtype)
            value = value.as_layout("io", value.dims[::-1]) if leaf == "kernel" else value
        else:
            value = np.ascontiguousarray(value.T if leaf == "kernel" else value, dtype=np.float32)
            value = jnp.asarray(value, config.dtype)
        node[leaf] = store(path, value) if store else value
    return params


def stacked(params: Params, layers: int) -> Params:
    """Join the trees of the layers along a new leading axis; empties `params` on the way."""

    def join(nodes: list[Any], path: str = "") -> Any:
        if isinstance(nodes[0], dict):
            names = [*nodes[0]]
            return {name: join([x.pop(name) for x in nodes], f"{path}/{name}") for name in names}
        formats = {str(x.format) if isinstance(x, QuantArray) else "arrays" for x in nodes}
        if len(formats) > 1:
            raise ValueError(
                f"`--scan`: the layers' {path[1:]} are stored in several formats, "
                f"{', '.join(sorted(formats))}, so they have no common stack. Leave --scan out."
            )
        return jax.tree.map(lambda *x: jnp.stack(x), *nodes)

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
