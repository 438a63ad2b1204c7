"""Read the `.lora.h5` files of Keras-Hub: `backbone.save_lora_weights(file)`.

    lora/vars/rank        lora/<i>/vars/lora_kernel_a        lora/<i>/vars/lora_kernel_b
    A: (*kernel.shape[:-1], r)        B: (r, kernel.shape[-1])        s = alpha / r

Layers are numbered, among those of the model that have weights, so the model is needed. The file
lacks alpha; by default it is r, as in Keras. The library h5py is needed.
"""

import os
from pathlib import Path
from typing import Any

import h5py
import jax.numpy as jnp
import numpy as np

from jlora._arrays import LoraArray
from jlora._paths import brief, quoted

__all__ = ["load"]


def __dir__() -> list[str]:
    return __all__


def load(
    file: str | os.PathLike[str],
    backbone: Any,
    params: dict[str, Any],
    alpha: float | int | None = None,
) -> dict[str, Any]:
    """Put the A and B of a file on the weights of a Keras model.

    The layout is "i...io": in a query's kernel (d, heads, h) every head has an A of its own, and
    all share B. `jlora.merge` is exact; run without merging, such a kernel is materialized.

    Args:
        file: a .lora.h5 file.
        backbone: the model, as it was before `enable_lora`; it is not changed.
        params: its variables by path, `{v.path: v.value for v in backbone.variables}`.
        alpha: the layers' `lora_alpha`; by default the rank.

    Returns:
        `params` with a `LoraArray` in the place of each adapted kernel.

    Raises:
        ValueError: the file is damaged or another one; a layer that the model does not have, or
            without a kernel in `params`; A or B does not fit the kernel.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace as Stub
        >>> dense = Stub(weights=[Stub(name="kernel", path="query/kernel")])
        >>> backbone = Stub(_flatten_layers=lambda include_self: [dense])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with h5py.File(f"{folder}/a.lora.h5", "w") as f:
        ...         f["lora/vars/rank"] = 2
        ...         f["lora/0/vars/lora_kernel_a"] = np.ones((4, 3, 2), np.float32)
        ...         f["lora/0/vars/lora_kernel_b"] = np.ones((2, 5), np.float32)
        ...     params = {"query/kernel": jnp.ones((4, 3, 5))}
        ...     params = load(f"{folder}/a.lora.h5", backbone, params, alpha=4.0)
        >>> params["query/kernel"].layout, float(params["query/kernel"].scaling)
        ('iio', 2.0)

    Reference: Keras-Hub's `Backbone.save_lora_weights`.
    """
    call = f"jlora.keras.load({os.fspath(file)!r}, backbone, params)"
    if not Path(file).is_file():
        raise FileNotFoundError(f"`{call}`: there is no such file.")
    rank, pairs = _read(Path(file), call)
    layers = [x for x in backbone._flatten_layers(include_self=False) if x.weights]
    scaling = jnp.float32((rank if alpha is None else alpha) / rank)
    made = dict(params)
    for index, (a, b) in pairs.items():
        layer = layers[index] if index < len(layers) else None
        weights = [] if layer is None else layer.weights
        kernel = next((v.path for v in weights if v.name == "kernel" and v.path in params), None)
        if kernel is None:
            raise ValueError(
                f"`{call}`: the file has LoRA of layer {index}, and `backbone` has "
                f"{len(layers)} layers with weights, of which that one has no kernel in `params`. "
                "Is it the model that was saved?"
            )
        w = params[kernel]
        if (*w.shape[:-1], rank) != a.shape or (rank, w.shape[-1]) != b.shape:
            raise ValueError(
                f"`{call}`: layer {index}, {quoted(kernel)} {brief(w)}, does not fit A {brief(a)} "
                f"and B {brief(b)} of rank {rank}. Is it the model that was saved?"
            )
        layout = "i" * (len(w.shape) - 1) + "o"
        made[kernel] = LoraArray(w, jnp.asarray(a), jnp.asarray(b), scaling, layout)
    return made


def _read(file: Path, call: str) -> tuple[int, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Return the rank, and A and B by the number of the layer."""
    try:
        with h5py.File(file, "r") as content:
            group = content["lora"]
            rank = int(np.asarray(group["vars/rank"]))
            pairs = {
                int(name): tuple(_tensor(group[f"{name}/vars/lora_kernel_{x}"]) for x in "ab")
                for name in group
                if name != "vars"
            }
    except Exception as error:  # a damaged file may fail anywhere in the library
        raise ValueError(
            f"`{call}`: this is not a complete .lora.h5 file of Keras-Hub "
            f"({type(error).__name__}: {brief(str(error))}). Copy it again."
        ) from error
    if rank < 1 or not pairs or any(n < 0 for n in pairs):
        raise ValueError(f"`{call}`: the file has rank {rank} and {len(pairs)} layers.")
    return rank, {n: (a, b) for n, (a, b) in pairs.items()}


def _tensor(data: Any) -> np.ndarray:
    """Read a dataset whose size is that of what is stored."""
    if data.dtype != np.float32 or data.nbytes > data.id.get_storage_size():
        raise ValueError(f"{brief(data)} is not float32, or lacks values")
    return np.asarray(data)
