"""Find names and layouts of a tree by comparing its values with those of a checkpoint.

A transpose or a reshape moves values without changing them. So the multiset of a leaf's values
identifies its tensor, and the order of axes that makes the two equal is its layout.
"""

import collections
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jlora._adapt import detach
from jlora._boxes import leaves_with_paths
from jlora._paths import describe
from jlora.peft._fits import Mark, inputs_first, is_embedding, layouts_of, mark_of
from jlora.peft._names import Name, check_keys
from jlora.peft._weights import Weights, open_weights

_PAIRS, _SHOWN, _DEEPEST = 16, 20, 2


@dataclasses.dataclass(frozen=True)
class Part:
    """A leaf, or one index along its leading dimensions: a candidate for one tensor."""

    path: str
    index: tuple[int, ...]


@dataclasses.dataclass
class Found:
    """The results of the comparison: the tensor and layout of each part, or why there is none."""

    named: dict[Part, tuple[str, str]] = dataclasses.field(default_factory=dict)
    why: dict[Part, str] = dataclasses.field(default_factory=dict)
    equal: dict[Part, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)


def match(
    params: PyTree,
    checkpoint: Any,
    *,
    names: Mapping[str, Name | None] | None = None,
) -> tuple[dict[str, Name], dict[str, str]]:
    """Find the PyTorch name and the layout of each leaf by its values, as `load` requires them.

    A leaf is looked up among the tensors by invariants of the order of its values: their number,
    the sum of their bit patterns as integers and the sum of the squares of these, modulo 2⁶⁴ and
    thus exact. Then every order of axes that a layout can describe is tried; the one that makes the
    leaf equal to the tensor bit for bit gives the layout. A leaf that matches no tensor is compared
    index by index along its first one or two dimensions: stacked layers, experts, keys and values
    in one weight. Tensors are cast to the leaf's dtype first, so a model loaded as bfloat16 from
    float32, or the reverse, is found too. One tensor is in memory at a time; each is read twice.

    Warns about leaves that it cannot name: values that occur several times (biases of zeros, norms
    of ones), or values changed by loading (scaled, shifted by one, permuted within an axis). For
    the layout, a Linear is (out, in), and an embedding or a Conv1D of transformers is (in, out), as
    inferred from the checkpoint's names and biases; experts in one parameter have no layout.

    Args:
        params: base parameters as loaded, adapted or not.
        checkpoint: the model's folder in Hugging Face's form (safetensors, in one file or several),
            a safetensors file, or a mapping from PyTorch's names to arrays.
        names: path to name for leaves that values do not identify; None where none is needed. Used
            unchanged.

    Returns:
        `names` and `layouts`, dicts by path, for `load`, `save`, `rules` and `jlora.attach`. A leaf
        of several tensors has a name with "{}", or a list of names.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: no weight matches a tensor; a damaged file.
        KeyError: `names` has a path that is not in the tree.
        TypeError: the checkpoint is of another type; a leaf without values.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> q, k = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(2))
        >>> params = {"q": jnp.asarray(q.T), "k": jnp.asarray(k)}
        >>> names, layouts = match(params, {"m.q_proj.weight": q, "m.k_proj.weight": k})
        >>> names["q"], layouts["q"], layouts["k"]
        ('m.q_proj.weight', 'io', 'oi')
    """
    call = "jlora.peft.match(params, checkpoint)"
    leaves = dict(leaves_with_paths(detach(params)[0]))
    check_keys(names, list(leaves), "names", call)
    preset = dict(names or {})
    wanted = {path: x for path, x in leaves.items() if path not in preset and _is_float(x)}
    for path, leaf in wanted.items():
        if not hasattr(leaf, "__array__"):
            raise TypeError(
                f"`{call}`: {describe(path, leaf)} is a shape without values, and leaves are found "
                "by their values. Pass the parameters themselves."
            )
    weights = open_weights(checkpoint, call)
    used = {name for x in preset.values() for name in _flat(x)}
    table = _table(weights, {np.dtype(x.dtype) for x in wanted.values()}, used)
    found, groups, transposed = Found(), _groups(wanted, table), inputs_first(weights.shapes)
    for mark, parts in groups.items():
        _resolve(found, parts, table.get(mark, []), wanted, weights, transposed)
    _by_siblings(found)
    result, layouts, odd = _collect(found, list(groups.values()))
    _refuse_other_weights(result, wanted, weights, call)
    _warn(odd, len(leaves), call)
    result |= {path: name for path, name in preset.items() if name is not None}
    return {path: result[path] for path in leaves if path in result}, layouts


