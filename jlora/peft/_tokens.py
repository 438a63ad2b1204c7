"""Trainable tokens: rows of an embedding, stored in the file with their trained values.

<module>.token_adapter.trainable_tokens_delta (n, d) = W[indices], despite its name
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora._arrays import FullArray, Geometry
from jlora._paths import brief
from jlora.peft._config import Config
from jlora.peft._keys import TOKENS, Found, Groups, Tensors
from jlora.peft._match import ends_with
from jlora.peft._names import Place
from jlora.peft._tensors import full_from_torch, full_shape, full_to_torch

Indices = Sequence[int] | Mapping[str, Sequence[int]]


class Tokens(NamedTuple):
    """Rows of one embedding, in PyTorch's order of axes, and their indices."""

    place: Place
    rows: np.ndarray
    indices: Sequence[int]
    geometry: Geometry | None
    kind: str


def assign_tokens(
    plan: Any, groups: Groups, tensors: Tensors, config: Any, found: Found, call: str
) -> None:
    """Find the embedding of each set of rows, and check their shapes and indices."""
    given = config.trainable_token_indices if isinstance(config, Config) else ()
    _note_missing(plan, groups, given)
    for module, key in groups.tokens.items():
        place, rows = found.places.get(f"{module}.weight"), tensors[key]
        indices = indices_of(given, module)
        is_taken = place is not None and (place.path in plan.lora or place.path in plan.full)
        if place is None or is_taken or place.index or len(place.shape) != 2:
            plan.unexpected.append(key)
            continue
        geometry, kind = found.full_geometry(place, call)
        vocab, width = full_shape(place.shape, geometry, kind)
        plan.check_shape(key, rows, (len(indices), width), place)
        if not all(0 <= k < vocab for k in indices) or len(set(indices)) < len(indices):
            raise ValueError(
                f'`{call}`: trainable_token_indices are {list(indices)[:8]} for "{module}", whose '
                f"weight has {vocab} rows here; each must be one of them, and once. Is this the "
                "model whose vocabulary the adapter was trained with?"
            )
        plan.tokens.append(Tokens(place, rows, indices, geometry, kind))


def _note_missing(plan: Any, groups: Groups, given: Indices) -> None:
    """Record rows that the configuration lists and the file lacks; PEFT writes tied ones once."""
    if not isinstance(given, Mapping):
        if given and not groups.tokens:
            plan.missing.append(f"<the input embedding>.{TOKENS}")
        return
    there = {name for name in given if any(ends_with(module, [name]) for module in groups.tokens)}
    written = [sorted(given[name]) for name in there]
    plan.missing += [
        f"{name}.{TOKENS}"
        for name, indices in given.items()
        if name not in there and sorted(indices) not in written
    ]


def indices_of(given: Indices, module: str) -> Sequence[int]:
    """Return the indices for a module: a list applies to the input embedding."""
    if isinstance(given, Mapping):
        return next((of for name, of in given.items() if ends_with(module, [name])), ())
    return given


def with_tokens(tokens: Sequence[Tokens], leaves: Mapping[str, Any]) -> dict[str, FullArray]:
    """Write the rows into their embeddings, which become fully trained."""
    nodes = {}
    for one in tokens:
        leaf, path = leaves[one.place.path], one.place.path
        weight = full_to_torch(np.array(leaf), one.geometry, one.kind).copy()
        weight[list(one.indices)] = one.rows.astype(weight.dtype)
        value = full_from_torch(weight, one.place.shape, one.geometry, one.kind)
        nodes[path] = FullArray(None, jnp.asarray(value))
    return nodes


def take_tokens(
    fulls: dict[Place, np.ndarray], adapted: Mapping[str, Any], given: Any, found: Found, call: str
) -> dict[str, np.ndarray]:
    """Remove embeddings with trainable rows from the fully saved parameters; return the rows."""
    rows = {}
    for place in list(fulls):
        kind = found.full_geometry(place, call)[1] if len(place.shape) == 2 else ""
        indices = indices_of(given, place.module)
        if not indices or (not isinstance(given, Mapping) and kind != "embedding"):
            continue
        geometry, kind = found.full_geometry(place, call)
        value, base = fulls[place], adapted[place.path].base
        kept = np.ones(len(value), bool)
        kept[list(indices)] = False
        old = None if base is None else full_to_torch(np.asarray(base), geometry, kind)
        if old is None or not np.array_equal(value[kept], old[kept]):
            raise ValueError(
                f"`{call}`: trainable_token_indices says that only rows {list(indices)[:8]} of "
                f'"{place.path}" have changed, and others have too, or its original is not here. '
                "Put the base weights in, `jlora.bind(base, adapter)`, or leave the entry out: "
                "then all of it is saved."
            )
        rows[f"{place.module}.{TOKENS}"] = fulls.pop(place)[list(indices)]
    if len(rows) != (len(given) if isinstance(given, Mapping) else 1):
        raise ValueError(
            f"`{call}`: trainable_token_indices={brief(given)} names other embeddings than those "
            "that are fully trained: "
            f'{[p.module for p in fulls if len(p.shape) == 2][:3]}. Give them the rule "full".'
        )
    return rows
