"""Other forms of A and B: convolutions with groups, loralib, leaves of several parameters.

PEFT, g groups      A (r, in, k...) reads all channels, B (out, r/g, 1...): g slices of the outputs
MergedLinear        A (n·r, in), B (n·h, r): n slices of the outputs
loralib's Conv2d    W = B A read as (out, in, k, k), A (r·k, in·k), B (out·k, r·k)
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import forms
from jlora._arrays import Geometry, LoraArray
from jlora._spec import LoraSpec
from jlora.peft._names import Place
from jlora.peft._tensors import in_torch_order, shapes

Slices = tuple[tuple[int, int], ...] | None
Parts = Mapping[str, np.ndarray]


class Form(NamedTuple):
    """One module's tensors as `from_torch` reads them, and the shapes required in the file."""

    tensors: Parts
    rank: int
    slices: Slices
    wanted: Mapping[str, tuple[int, ...]]


def equal_ranges(size: int, n: int) -> tuple[tuple[int, int], ...]:
    """Divide an output dimension into n ranges."""
    return tuple((k * size // n, (k + 1) * size // n) for k in range(n))


def of_peft(
    parts: Parts, geometry: Geometry, kind: str, rank: int, place: Place, call: str
) -> Form:
    """Read PEFT's form; a convolution of g groups has a B g times as narrow as its A."""
    a, b = parts["lora_a"], parts["lora_b"]
    narrow = b.shape[1] if kind == "conv" and b.ndim > 1 and a.shape[0] == rank else rank
    groups = rank // max(1, narrow)
    if groups < 2 or geometry.fan_out % groups:
        return Form(parts, rank, None, shapes(geometry, rank, kind))
    channels = in_torch_order(geometry.layout, geometry.in_dims)[0]
    if a.shape[1:2] == (groups * channels,):
        raise ValueError(
            f'`{call}`: "{place.module}" has {groups} groups, and its A in PEFT reads the '
            f"{a.shape[1]} channels of all groups, so its update has {a.shape[1]} "
            f'input channels, while "{place.path}" has {channels}. Write the layer without '
            "groups, its kernel zero between one group's inputs and another's outputs."
        )
    slices = equal_ranges(geometry.out_dims[0], groups)
    return Form(parts, rank, slices, shapes(geometry, rank, kind, groups))


def of_loralib(
    parts: Parts, geometry: Geometry, kind: str, slices: Slices, place: Place, call: str
) -> Form:
    """Read loralib's form: a linear or an embedding layer, a merged one, or a convolution."""
    a, b = parts["lora_a"], parts["lora_b"]
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape):
        return Form(parts, 1, None, shapes(geometry, 1, "linear"))
    if kind == "conv":
        return _convolution(a, b, geometry, place, call)
    rank = b.shape[1]
    n, width = a.shape[0] // rank, geometry.out_dims[0]
    covers_all = b.shape[0] == geometry.fan_out
    divides = n * rank == a.shape[0] and geometry.fan_out * n % b.shape[0] == 0
    if slices is None and (not divides or (n == 1 and covers_all)):
        return Form(parts, rank, None, shapes(geometry, rank, "linear"))
    if slices is None and covers_all and width % n == 0:
        slices = equal_ranges(width, n)
    if slices is None:
        raise ValueError(
            f'`{call}`: from its shapes, "{place.module}" is a MergedLinear of loralib with {n} '
            "adapted parts, but the file does not record which (`enable_lora`). Give "
            f'`slices={{"{place.path}": ((start, stop), ...)}}`.'
        )
    slices = LoraSpec(rank, slices=slices).slices
    want = forms.factor_shapes(geometry, rank, slices)
    wanted = {"lora_a": (want[0][-1], geometry.fan_in)}
    wanted["lora_b"] = (int(np.prod(want[1])) // rank, rank)
    return Form(parts, rank, slices, wanted)


def _convolution(a: np.ndarray, b: np.ndarray, geometry: Geometry, place: Place, call: str) -> Form:
    """Write `(B A).view(out, in/g, k, k)` as a kernel's A and a pointwise B, of rank g·k·(r·k).

    Output o = g·o' + q reads from the k rows of B A that begin at o'·k: the element x of its kernel
    is in the row p(q, x) of those and in the column c(q, x). So with one A for each q and p,
    A[(q, p, m), x] = A[m, c(q, x)] where p(q, x) = p, and B[o, (q, p, m)] = B[o'·k + p, m].
    """
    channels, *window = in_torch_order(geometry.layout, geometry.in_dims)
    k, size, out = window[0], geometry.fan_in, geometry.fan_out
    rank, inputs = max(1, a.shape[0] // k), max(1, a.shape[1] // k)
    groups = max(1, inputs // channels)
    wanted = {"lora_a": (rank * k, groups * channels * k)}
    wanted["lora_b"] = (out // groups * k, rank * k)
    if a.shape != wanted["lora_a"] or b.shape != wanted["lora_b"]:
        return Form({"lora_a": a, "lora_b": b}, rank, None, wanted)
    if groups * size != inputs * k * k or out % groups:
        raise ValueError(
            f"`{call}`: loralib supports convolutions with a window of k · k or of 1 only; "
            f'"{place.path}" {list(place.shape)} has {window}.'
        )
    row, column = np.divmod(np.arange(groups * size).reshape(groups, size), inputs * k)
    here = row[:, None, None] == np.arange(k)[None, :, None, None]  # (q, p, 1, x)
    wide_a = np.where(here, a[:, column].swapaxes(0, 1)[:, None], np.zeros((), a.dtype))
    wide_b = np.zeros((out // groups, groups, groups, k, rank * k), b.dtype)
    for q in range(groups):
        wide_b[:, q, q] = b.reshape(out // groups, k, rank * k)
    tensors = {
        "lora_a": wide_a.reshape(-1, channels, *window),
        "lora_b": wide_b.reshape(out, -1, *(1 for _ in window)),
    }
    return Form(tensors, rank, None, wanted)


class Shaped:
    """A shape, for functions that only read shapes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim, self.dtype = shape, len(shape), ""


def unrolled(node: LoraArray, depth: int) -> LoraArray:
    """Turn the leading `depth` dimensions, separate parameters in PyTorch, into stack.

    If they are outputs (Gemma's keys and values in one kernel, read as "ooio"), the parameters
    share A; if they are inputs, they share B. Each gets a copy.
    """
    while len(stack := node.lora_a.shape[: node.lora_a.ndim - node.layout.count("i") - 1]) < depth:
        at, a, b = len(stack), node.lora_a, node.lora_b
        if node.layout[0] == "o":
            b = jnp.moveaxis(b, at + 1, at)  # (*stack, n, rank, ...)
            n = b.shape[at]
            a = jnp.broadcast_to(jnp.expand_dims(a, at), (*stack, n, *a.shape[at:]))
        else:
            n = a.shape[at]
            b = jnp.broadcast_to(jnp.expand_dims(b, at), (*stack, n, *b.shape[at:]))
        s = jnp.asarray(node.scaling)
        s = jnp.broadcast_to(jnp.expand_dims(s, -1), (*s.shape, n)) if s.ndim else s
        layout = node.layout[1:]
        node = dataclasses.replace(node, lora_a=a, lora_b=b, scaling=s, layout=layout)
    return node
