"""The parameters of `llama.Llama`, and the names of its leaves in other formats."""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from llama import Config
from tokenizers import Tokenizer
from tqdm import tqdm

from jlora.quant import QuantArray

Params = dict[str, Any]
Model = tuple[Config, Params, Tokenizer, int]  # the last is the token that ends a text
Store = Callable[[str, Any], Any]  # what becomes of the weight at a path

# Path of a module within a layer: (llama.cpp's name, Hugging Face's name).
LAYER_NAMES = {
    **{f"attn/{x}_proj": (f"attn_{x}", f"self_attn.{x}_proj") for x in ("q", "k", "v", "qkv")},
    "attn/o_proj": ("attn_output", "self_attn.o_proj"),
    **{f"mlp/{x}_proj": (f"ffn_{x}", f"mlp.{x}_proj") for x in ("gate", "up", "gate_up", "down")},
    **{f"attn/{x}_norm": (f"attn_{x}_norm", f"self_attn.{x}_norm") for x in "qk"},
    "attn_norm": ("attn_norm", "input_layernorm"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    # With norms of what attention and MLP add.
    "attn_post_norm": ("post_attention_norm", "post_attention_layernorm"),
    "mlp_pre_norm": ("ffn_norm", "pre_feedforward_layernorm"),
    "mlp_post_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
}


def names(config: Config) -> Iterator[tuple[str, str, str]]:
    """(path in params, name in a GGUF file, name in a Hugging Face file) of every weight."""
    for path, _, cpp, hf in expected(config):
        yield path, cpp, hf


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
                f"configuration asks for {reprlib.repr(shape)[:200]}."
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


def stacked_layouts(params: Params) -> dict[str, str]:
    """The layouts of the kernels that `stacked` joined, for `jlora.attach`."""
    kernels = flatten_dict(params["layers"], sep="/")
    return {f"layers/{path}": "io" for path in kernels if path.endswith("/kernel")}


def expected(config: Config) -> Iterator[tuple[str, tuple[int, ...], str, str]]:
    """`names`, with the shape of each weight in params, one by one."""
    c = config
    yield "embed/embedding", (c.vocab, c.width), "token_embd.weight", "model.embed_tokens.weight"
    yield "final_norm/scale", (c.width,), "output_norm.weight", "model.norm.weight"
    if not c.tied:
        yield "lm_head/kernel", (c.width, c.vocab), "output.weight", "lm_head.weight"
    for i in range(c.layers):
        for path, shape in layer_shapes(c).items():
            module, _, leaf = path.rpartition("/")
            cpp, hf = (f"{x}.{'bias' if leaf == 'bias' else 'weight'}" for x in LAYER_NAMES[module])
            yield f"layers_{i}/{path}", shape, f"blk.{i}.{cpp}", f"model.layers.{i}.{hf}"


def layer_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a layer, by its path."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if c.fused:
        outputs = {"attn/qkv_proj": q + 2 * kv, "mlp/gate_up_proj": 2 * c.hidden}
    else:
        outputs = {"attn/q_proj": q, "attn/k_proj": kv, "attn/v_proj": kv}
        outputs |= dict.fromkeys(("mlp/gate_proj", "mlp/up_proj"), c.hidden)
    kernels = {module: (c.width, size) for module, size in outputs.items()}
    kernels |= {"attn/o_proj": (q, c.width), "mlp/down_proj": (c.hidden, c.width)}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, shape in kernels.items():
        shapes[f"{module}/kernel"] = shape
        attention = c.out_bias if module == "attn/o_proj" else c.qkv_bias
        if attention if module.startswith("attn") else c.mlp_bias:
            shapes[f"{module}/bias"] = shape[1:]
    after = ["attn_post_norm", "mlp_pre_norm", "mlp_post_norm"] if c.post_norms else ["mlp_norm"]
    shapes |= {f"{module}/scale": (c.width,) for module in ["attn_norm", *after]}
    return shapes | {f"attn/{x}_norm/scale": (c.head_dim,) for x in "qk" if c.qk_norm}
