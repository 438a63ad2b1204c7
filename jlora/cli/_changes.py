"""What adapters change in the tensors of a checkpoint, applied to some rows at a time.

W' = g ∘ (W + Σ w s (B A)) + Σ w (V - W)        rounded once, to W's dtype
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jlora._paths import quoted
from jlora.cli._ahead import Memory, in_order
from jlora.cli._safetensors import DTYPES, Entry, Span, as_bytes, blocks

_ITEM = 32  # bytes an element counts for, so that a block's float64 product fits into a cache
_ALONE = 2**18  # multiplications that BLAS does not divide among threads of its own


class Product(NamedTuple):
    """`p q` is added to the weight, seen as `(stack, rows, columns)`."""

    p: np.ndarray  # (stack, rows, r), times w s
    q: np.ndarray  # (stack, r, columns)


class Gain(NamedTuple):
    """DoRA's magnitude, of each row or each column: the sides that are outputs."""

    m: np.ndarray
    of_rows: bool


@dataclasses.dataclass
class Change:
    """All that is done to one tensor.

    Attributes:
        products: low-rank updates.
        gain: DoRA's magnitude.
        values: weights w and values V of the tensor's shape.
        rows: weights w, indices and values of rows that were trained (tokens).
        added: vectors that are added, times w s: biases of lora_B.
        labels: what is done, for the report.
    """

    products: list[Product] = dataclasses.field(default_factory=list)
    gain: Gain | None = None
    values: list[tuple[float, np.ndarray]] = dataclasses.field(default_factory=list)
    rows: list[tuple[float, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    added: list[np.ndarray] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_replaced(self) -> bool:
        """Whether the tensor is a value alone, which is then written bit for bit."""
        others = (self.products, self.gain, self.rows, self.added)
        return len(self.values) == 1 and self.values[0][0] == 1.0 and not any(others)


def seen(shape: tuple[int, ...], layout: str | None) -> tuple[int, int, int]:
    """Return stack, rows and columns of a tensor: rows are its first axis after the stack."""
    if layout is None or len(shape) < 2:
        return 1, 1, math.prod(shape)
    lead = len(shape) - len(layout)
    return math.prod(shape[:lead]), shape[lead], math.prod(shape[lead + 1 :])


def plain(name: str, entry: Entry, dtype: str) -> Callable[[], Iterator[memoryview | Span]]:
    """Return the pieces of an unchanged tensor, cast if it has another dtype."""

    def pieces() -> Iterator[memoryview | Span]:
        count, size = math.prod(entry.shape), DTYPES[entry.dtype].itemsize
        for first, last in blocks(count, 1, size):
            if entry.dtype == dtype:
                yield Span(entry.file, entry.start + first * size, (last - first) * size)
            else:
                yield as_bytes(rounded(entry.read(first, last - first), dtype, name))

    return pieces


def changed(
    name: str, entry: Entry, change: Change, layout: str | None, dtype: str
) -> Callable[[], Iterator[memoryview]]:
    """Return the pieces of a changed tensor."""
    sides = stack, rows, columns = seen(entry.shape, layout)

    def pieces() -> Iterator[memoryview]:
        if change.is_replaced:
            yield as_bytes(rounded(change.values[0][1], dtype, name))
            return
        ready = _with_products(change, np.float64 if dtype in ("F64", "F32") else np.float32)
        gains = _column_gains(entry, ready, sides)

        def job(e: int, first: int, last: int, memory: Memory) -> memoryview:
            w = _gained(_summed(entry, ready, sides, e, first, last, memory), change, gains, first)
            out = memory.array("out", w.shape, DTYPES[dtype])
            return as_bytes(rounded(w, dtype, name, out))

        parts = ((e, *block) for e in range(stack) for block in blocks(rows, columns, _ITEM))
        yield from in_order(functools.partial(job, *part) for part in parts)

    return pieces


def _with_products(change: Change, dtype: type[np.floating]) -> Change:
    """Choose the dtype that is multiplied in.

    In float64, the sum in float32 does not depend on how many rows a block has. What is rounded to
    16 bits is multiplied in float32, in half the time: of the rounded values, one in some tens of
    thousands is another neighbor of the sum.
    """
    return dataclasses.replace(
        change,
        products=[
            Product(*(x.astype(dtype, order="C") for x in product)) for product in change.products
        ],
    )


def _multiply(p: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
    """Compute `p q` in tiles of columns, in this thread alone.

    Blocks have threads already. BLAS would start more, which wait for one another in loops that
    take the cores: with two cores the product took up to ten times as long.
    """
    (rows, rank), columns = p.shape, q.shape[1]
    step = min(columns, max(1, _ALONE // (rows * rank)))
    even = columns - columns % step
    tiles = lambda x: x[:, :even].reshape(len(x), -1, step).swapaxes(0, 1)
    np.matmul(p, tiles(q), out=tiles(out))
    np.matmul(p, q[:, even:], out=out[:, even:])


def _summed(
    entry: Entry,
    change: Change,
    sides: tuple[int, int, int],
    e: int,
    first: int,
    last: int,
    memory: Memory,
) -> np.ndarray:
    """Return some rows of the weight with all that is added."""
    _, rows, columns = sides
    shape = (last - first, columns)
    found = memory.array("found", shape, DTYPES[entry.dtype])
    entry.read_into(found, (e * rows + first) * columns)
    w = memory.array("weight", shape, np.float64 if entry.dtype == "F64" else np.float32)
    w[...] = found
    total = w.copy() if change.values or change.rows else w
    for p, q in change.products:
        product = memory.array("product", shape, p.dtype)
        _multiply(p[e, first:last], q[e], product)
        if p.dtype != w.dtype:
            added = memory.array("added", shape, w.dtype)
            added[...] = product
            product = added
        total += product
    for by, value in change.values:
        v = value.reshape(*sides)[e, first:last].astype(w.dtype)
        total += w.dtype.type(by) * (v - w)
    for by, indices, values in change.rows:
        here = (indices >= first) & (indices < last)
        at = indices[here] - first
        total[at] += w.dtype.type(by) * (values[here].astype(w.dtype) - w[at])
        if by == 1.0 and len(change.rows) == 1:
            total[at] = values[here]
    for vector in change.added:
        total += vector.reshape(1, -1)
    return total


def _column_gains(entry: Entry, change: Change, sides: tuple[int, int, int]) -> np.ndarray | None:
    """Return DoRA's gain where outputs are columns: their norms take a pass over the weight."""
    if change.gain is None or change.gain.of_rows:
        return None
    _, rows, columns = sides
    square, memory = np.zeros(columns), Memory()
    for first, last in blocks(rows, columns):
        w = _summed(entry, change, sides, 0, first, last, memory).astype(np.float64)
        square += (w * w).sum(0)
    return _gain_of(change.gain.m, np.sqrt(square))


def _gained(w: np.ndarray, change: Change, gains: np.ndarray | None, first: int) -> np.ndarray:
    if change.gain is None:
        return w
    if gains is not None:
        return w * gains[None].astype(w.dtype)
    norm = np.sqrt((w.astype(np.float64) ** 2).sum(1))
    return w * _gain_of(change.gain.m[first : first + len(w)], norm)[:, None].astype(w.dtype)


def _gain_of(m: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Return `m / ‖W + s A B‖`, and 1 for an output that is all zero."""
    return np.where(norm > 0, m.astype(np.float64) / np.where(norm > 0, norm, 1), 1)


def rounded(x: np.ndarray, dtype: str, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Cast once, into `out` if it is given; refuse values that the dtype cannot represent."""
    if x.dtype == DTYPES[dtype]:
        return x
    y = np.empty(x.shape, DTYPES[dtype]) if out is None else out
    with np.errstate(over="ignore"):
        y[...] = x
    if dtype in ("F16", "BF16", "F32") and not _is_finite(y):
        lost = ~np.isfinite(y.astype(np.float32)) & np.isfinite(x)
        if lost.any():
            raise ValueError(
                f"{quoted(name)} has values beyond the range of {dtype}, such as "
                f"{float(x[lost][0]):.3g}. Pass `--dtype bfloat16`, which has float32's."
            )
    return y


def _is_finite(x: np.ndarray) -> bool:
    """Compare bits as integers: infinities and NaNs of a sign are beyond all others of it."""
    signed, unsigned = (x.view(f"{kind}{x.itemsize}") for kind in "iu")
    inf = np.array([np.inf, -np.inf], x.dtype).view(unsigned.dtype)
    return x.size == 0 or bool(signed.max() < inf[0] and unsigned.max() < inf[1])


def describe(changes: dict[str, Change]) -> dict[str, int]:
    """Count what is done, by label."""
    counts: dict[str, int] = {}
    for change in changes.values():
        for label in change.labels:
            counts[label] = counts.get(label, 0) + 1
    return counts
