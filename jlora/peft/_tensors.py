"""The arrangement of A, B and full weights in the file of tensors.

lora_A.weight (r, in)        = Aᵀ         lora_embedding_A (r, vocab)
lora_B.weight (out, r)       = Bᵀ         lora_embedding_B (d, r)
a convolution keeps its kernel in A: (r, in, k...), (out, r, 1...); B of g groups: (out, r/g, 1...)
lora_magnitude_vector (out,) = m, of DoRA's; a convolution's is (1, out, 1...)
E experts:    A (E·r, in) expert by expert, B (out, r·E) with the expert running fastest
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora._arrays import Geometry

# The parts of a LoraArray, and the endings of their keys.
PARTS: dict[str, dict[str, str]] = {
    "linear": {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
    "embedding": {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"},
    "loralib": {"lora_a": "lora_A", "lora_b": "lora_B"},
}
_DTYPES = (np.float32, np.float16, jnp.bfloat16)
MAGNITUDE = "lora_magnitude_vector"
# Kinds of parameters that, if fully saved, have their axes in the same order in PyTorch.
AS_IT_IS = ("embedding", "Conv1D", "parameter")


def parts_of(kind: str, dora: bool = False) -> dict[str, str]:
    """Return the key endings of the parts of a kind."""
    parts = PARTS[kind if kind in PARTS else "linear"]
    return parts | ({"magnitude": MAGNITUDE} if dora else {})


def in_dtype(
    tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None, call: str
) -> dict[str, np.ndarray]:
    """Cast tensors to a dtype if given; raise for dtypes that an adapter cannot have."""
    made = {key: x if dtype is None else _cast(key, x, dtype, call) for key, x in tensors.items()}
    for key, x in made.items():
        if x.dtype not in [np.dtype(dtype) for dtype in _DTYPES]:
            raise ValueError(
                f'`{call}`: "{key}" would be of dtype {x.dtype.name}; an adapter is float32, '
                "float16 or bfloat16. Cast it first."
            )
    return made


def _cast(key: str, x: np.ndarray, dtype: DTypeLike, call: str) -> np.ndarray:
    """Cast a tensor to a narrower dtype; raise for values beyond its range."""
    with np.errstate(over="ignore"):
        y = x.astype(jnp.dtype(dtype))
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        raise ValueError(
            f'`{call}`: "{key}" has values beyond the range of {jnp.dtype(dtype).name}. Give '
            "`dtype=jnp.bfloat16`, which has float32's, or leave it out."
        )
    return y


def shapes(geometry: Geometry, rank: int, kind: str, groups: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a node's parts in the file; `rank` is that of all groups together."""
    experts = int(np.prod(geometry.stack, dtype=int))
    a, b = (rank * experts, geometry.fan_in), (geometry.fan_out, rank * experts)
    m: tuple[int, ...] = (geometry.fan_out,)
    if kind in ("conv", "grouped"):
        channels, *window = in_torch_order(geometry.layout, geometry.in_dims)
        a, b = (rank, channels, *window), (geometry.fan_out, rank // groups, *(1 for _ in window))
        m = (1, *m, *(1 for _ in window))
    return {"lora_a": a, "lora_b": b, "magnitude": m}


def in_torch_order(layout: str, in_dims: tuple[int, ...]) -> tuple[int, ...]:
    """Put a convolution's channels before its window: last in HWIO, first already in OIHW."""
    return (in_dims[-1], *in_dims[:-1]) if layout.endswith("o") else in_dims


def to_torch(parts: Mapping[str, np.ndarray], geometry: Geometry, kind: str) -> dict[str, Any]:
    """Arrange a node's parts, `(*in_dims, r)`, `(r/g, *out_dims)` and `out_dims`, for the file."""
    rank, narrow = parts["lora_a"].shape[-1], parts["lora_b"].shape[len(geometry.stack)]
    a = parts["lora_a"].reshape(*geometry.stack, geometry.fan_in, rank)
    b = parts["lora_b"].reshape(*geometry.stack, narrow, geometry.fan_out)
    shape = shapes(geometry, rank, kind, rank // narrow)
    if geometry.stack:
        a, b = a.transpose(0, 2, 1), b.transpose(2, 1, 0)  # (E, r, in), (out, r, E)
    elif kind in ("conv", "grouped") and geometry.layout.endswith("o"):
        a = np.moveaxis(a.reshape(*geometry.in_dims, rank), (-1, -2), (0, 1))  # (r, in, k...)
        b = b.T
    else:
        a, b = a.T, b.T
    return {name: x.reshape(shape[name]) for name, x in {**parts, "lora_a": a, "lora_b": b}.items()}


def from_torch(parts: Mapping[str, np.ndarray], geometry: Geometry, kind: str) -> dict[str, Any]:
    """Undo `to_torch`; with slices or groups, outputs may be fewer than the geometry's."""
    a, b = parts["lora_a"], parts["lora_b"]
    if geometry.stack:
        experts = geometry.stack[0]
        a = a.reshape(experts, -1, geometry.fan_in).transpose(0, 2, 1)  # (E, in, r)
        b = b.reshape(geometry.fan_out, -1, experts).transpose(2, 1, 0)  # (E, r, out)
    elif kind == "conv" and geometry.layout.endswith("o"):
        a, b = np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[0], -1).T  # (k..., in, r)
    else:
        a, b = a.reshape(a.shape[0], -1).T, b.reshape(b.shape[0], -1).T
    shape = {
        "lora_a": (*geometry.stack, *geometry.in_dims, a.shape[-1]),
        "lora_b": (*geometry.stack, b.shape[-2], -1, *geometry.out_dims[1:]),
        "magnitude": (*geometry.stack, *geometry.out_dims),
    }
    return {name: x.reshape(shape[name]) for name, x in {**parts, "lora_a": a, "lora_b": b}.items()}


def full_shape(shape: tuple[int, ...], geometry: Geometry | None, kind: str) -> tuple[int, ...]:
    """Return the shape in the file of a fully saved parameter with this `shape` in the tree."""
    if kind in AS_IT_IS:
        return shape
    if geometry is None:
        return (int(np.prod(shape, dtype=int)),)
    if kind == "conv":
        return (geometry.fan_out, *in_torch_order(geometry.layout, geometry.in_dims))
    return (*geometry.stack, geometry.fan_out, geometry.fan_in)


def full_to_torch(value: np.ndarray, geometry: Geometry | None, kind: str) -> np.ndarray:
    """Arrange a fully saved parameter: outputs first, then inputs; a vector is unchanged."""
    return value.transpose(_axes(value.ndim, geometry, kind)).reshape(
        full_shape(value.shape, geometry, kind)
    )


def full_from_torch(
    value: np.ndarray, shape: tuple[int, ...], geometry: Geometry | None, kind: str
) -> np.ndarray:
    """Undo `full_to_torch`; `shape` is the leaf's."""
    axes = _axes(len(shape), geometry, kind)
    moved = value.reshape([shape[k] for k in axes])
    return moved.transpose(sorted(range(len(axes)), key=axes.__getitem__))


def turns(shape: tuple[int, ...], geometry: Geometry | None, kind: str) -> bool:
    """Whether a fully saved parameter has its axes in another order in PyTorch."""
    return _axes(len(shape), geometry, kind) != tuple(range(len(shape)))


def _axes(ndim: int, geometry: Geometry | None, kind: str) -> tuple[int, ...]:
    """Return the order of a leaf's axes in PyTorch: stack, outputs, inputs (channels first)."""
    if geometry is None or kind in AS_IT_IS:
        return tuple(range(ndim))
    lead, layout = len(geometry.stack), geometry.layout
    outs = [lead + k for k, c in enumerate(layout) if c == "o"]
    ins = tuple(lead + k for k, c in enumerate(layout) if c == "i")
    return (*range(lead), *outs, *(in_torch_order(layout, ins) if kind == "conv" else ins))
