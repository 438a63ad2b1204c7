"""`--quantize`: the storage format of each base weight, and LoftQ.

Weights are stored one by one as they are read, so a dense copy of the base never exists.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import jax
import placing
import weights
from merged import leaf
from param_tree import Params, Store

import jlora
from jlora.quant import QuantArray

# The first match wins. The embedding, which is the output head too where it is tied, has 8 bits.
RULES = {
    "nf4": {r".*_proj/kernel": "nf4", r".*embedding|lm_head/kernel": "int8"},
    "int8": {r".*_proj/kernel|.*embedding|lm_head/kernel": "int8"},
}


def load(args: argparse.Namespace, layers: int | None, store: Store | None = None) -> weights.Model:
    """The model, with its base weights stored as `--quantize` says."""
    how, keep, path = args.quantize, args.quantize == "keep", weights.path_of(args.model)
    if store is None:
        rules, mesh = RULES.get(how, {}), placing.mesh_of(args)
        stored = storing(rules, f"--model {path} --quantize {how}")
        store = lambda path, weight: placing.place(mesh, path, stored(path, weight))
    model = weights.load(args.model, layers, args.dtype, keep, store)
    if keep and not any(map(is_stored, jax.tree.leaves(model[1], is_leaf=is_stored))):
        raise ValueError(
            f"`--quantize keep`: no weight of {path} is quantized. Give `--quantize nf4` or `int8`."
        )
    return model


def storing(rules: Mapping[str, Any], call: str) -> Store:
    """What to do with each weight that is read: store it in the format of the first rule."""

    def store(path: str, weight: Any) -> Any:
        format = next((x for key, x in rules.items() if re.fullmatch(key, path)), None)
        if format is None:
            return weight
        try:
            return jlora.quantize({path: weight}, {".*": format})[path]
        except ValueError as error:
            raise ValueError(f"`{call}`: {error}") from error

    return store


def loftq(args: argparse.Namespace, layers: int | None, params: Params) -> Params:
    """Read the weights again, one by one, and start each A and B at the error of its codes."""

    def start(path: str, weight: Any) -> Any:
        node = leaf(params, path)
        if not isinstance(node, jlora.LoraArray):
            return node
        weight = placing.place(placing.mesh_of(args), path, weight)
        return jlora.initializers.loftq({path: node}, {path: weight})[path]

    return placing.place_adapter(load(args, layers, start)[1])


def is_stored(x: Any) -> bool:
    return isinstance(x, QuantArray)


def count(tree: Any) -> int:
    """The parameters of a tree; a stored weight counts as those that it stands for."""
    return sum(x.size for x in jax.tree.leaves(tree, is_leaf=is_stored))
