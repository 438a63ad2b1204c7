"""Save an adapter: its arrays, and an index with their paths, kinds, layouts and checksums."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from jlora._arrays import Adapted, LoraArray, Tied, is_adapted
from jlora._boxes import leaves_with_paths
from jlora._check import check_directory, check_tree
from jlora._disk import digest, replacing, seal
from jlora._processes import gathered, in_first

INDEX = "jlora.json"
ARRAYS = "arrays"


def save(directory: str | os.PathLike[str], params: PyTree) -> None:
    """Save the adapter of `params`, without the base weights.

    In a program of several processes each of them calls `save`. Arrays that are sharded over
    processes are gathered one by one, and process 0 writes.

    Args:
        directory: the target; an existing checkpoint is replaced by a rename once the new one is
            written. Hidden directories left next to it by killed processes are removed.
        params: adapted parameters, or an adapter from `jlora.detach`.

    Raises:
        ValueError: nothing is adapted; a part of a node is missing (`jlora.partition`);
            `directory` contains something other than a checkpoint, is a file or is the current
            directory.
        RuntimeError: in the other processes, if process 0 raises.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from jlora import LoraSpec, attach
        >>> from jlora.checkpoint import restore, save
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder + "/adapter", params)
        ...     restored = restore(folder + "/adapter", {"w": jnp.ones((4, 6))})
        >>> bool((restored["w"].lora_a == params["w"].lora_a).all())
        True

    Reference: PEFT's `save_pretrained`; for its file format see `jlora.peft`.
    """
    check_directory(directory, "jlora.checkpoint.save(directory, params)")
    call = f"jlora.checkpoint.save({str(directory)!r}, params)"
    check_tree(params, call)
    target = Path(directory).resolve()  # replaces the target of a link, not the link
    nodes = {p: x for p, x in leaves_with_paths(params, is_adapted) if is_adapted(x)}
    if not nodes:
        raise ValueError(
            f"`{call}`: nothing in `params` is adapted. "
            "Pass what `jlora.attach` returned, not the merged or the base weights."
        )
    in_first(lambda: _refuse_target(target, call), call)
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
    arrays = gathered(arrays)
    in_first(lambda: _write(target, arrays, index), call)


def _write(target: Path, arrays: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    checked = {leaf: {p: _entry(x) for p, x in parts.items()} for leaf, parts in arrays.items()}
    with replacing(target) as new:
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
            checkpointer.save(new / ARRAYS, arrays)
        (new / INDEX).write_text(seal({"version": 2, "leaves": index, "arrays": checked}))


def alone() -> ocp.options.MultiprocessingOptions:
    """Return the options under which Orbax does not wait for other processes."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, f"jlora-{own}")


def _entry(x: Array | np.ndarray) -> dict[str, Any]:
    """Return shape, dtype and checksum of an array, to verify what is read."""
    return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "sha256": digest(x)}


def _refuse_target(target: Path, call: str) -> None:
    """Refuse to replace anything but a checkpoint, and the current directory."""
    why = None
    if target.exists() and not target.is_dir():
        why = "this is a file"
    elif target == Path.cwd():
        why = "this is the current directory"
    elif target.exists() and not (target / INDEX).is_file() and any(target.iterdir()):
        why = "the directory contains other files"
    if why is not None:
        raise ValueError(
            f"`{call}`: {why}, which saving would replace. Pass a new or empty directory."
        )


def _refuse_part(path: str, node: Adapted, call: str) -> None:
    """Refuse the output of `jlora.partition`: half of an adapter could not be restored."""
    needed = (
        {**node.parts, "scaling": node.scaling}
        if isinstance(node, LoraArray)
        else {"value": node.value}
    )
    for name, value in needed.items():
        if value is None:
            raise ValueError(
                f'`{call}`: the {name} of "{path}" is missing, and without it the adapter could '
                "not be restored. Pass `jlora.combine(trainable, frozen)`."
            )


def _parts(node: LoraArray) -> dict[str, Any]:
    """Return all parts of a node except its base."""
    parts = {**node.parts, "scaling": node.scaling}
    return {p: x if isinstance(x, Tied) else jax.numpy.asarray(x) for p, x in parts.items()}
