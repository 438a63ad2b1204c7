"""Adapters on disk, through Orbax: what one task owns, a few MB, without the base weights.

A checkpoint describes itself: next to the arrays it keeps each leaf's path, kind and layout, so it
restores into plain base weights. It is written to a hidden folder, then renamed into place. Orbax
stores arrays without checksums; the index has one of each array and one of itself.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jlora import forms
from jlora._adapt import bind, detach
from jlora._arrays import FullArray, Geometry, LoraArray, Tied, is_adapted, is_leaf
from jlora._disk import digest, replacing, seal, unseal
from jlora._paths import describe, leaves_with_paths, map_with_paths, near_misses
from jlora._tie import untie

_INDEX = "jlora.json"
_ARRAYS = "arrays"


def save(directory: str | os.PathLike[str], params: PyTree) -> None:
    """Save the adapter of `params`, and nothing of its base weights.

    Args:
        directory: where; a checkpoint that is there already is replaced, at the end, in one step.
            Hidden folders that a killed process left next to it are removed.
        params: adapted parameters, or an adapter from `jlora.detach`.

    Raises:
        ValueError: nothing is adapted, a part of a node is taken out (`jlora.partition`), or
            `directory` holds something else than a checkpoint, or is a file or the current folder.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/adapter", params)
        ...     restored = restore(folder + "/adapter", {"w": jnp.ones((4, 6))})
        >>> bool((restored["w"].lora_a == params["w"].lora_a).all())
        True

    Reference: PEFT's `save_pretrained`; its file format is `jlora.peft`'s.
    """
    call = f"jlora.checkpoint.save({str(directory)!r}, params)"
    target = Path(directory).resolve()  # what a link points to is replaced, not the link
    nodes = {p: x for p, x in leaves_with_paths(params, is_adapted) if is_adapted(x)}
    if not nodes:
        raise ValueError(
            f"`{call}`: nothing in `params` is adapted. "
            "Give what `jlora.attach` returned, not the merged or the base weights."
        )
    _refuse_target(target, call)
    for path, node in nodes.items():
        _refuse_part(path, node, call)
    arrays, index = {}, {}
    for n, (path, node) in enumerate(sorted(nodes.items())):
        if isinstance(node, LoraArray):
            index[path] = {
                "kind": "lora",
                "form": node.form,
                "layout": node.layout,
                "slices": node.slices,
                "residual": node.residual,
                "tied": {p: x.owner for p, x in _parts(node).items() if isinstance(x, Tied)},
                "leaf": str(n),
            }
            arrays[str(n)] = {p: x for p, x in _parts(node).items() if not isinstance(x, Tied)}
        else:
            index[path] = {"kind": "full", "leaf": str(n)}
            arrays[str(n)] = {"value": node.value}
    checked = {leaf: {p: _entry(x) for p, x in parts.items()} for leaf, parts in arrays.items()}
    with replacing(target) as new:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(new / _ARRAYS, arrays)
        (new / _INDEX).write_text(seal({"version": 2, "leaves": index, "arrays": checked}))


def _entry(x: Any) -> dict[str, Any]:
    """Describe an array, so that what is read can be compared with what was written."""
    return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "sha256": digest(x)}


def _refuse_target(target: Path, call: str) -> None:
    """Refuse to replace what is no checkpoint, or the folder that the process stands in."""
    why = None
    if target.exists() and not target.is_dir():
        why = "this is a file"
    elif target == Path.cwd():
        why = "this is the current folder"
    elif target.exists() and not (target / _INDEX).is_file() and any(target.iterdir()):
        why = "the folder holds other files"
    if why is not None:
        raise ValueError(f"`{call}`: {why}, which saving would replace. Give a folder of its own.")


def _refuse_part(path: str, node: Any, call: str) -> None:
    """Refuse what `jlora.partition` returned: half of an adapter could not be restored."""
    lora = isinstance(node, LoraArray)
    needed = {**node.parts, "scaling": node.scaling} if lora else {"value": node.value}
    for name, value in needed.items():
        if value is None:
            raise ValueError(
                f'`{call}`: the {name} of "{path}" is taken out, and without it the adapter could '
                "not be restored. Give `jlora.combine(trainable, frozen)`."
            )


def _parts(node: LoraArray) -> dict[str, Any]:
    """Return what a node has beside its base."""
    parts = {**node.parts, "scaling": node.scaling}
    return {p: x if isinstance(x, Tied) else jax.numpy.asarray(x) for p, x in parts.items()}


def restore(directory: str | os.PathLike[str], params: PyTree) -> PyTree:
    """Put a saved adapter on base weights, bit for bit as it was saved, which checksums confirm.

    Args:
        directory: what `save` wrote.
        params: base parameters, plain or adapted (their adapter is left out). An adapter over a
            residual needs that residual: what the training began with, made again in the same way.

    Returns:
        The adapted parameters; the base weights are the very arrays that were given.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a checkpoint that is damaged, or of another model: the paths and shapes that do
            not fit are named; or over another kind of base, plain or residual.

    Example:
        See `save`.
    """
    call = f"jlora.checkpoint.restore({str(directory)!r}, params)"
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
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(source / _ARRAYS).item_metadata.tree
            _check_shapes(metadata, checked)  # before anything of these sizes is made
            target = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), metadata)
            arrays = checkpointer.restore(source / _ARRAYS, target)
    except Exception as error:  # Orbax and tensorstore raise of many kinds for a damaged folder
        raise ValueError(
            f"`{call}`: the arrays cannot be read: {str(error).splitlines()[0]}. The checkpoint is "
            "damaged or was copied in part; copy the whole folder again."
        ) from error
    _check_values(arrays, checked, index, call)
    nodes = {p: _node(p, leaves[p], entry, arrays, call) for p, entry in index.items()}
    adapter = map_with_paths(lambda path, _: nodes.get(path), base, is_leaf)
    restored = bind(base, adapter)
    for path, node in leaves_with_paths(untie(restored), is_adapted):
        if isinstance(node, LoraArray):
            forms.check(path, node, call)
    return restored


def _check_shapes(metadata: Any, checked: Any) -> None:
    """Refuse arrays that are not those of the index; an older index does not list them."""
    if checked is not None:
        found = {
            leaf: {p: (list(x.shape), np.dtype(x.dtype).name) for p, x in parts.items()}
            for leaf, parts in metadata.items()
        }
        if found != {
            leaf: {p: (x["shape"], x["dtype"]) for p, x in parts.items()}
            for leaf, parts in checked.items()
        }:
            raise ValueError(f"their shapes and dtypes are not those of {_INDEX}")


def _check_values(arrays: Any, checked: Any, index: dict[str, Any], call: str) -> None:
    """Refuse values that are not those that were saved."""
    for path, entry in index.items() if checked is not None else ():
        for part, x in checked.get(entry["leaf"], {}).items():
            if x["sha256"] not in (None, digest(arrays[entry["leaf"]][part])):
                raise ValueError(
                    f'`{call}`: the {part} of "{path}" is not what was saved: its checksum differs '
                    f'from that in {_INDEX}, so a file in "{_ARRAYS}" is damaged. Copy the whole '
                    "folder again, or take an earlier checkpoint."
                )


def _read_index(source: Path, call: str) -> tuple[dict[str, dict[str, Any]], Any]:
    file = source / _INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"`{call}`: no checkpoint of jlora is there (no {_INDEX}). Give the folder that "
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
            f"`{call}`: {_INDEX} is not what `jlora.checkpoint.save` writes ({error}). "
            "Copy the whole folder again."
        ) from None
    return index, checked


def _same_bases(index: dict[str, Any], nodes: dict[str, Any], call: str) -> None:
    """Refuse an adapter over a residual on plain weights, and a plain one on a residual."""
    for path, node in nodes.items():
        ours = getattr(node, "residual", False)
        if index.get(path, {}).get("residual", False) and not ours:
            raise ValueError(
                f'`{call}`: the adapter of "{path}" was trained over a residual, W less its first '
                "A and B (`pissa`, `corda`, ...), so on W it gives other numbers. Restore it into "
                "what the training began with, made again with the same rules, key and data, or "
                "save it converted: "
                "`jlora.arithmetic.residual_to_lora(params, initial, base)`."
            )
        if ours and not index.get(path, {}).get("residual", False):
            raise ValueError(
                f'`{call}`: the base of "{path}" in `params` is a residual, W less its first A and '
                "B, and the adapter is of W itself. Give the original weights, what "
                "`jlora.attach` was given."
            )


def _node(path: str, leaf: Any, entry: dict[str, Any], arrays: Any, call: str) -> Any:
    """Make one node, without its base, and check that it fits the leaf."""
    saved = {k: jax.numpy.asarray(x) for k, x in arrays.get(entry["leaf"], {}).items()}
    if entry["kind"] == "full" and set(saved) == {"value"}:
        shapes, want = [saved["value"].shape], [leaf.shape]
        node = FullArray(None, saved["value"])
    elif entry["kind"] == "lora":
        node = _lora(path, {**saved, **entry["tied"]}, entry, call)
        if entry["tied"]:
            return node
        geometry, parts = Geometry.of(leaf.shape, node.layout), forms.parts(node)
        ones = (1,) * len(geometry.stack)  # where `jlora.tie` lets the layers of a stack share
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
    """Make a node of its parts, without its base; in version 1 they have other names."""
    form, scaling = entry.get("form"), parts.pop("scaling", None)
    if form is None:
        try:
            form, renamed = forms.from_version_1(entry["frozen"], parts)
        except KeyError:
            raise ValueError(
                f'`{call}`: no form freezes {entry["frozen"]} of "{path}", which has the parts '
                f"{sorted(parts)}. Restore it with the jlora that saved it, and merge."
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
    return ValueError(f'`{call}`: the arrays of "{path}" are missing. Copy the whole folder again.')