def _is_float(x: Any) -> bool:
    return hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)


def _flat(name: Name | None) -> Iterator[str]:
    """Yield the names of a leaf, however they are nested."""
    if isinstance(name, str):
        yield name
    elif name is not None:
        yield from itertools.chain.from_iterable(map(_flat, name))


def _table(weights: Weights, dtypes: set[np.dtype[Any]], used: set[str]) -> dict[Mark, list[str]]:
    """Compute the mark of every tensor, in each dtype of the leaves."""
    table: dict[Mark, list[str]] = collections.defaultdict(list)
    for name in weights:
        tensor = None if name in used else weights[name]
        if tensor is not None and jnp.issubdtype(tensor.dtype, jnp.floating):
            for dtype in dtypes:
                table[mark_of(tensor, dtype)].append(name)
    return dict(table)


def _groups(wanted: Mapping[str, Any], table: Mapping[Mark, list[str]]) -> dict[Mark, list[Part]]:
    """Split leaves into parts that are in the table, and group parts with equal marks."""
    sizes = collections.Counter({(m[0], m[1]): 0 for m in table})
    for mark, names in table.items():
        sizes[mark[0], mark[1]] += len(names)
    groups: dict[Mark, list[Part]] = collections.defaultdict(list)
    for path, leaf in wanted.items():
        x, dtype = np.asarray(leaf), np.dtype(leaf.dtype)
        marks = {Part(path, ()): mark_of(x, dtype)}
        for depth in range(1, min(_DEEPEST, x.ndim - 1) + 1):
            if all(mark in table for mark in marks.values()):
                break
            rows = math.prod(x.shape[:depth])
            if x.size and sizes[dtype.name, x.size // rows] >= rows:
                places = itertools.product(*map(range, x.shape[:depth]))
                deeper = {Part(path, index): mark_of(x[index], dtype) for index in places}
                marks = deeper if all(m in table for m in deeper.values()) else marks
        for part, mark in marks.items():
            groups[mark].append(part)
    return groups


def _resolve(
    found: Found,
    parts: Sequence[Part],
    names: Sequence[str],
    wanted: Mapping[str, Any],
    weights: Weights,
    transposed: set[str],
) -> None:
    """Distinguish parts and tensors with the same values by the order of the values."""
    if not names:
        found.why |= dict.fromkeys(parts, "no tensor has its values")
        return
    if len(parts) * len(names) > _PAIRS:
        for part in parts:
            ours = wanted[part.path].ndim - len(part.index)
            vectors = [name for name in names if min(ours, len(weights.shapes[name])) < 2]
            found.equal[part] = [(name, "") for name in vectors]  # a matrix needs a layout
        return
    fits: dict[Part, list[tuple[str, str]]] = {part: [] for part in parts}
    mirrored = set()
    for name in names:
        tensor = weights[name]
        for part in parts:
            x = np.asarray(wanted[part.path])[part.index]
            layouts = list(layouts_of(x, tensor, name, name in transposed))
            fits[part] += [(name, layouts[0])] if len(layouts) == 1 else []
            mirrored |= {part} if len(layouts) > 1 else set()
    claims = collections.Counter(name for hits in fits.values() for name, _ in hits)
    tied = _tied(fits, names)
    for part, hits in fits.items():
        if len(hits) == 1 and claims[hits[0][0]] == 1:
            found.named[part] = hits[0]
        elif part in tied:
            found.named[part] = tied[part]
        elif hits:
            found.equal[part] = hits
        else:
            how = "two layouts fit it" if part in mirrored else "in an order that no layout has"
            found.why[part] = f'it has the values of "{names[0]}", {how}'


def _tied(
    fits: Mapping[Part, list[tuple[str, str]]], names: Sequence[str]
) -> dict[Part, tuple[str, str]]:
    """For an embedding tied to the head, match the leaf that is named like an embedding."""
    own = [name for name in names if is_embedding(name)]
    parts = [p for p in fits if len(fits) == 1 or "embed" in p.path or "wte" in p.path]
    if len(own) != 1 or len(parts) != 1:
        return {}
    found = dict(itertools.product(parts, [hit for hit in fits[parts[0]] if hit[0] == own[0]]))
    others = [part for part in fits if part not in parts]
    left = [hit for part in others for hit in fits[part] if hit[0] != own[0]]
    if found and len(others) == len(left) == 1:
        found[others[0]] = left[0]
    return found


def _by_siblings(found: Found) -> None:
    """Name leaves with ambiguous values, such as zero biases, by the weight in the same module."""
    modules: dict[tuple[str, tuple[int, ...]], set[str]] = collections.defaultdict(set)
    for part, (name, _) in found.named.items():
        modules[part.path.rpartition("/")[0], part.index].add(name.rpartition(".")[0])
    picked: dict[Part, tuple[str, str]] = {}
    for part, hits in found.equal.items():
        own = modules.get((part.path.rpartition("/")[0], part.index), set())
        inside = [hit for hit in hits if hit[0].rpartition(".")[0] in own]
        if len(own) == len(inside) == 1:
            picked[part] = inside[0]
    claims = collections.Counter(name for name, _ in (*found.named.values(), *picked.values()))
    found.named |= {part: hit for part, hit in picked.items() if claims[hit[0]] == 1}


def _collect(
    found: Found, groups: Sequence[Sequence[Part]]
) -> tuple[dict[str, Name], dict[str, str], dict[str, str]]:
    """Combine the parts of each leaf; return names, layouts, and why other leaves have none."""
    by_path: dict[str, list[Part]] = collections.defaultdict(list)
    for part in itertools.chain.from_iterable(groups):
        by_path[part.path].append(part)
    names, layouts, odd = {}, {}, {}
    for path, parts in by_path.items():
        parts.sort(key=lambda part: part.index)
        left = [part for part in parts if part not in found.named]
        kinds = {found.named[part][1] for part in parts if part in found.named}
        if left:
            odd[path] = found.why.get(left[0], "other leaves or tensors have the same values")
        elif len(kinds) > 1:
            odd[path] = f"its layers have the layouts {sorted(kinds)}"
        else:
            names[path] = _nested({part.index: found.named[part][0] for part in parts})
            if any(kinds):
                layouts[path] = kinds.pop()
    return names, layouts, odd


def _nested(names: Mapping[tuple[int, ...], str]) -> Name:
    """Write the names of a leaf's indices as one with "{}" where they count, or as a list."""
    if () in names:
        return names[()]
    inside: dict[int, dict[tuple[int, ...], str]] = collections.defaultdict(dict)
    for index, name in names.items():
        inside[index[0]][index[1:]] = name
    each = [_nested(inside[k]) for k in range(len(inside))]
    if not all(isinstance(name, str) for name in each):
        return each
    split = [str(name).split(".") for name in each]
    for at in range(len(split[0])):
        counted = all(words[at : at + 1] == [str(k)] for k, words in enumerate(split))
        rest = {(*words[:at], None, *words[at + 1 :]) for words in split}
        if counted and len(rest) == 1 and "{}" not in ".".join(split[0][:at]):
            return ".".join([*split[0][:at], "{}", *split[0][at + 1 :]])
    return each


def _refuse_other_weights(
    names: Mapping[str, Name], wanted: Mapping[str, Any], weights: Weights, call: str
) -> None:
    matrices = [path for path, x in wanted.items() if x.ndim > 1]
    if matrices and not any(path in names for path in matrices):
        first = wanted[matrices[0]]
        alike = [n for n, shape in weights.shapes.items() if math.prod(shape) == first.size][:3]
        raise ValueError(
            f"`{call}`: none of the {len(matrices)} weights, such as "
            f"{describe(matrices[0], first)}, has the values of one of the checkpoint's "
            f"{len(weights)} tensors (of its size: {alike}). Give the checkpoint that `params` "
            "were loaded from, and `params` before any training or quantization."
        )


def _warn(odd: Mapping[str, str], count: int, call: str) -> None:
    if odd:
        listed = "; ".join(f'"{path}": {why}' for path, why in list(odd.items())[:_SHOWN])
        more = f"; and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        warnings.warn(
            f"`{call}`: {len(odd)} of {count} leaves have no name. {listed}{more}. Give "
            "`names={path: name}` for those that you adapt or fully train, None for the others.",
            stacklevel=3,
        )
