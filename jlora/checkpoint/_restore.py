"""Restore an adapter: verify everything that was saved, and put it on the base's devices."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jlora import forms
from jlora._adapt import bind, detach
from jlora._arrays import Adapted, FullArray, Geometry, LoraArray, Tied, is_adapted, is_leaf
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_directory, check_tree
from jlora._disk import digest, unseal
from jlora._paths import describe, near_misses
from jlora._placed import check_replicate, placed
from jlora._tie import untie
from jlora.checkpoint._save import ARRAYS, INDEX, alone


def restore(
    directory: str | os.PathLike[str], params: PyTree, replicate: Sequence[str] = ()
) -> PyTree:
    """Restore a saved adapter onto base weights, bit for bit, verified by checksums.

    In a program of several processes each of them reads and verifies the files, and puts its own
    shards on its devices.

    Args:
        directory: what `save` wrote.
        params: base parameters, plain or adapted (their adapter is ignored). An adapter over a
            residual requires that residual: recreate the initial parameters of the training run.
        replicate: as for `jlora.attach`.

    Returns:
        The adapted parameters. Base weights are not copied. A, B and the other parts are placed as
        by `jlora.attach(base, ..., replicate=...)`.

    Raises:
        FileNotFoundError: `directory` is not a checkpoint.
        ValueError: the checkpoint is damaged, is of another model (the error names paths and shapes
            that do not match), or requires another base: original weights or a residual.

    Example:
        See `save`.
    """
    check_directory(directory, "jlora.checkpoint.restore(directory, params)")
    call = f"jlora.checkpoint.restore({str(directory)!r}, params)"
    check_tree(params, call)
    check_replicate(replicate, call)
    source = Path(directory).absolute()
    index, checked = _read_index(source, call)
    base = detach(params)[0]
    leaves = dict(leaves_with_paths(base, is_leaf))
    unknown = sorted(set(index) - set(leaves))
    if unknown:
        raise ValueError(
            f"`{call}`: the checkpoint is of another model: {len(unknown)} of its {len(index)} "
            f'parameters are not in `params`, the first "{unknown[0]}". '
            f"{near_misses(unknown[0], leaves)}"
        )
    _same_bases(index, dict(leaves_with_paths(params, is_adapted)), call)
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
            metadata = checkpointer.metadata(source / ARRAYS).item_metadata.tree
            _verify_shapes(metadata, checked)  # before anything is allocated
            target = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), metadata)
            arrays = checkpointer.restore(source / ARRAYS, target)
    except Exception as error:  # Orbax and tensorstore raise many types for damaged files
        raise ValueError(
            f"`{call}`: the arrays cannot be read: {str(error).splitlines()[0]}. The checkpoint is "
            "damaged or incomplete; copy the full directory again."
        ) from error
    _verify_values(arrays, checked, index, call)
    nodes = {
        path: placed(_node(path, leaves[path], entry, arrays, call), leaves[path], replicate, call)
        for path, entry in index.items()
    }
    adapter = map_with_paths(lambda path, _: nodes.get(path), base, is_leaf)
    restored = bind(base, adapter)
    for path, node in leaves_with_paths(untie(restored), is_adapted):
        if isinstance(node, LoraArray):
            forms.check(path, node, call)
    return restored


def _verify_shapes(metadata: Mapping[str, Any], checked: Mapping[str, Any] | None) -> None:
    """Refuse arrays that differ from the index; an older index does not list them."""
    if checked is not None:
        found = {
            leaf: {p: (list(x.shape), np.dtype(x.dtype).name) for p, x in parts.items()}
            for leaf, parts in metadata.items()
        }
        if found != {
            leaf: {p: (x["shape"], x["dtype"]) for p, x in parts.items()}
            for leaf, parts in checked.items()
        }:
            raise ValueError(f"their shapes and dtypes differ from those in {INDEX}")


def _verify_values(
    arrays: Mapping[str, Any],
    checked: Mapping[str, Any] | None,
    index: dict[str, Any],
    call: str,
) -> None:
    """Refuse values that differ from those that were saved."""
    if checked is None:
        return
    for path, entry in index.items():
        for part, x in checked.get(entry["leaf"], {}).items():
            if x["sha256"] not in (None, digest(arrays[entry["leaf"]][part])):
                raise ValueError(
                    f'`{call}`: the {part} of "{path}" is not what was saved: its checksum differs '
                    f'from that in {INDEX}, so a file in "{ARRAYS}" is damaged. Copy the full '
                    "directory again, or use an earlier checkpoint."
                )


def _read_index(source: Path, call: str) -> tuple[dict[str, dict[str, Any]], Any]:
    file = source / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"`{call}`: this is not a checkpoint of jlora (no {INDEX}). Pass the directory that "
            "`jlora.checkpoint.save` wrote."
        )
    try:
        found = unseal(file.read_text())
        index, checked = found["leaves"], found.get("arrays")
        for entry in index.values():
            if entry["kind"] not in ("lora", "full") or not isinstance(entry["leaf"], str):
                raise KeyError("kind")
            if entry["kind"] == "lora" and set(entry["layout"]) != {"i", "o"}:
                raise KeyError("layout")
            if found["version"] not in (1, 2):
                raise KeyError(f"version {found['version']}")
            if entry["kind"] == "lora" and found["version"] == 2:
                entry["form"] = str(entry["form"])
            slices = entry.get("slices")
            if slices is not None:
                entry["slices"] = tuple((int(start), int(stop)) for start, stop in slices)
            entry["frozen"] = tuple(map(str, entry.get("frozen") or ()))  # of version 1
            entry["tied"] = {p: Tied(str(owner)) for p, owner in entry.get("tied", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`{call}`: {INDEX} is not what `jlora.checkpoint.save` writes ({error}). "
            "Copy the full directory again."
        ) from None
    return index, checked


def _same_bases(index: dict[str, Any], nodes: dict[str, Any], call: str) -> None:
    """Refuse an adapter over a residual on original weights, and the reverse."""
    for path, node in nodes.items():
        ours = getattr(node, "residual", False)
        if index.get(path, {}).get("residual", False) and not ours:
            raise ValueError(
                f'`{call}`: the adapter of "{path}" was trained over a residual, W minus the '
                "initial s A B (`pissa`, `corda`, ...), and does not fit W. Restore it into the "
                "initial parameters, recreated with the same rules, key and data, or convert it "
                "before saving: `jlora.arithmetic.residual_to_lora(params, initial, base)`."
            )
        if ours and not index.get(path, {}).get("residual", False):
            raise ValueError(
                f'`{call}`: the base of "{path}" in `params` is a residual, W minus the initial '
                "s A B, but the adapter was trained over W itself. Pass the original weights, as "
                "passed to `jlora.attach`."
            )


def _node(
    path: str, leaf: PyTree, entry: dict[str, Any], arrays: Mapping[str, Any], call: str
) -> Adapted:
    """Make one node, without its base, and verify that it fits the leaf."""
    saved = {k: jax.numpy.asarray(x) for k, x in arrays.get(entry["leaf"], {}).items()}
    if entry["kind"] == "full" and set(saved) == {"value"}:
        shapes, want = [saved["value"].shape], [leaf.shape]
        node = FullArray(None, saved["value"])
    elif entry["kind"] == "lora":
        node = _lora(path, {**saved, **entry["tied"]}, entry, call)
        if entry["tied"]:
            return node
        geometry, parts = Geometry.of(leaf.shape, node.layout), forms.parts(node)
        ones = (1,) * len(geometry.stack)  # if `jlora.tie` shares it among layers
        shapes = [node.parts[name].shape for name in parts]
        want = [
            (*ones, *shape[len(ones) :]) if found[: len(ones)] == ones else shape
            for found, shape in zip(
                shapes,
                forms.shapes(parts, geometry, node.rank, node.slices).values(),
                strict=True,
            )
        ]
    else:
        raise _missing(path, call)
    if shapes != want:
        raise ValueError(
            f"`{call}`: the saved shapes {shapes} do not fit {describe(path, leaf)}, which needs "
            f"{want}. The checkpoint is of another model."
        )
    return node


def _lora(path: str, parts: dict[str, Any], entry: dict[str, Any], call: str) -> LoraArray:
    """Make a node from its parts, without its base; version 1 has other names for them."""
    form, scaling = entry.get("form"), parts.pop("scaling", None)
    if form is None:
        try:
            form, renamed = forms.from_version_1(entry["frozen"], parts)
        except KeyError:
            raise ValueError(
                f'`{call}`: no form freezes {entry["frozen"]} of "{path}", which has the parts '
                f"{sorted(parts)}. Restore it with the version of jlora that saved it, and merge."
            ) from None
        parts = {renamed.get(name, name): x for name, x in parts.items()}
    forms.named(form, call)
    node = LoraArray(None, None, None, scaling, entry["layout"], entry.get("slices"))
    node = dataclasses.replace(node, residual=bool(entry.get("residual")), form=form)
    node = node.with_parts(parts)
    if scaling is None or set(parts) != set(forms.parts(node)):
        raise _missing(path, call)
    return node


def _missing(path: str, call: str) -> ValueError:
    return ValueError(
        f'`{call}`: the arrays of "{path}" are missing. Copy the full directory again.'
    )
