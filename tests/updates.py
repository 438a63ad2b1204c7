"""Random adapters of one weight, and their updates in float64 by NumPy alone."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jlora

DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16))
SIZES = st.sampled_from([1, 2, 3])


@st.composite
def layouts(draw):
    """Draw a layout with both letters."""
    rest = draw(st.lists(st.sampled_from("io"), max_size=2))
    return "".join(draw(st.permutations(["i", "o", *rest])))


@st.composite
def weights(draw):
    """Draw a shape, its layout and slices of its outputs or None."""
    layout = draw(layouts())
    stack = draw(st.lists(SIZES, max_size=1))
    shape = (*stack, *(draw(SIZES) if c == "i" else draw(SIZES) + 1 for c in layout))
    width = shape[len(stack) + layout.index("o")]
    slices = draw(st.sampled_from([None, None, ((0, 1), (width - 1, width))]))
    return shape, layout, slices


def node_of(shape, layout, slices, rank, dtype=np.float32, seed=0, scalar=False, base=None):
    """Make a LoraArray of random values; with slices, one update for each."""
    rng = np.random.default_rng(seed)
    split = len(shape) - len(layout)
    stack, dims = shape[:split], shape[split:]
    ins, outs = ([n for n, k in zip(dims, layout, strict=True) if k == c] for c in "io")
    parts = 1
    if slices is not None:
        parts, outs = len(slices), [sum(stop - start for start, stop in slices), *outs[1:]]
    draw = lambda *s: rng.normal(size=s).astype(dtype)  # NumPy: nothing to compile
    scaling = np.asarray(rng.normal(size=() if scalar else stack), np.float32)
    a, b = draw(*stack, *ins, rank * parts), draw(*stack, rank, *outs)
    return jlora.LoraArray(base, a, b, scaling, layout, slices)


def dense(node: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`s · A B` in float64, arranged as the weight."""
    layout = node.layout
    split = len(shape) - len(layout)
    stack, dims = shape[:split], shape[split:]
    ins, outs = ([n for n, k in zip(dims, layout, strict=True) if k == c] for c in "io")
    double = lambda x: np.asarray(x).astype(np.float64)
    a = double(node.lora_a).reshape(*stack, math.prod(ins), -1)
    b = double(node.lora_b).reshape(*stack, node.rank, -1, *outs[1:])
    out, first = np.zeros((*stack, math.prod(ins), *outs)), 0
    for k, (start, stop) in enumerate(node.slices or ((0, outs[0]),)):
        block = a[..., k * node.rank : (k + 1) * node.rank]
        lead = (slice(None),) * (split + 1)
        piece = b[(*lead, slice(first, first + stop - start))]
        wide = piece.reshape(*stack, node.rank, -1)
        out[(*lead, slice(start, stop))] += (block @ wide).reshape(
            *stack, math.prod(ins), *piece.shape[split + 1 :]
        )
        first += stop - start
    s = double(node.scaling)
    out *= s.reshape(*s.shape, *(1,) * (out.ndim - s.ndim))
    out = out.reshape(*stack, *ins, *outs)
    order = sorted(range(len(layout)), key=lambda k: layout[k])
    back = sorted(range(len(order)), key=order.__getitem__)
    return out.transpose(*range(split), *(split + k for k in back))


def matrix(node: Any, x: np.ndarray) -> np.ndarray:
    """A weight as `(*stack, in, out)`."""
    split = x.ndim - len(node.layout)
    order = sorted(range(len(node.layout)), key=lambda k: node.layout[k])
    dims = x.shape[split:]
    fan_in = math.prod(n for n, k in zip(dims, node.layout, strict=True) if k == "i")
    moved = x.transpose(*range(split), *(split + k for k in order))
    return moved.reshape(*x.shape[:split], fan_in, -1)


def far(got, want) -> float:
    """The distance relative to the norm, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
