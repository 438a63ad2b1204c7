"""Merge adapters into plain weights, one layer of a stack at a time."""

import dataclasses
import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jlora import _compat, forms
from jlora._adapt import check_nodes, rounded
from jlora._arrays import FullArray, Geometry, LoraArray, accumulator, is_adapted, is_leaf
from jlora._base import built, is_stored, stored_as
from jlora._boxes import leaves_with_paths, map_with_paths
from jlora._check import check_tree
from jlora._nnx import Opened
from jlora._paths import describe
from jlora._placed import sharding_of
from jlora.quant import QuantArray
from jlora.quant._quantize import quantized


def merge(params: PyTree, *, requantize: bool = False) -> PyTree:
    """Build the plain weights, `W + s · A B`, rounded once, to W's dtype.

    The sum is taken in float32 or wider; float8 weights saturate at the limits of their range. A
    warning is issued where rounding to 16 bits or less loses more than half of an update (not
    under `jax.jit`). DoRA's weights are `m · (W + s · A B) / ‖W + s · A B‖`, and no gradient flows
    through the norm. Stored weights are dequantized, adapted or not, unless `requantize` is true.

    The layers of a stack are merged one after another, so the sums of two of them never exist
    together; in `jax.jit(jlora.merge, donate_argnums=0)` they replace those of W in its buffer. A
    stack that is sharded along its first axis is not gathered: the elements that its devices hold
    are merged at the same time.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes.
        requantize: whether a weight over a stored base is stored in the base's format again, which
            rounds away a part of its update (the warning above is issued here too), and other
            stored weights stay as they are. A weight whose update is zero keeps every byte.

    Returns:
        Plain parameters for any model. Inference costs the same as for the base model.

    Raises:
        ValueError: the parts of a node are missing or have wrong shapes; with `requantize`, a base
            in a format that is only read, such as `jlora.quant.Q4_K`.
        TypeError: with `requantize`, a base that is a stored weight, but no `QuantArray`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> bool((merge(params)["w"] == params["w"].base).all())
        True

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4.1. PEFT's `merge_and_unload`, which
    rounds the delta and the sum separately under `safe_merge`.
    """
    check_tree(params, "jlora.merge(params)")
    opened = Opened(params)
    params = opened.tree
    check_nodes(params, "jlora.merge")
    lost: dict[str, Array] = {}

    def merged_leaf(path: str, node: PyTree) -> PyTree:
        if isinstance(node, FullArray):
            return node.value
        if not isinstance(node, LoraArray):
            return node if requantize else built(node)
        traced = any(map(_compat.is_traced, jax.tree.leaves(node)))
        if requantize and is_stored(node.base):
            summed = forms.weight(node)
            stored = _stored_again(path, node.base, rounded(summed, node.dtype))
            if not traced:
                lost[path] = _lost_share(_squares(node, summed, built(stored)))
            return stored
        narrow = jnp.finfo(node.dtype).bits < 32
        merged, squares = _merged(node, measured=narrow and not traced)
        if squares is not None:
            lost[path] = _lost_share(squares)
        return merged

    tree = map_with_paths(merged_leaf, params, is_leaf)
    _warn_of_loss(params, lost)
    return opened.closed(tree)


def _merged(node: LoraArray, measured: bool) -> tuple[Array, Array | None]:
    """Return the merged weight and, if `measured`, the squares of `_squares`."""
    stack, sharding = Geometry.of(node.shape, node.layout).stack, sharding_of(node.base)
    explicit = isinstance(sharding, NamedSharding) and _compat.is_explicit(sharding)
    if explicit:  # where axes of one side cannot be joined if one but the first is sharded
        out = sharding, NamedSharding(sharding.mesh, PartitionSpec()) if measured else None
        return _compat.without_shardings(lambda node: _merged(node, measured), out, node)
    traced = any(map(_compat.is_traced, jax.tree.leaves(node.base)))
    together = _together(sharding, stack[0], traced) if stack and all(stack) else 0
    if not together:
        summed = forms.weight(node)
        merged = rounded(summed, node.dtype)
        return merged, _squares(node, summed, merged) if measured else None
    named = isinstance(sharding, NamedSharding) and not explicit
    at = sharding if named and not is_stored(node.base) else None
    merged = _stacked(node, together, _devices(sharding), at)
    if not measured:
        return merged, None
    if together > 1:
        return merged, _squares(node, forms.weight(node), merged)
    return merged, _squares_by_layer(_with_stacked_scaling(node), merged)


def _with_stacked_scaling(node: LoraArray) -> LoraArray:
    stack = Geometry.of(node.shape, node.layout).stack
    return dataclasses.replace(node, scaling=jnp.broadcast_to(node.scaling, stack))


@functools.partial(jax.jit, static_argnames=("together", "devices", "at"))
def _stacked(node: LoraArray, together: int, devices: int, at: NamedSharding | None) -> Array:
    """Merge a stack without its sums in float32, in the buffer of W if it is donated.

    XLA's CPU compiler would copy a stack of 16 bits for each layer that is written into it. There
    the product is a sum over the rank in one loop over the elements of W.
    """
    node = forms.as_lora(_with_stacked_scaling(node))
    turn = functools.partial(_in_turn, together=together, devices=devices)
    if getattr(node.base, "stack", 0):
        return turn(node)
    node = dataclasses.replace(node, base=built(node.base))
    narrow = jnp.finfo(node.dtype).bits < 32
    cpu = lambda node: rounded(_by_element(node), node.dtype)
    merged = lax.platform_dependent(node, cpu=cpu, default=turn) if narrow else turn(node)
    return merged if at is None else lax.with_sharding_constraint(merged, at)


def _together(sharding: Any, size: int, traced: bool) -> int:
    """Return how many elements of a stack to merge at once, a divisor of its size; 0 for all.

    One, unless the devices have different elements of the stack: a loop over these would gather the
    weight. In a traced program it is not known whether they do, but no more of them can than divide
    both the size and the number of devices. Of groups of that many, taken at equal distances, every
    device has its own part.
    """
    if traced and sharding is None:
        return math.gcd(size, _devices(sharding))
    if not (isinstance(sharding, NamedSharding) and any(sharding.spec[:1])):
        return 1
    return 0 if _compat.is_explicit(sharding) else math.gcd(size, _devices(sharding))


def _devices(sharding: Any) -> int:
    """Return the number of devices that may have different parts of a weight."""
    if isinstance(sharding, NamedSharding):
        return sharding.mesh.size
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() if mesh.empty else mesh.size


class _Cut(NamedTuple):
    """A stack in groups of `together` elements; one more axis in `pieces` pieces of `parts` runs.

    Elements of a group and runs of a piece are at equal distances: those of one device are its own.
    """

    together: int
    parts: int = 1
    pieces: int = 1

    def view(self, x: Array, axis: int | None) -> Array:
        """Split the stack, and `axis` if there are pieces, so that a piece is one slice."""
        new = [self.together, x.shape[0] // self.together]
        for k, n in enumerate(x.shape[1:], 1):
            cut = k == axis and self.pieces > 1
            new += [self.parts, self.pieces, n // self.parts // self.pieces] if cut else [n]
        return x.reshape(new)

    def piece(self, view: Array, axis: int | None, n: Array | int) -> Array:
        """Return the nth piece of a `view`: `(together, *dims)`."""
        start, size = self._at(view, axis, n)
        found = lax.squeeze(lax.dynamic_slice(view, start, size), (1,))
        if axis is None or self.pieces == 1:
            return found
        shape = found.shape
        joined = shape[axis] * shape[axis + 2]
        return found.reshape(*shape[:axis], joined, *shape[axis + 3 :])

    def put(self, view: Array, piece: Array, axis: int, n: Array | int) -> Array:
        """Write the nth piece into a `view`."""
        start, size = self._at(view, axis, n)
        return lax.dynamic_update_slice(view, piece.reshape(size), start)

    def _at(self, view: Array, axis: int | None, n: Array | int) -> tuple[list[Any], list[int]]:
        start: list[Any] = [0] * view.ndim
        size = [*view.shape]
        start[1], size[1] = n // self.pieces, 1
        if axis is not None and self.pieces > 1:
            start[axis + 2], size[axis + 2] = n % self.pieces, 1
        return start, size


def _by_element(node: LoraArray) -> Array:
    """Return `forms.weight(node)`, of a LoRA node, as one loop over the elements of W.

    The product is written as a sum over the rank, which XLA fuses with what uses it.
    """
    wide = jnp.promote_types(accumulator(node.lora_a.dtype), accumulator(node.dtype))
    depth = len(node.shape) - len(node.layout)
    roles = "s" * depth + node.layout

    def spread(x: Array, over: str) -> Array:
        dims = [n if role in over else 1 for n, role in zip(node.shape, roles, strict=True)]
        return x.astype(wide).reshape(*dims, x.shape[-1])

    a = spread(node.lora_a, "si")
    b = spread(jnp.moveaxis(node.lora_b, depth, -1), "so")
    ab = jnp.sum(jnp.multiply(*jnp.broadcast_arrays(a, b)), -1)
    s = node.scaling.astype(wide).reshape(*node.scaling.shape, *(1,) * len(node.layout))
    summed = node.base.astype(wide) + jnp.broadcast_to(s, ab.shape) * ab
    gain = forms.gain(node)
    if gain is None:
        return summed
    across = Geometry.of(node.shape, node.layout).across(gain)
    return summed * jnp.broadcast_to(across, summed.shape)


def _in_turn(node: LoraArray, together: int, devices: int) -> Array:
    """Merge `together` elements of a stack at a time, writing them where those of W were.

    If they are several, in pieces of the first axis after the stack, each no larger than one.
    """
    depth, dense = len(node.shape) - len(node.layout), not is_stored(node.base)
    axes = {"lora_a": depth} if node.layout[0] == "i" else {"lora_b": depth + 1, "magnitude": depth}
    cut = _Cut(together)
    # A gain is computed from all inputs, and a stored weight is built as a whole.
    if dense and together > 1 and not ("lora_a" in axes and forms.has_gain(node)):
        parts = math.gcd(node.shape[depth], devices)
        run = node.shape[depth] // parts
        pieces = next(n for n in range(min(together, run), run + 1) if run % n == 0)
        cut = _Cut(together, parts, pieces)
    parts_of = {**node.parts, "scaling": node.scaling}
    views = {k: cut.view(x, axes.get(k)) for k, x in parts_of.items()}
    codes = None if dense else jax.tree.map(lambda x: cut.view(x, None), node.base)

    def step(n: Any, weights: Array) -> Array:
        own = {k: cut.piece(x, axes.get(k), n) for k, x in views.items()}
        piece = lambda x: cut.piece(x, None, n)
        base = cut.piece(weights, depth, n) if dense else jax.tree.map(piece, codes)
        layer = dataclasses.replace(node, base=base, scaling=own.pop("scaling")).with_parts(own)
        return cut.put(weights, rounded(forms.weight(layer), node.dtype), depth, n)

    start = cut.view(node.base if dense else jnp.zeros(node.shape, node.dtype), depth)
    count = node.shape[0] // together * cut.pieces
    return lax.fori_loop(0, count, step, start).reshape(node.shape)


def _stored_again(path: str, base: PyTree, merged: Array) -> PyTree:
    """Store a merged weight in the format of its base; the base itself if nothing was added."""
    call = "jlora.merge(params, requantize=True)"
    if not _compat.is_traced(merged) and bool((merged == built(base)).all()):
        return base
    if not isinstance(base, QuantArray):
        raise TypeError(
            f"`{call}`: the base of {describe(path, base)} is stored as `{stored_as(base)}`, which "
            "is no format of `jlora.quant`. Merge to dense weights, `jlora.merge(params)`."
        )
    if getattr(base.format, "write", base.format) is None:
        raise ValueError(
            f"`{call}`: the base of {describe(path, base)} is stored as {base.format}, which is "
            "read from GGUF files and not written. Merge to dense weights, `jlora.merge(params)`, "
            'and store those in another format: `jlora.quantize(merged, {".*/kernel": "q8_0"})`.'
        )
    return quantized(path, merged, base.format, base.layout, call)


def _squares(node: LoraArray, summed: Array, merged: Array) -> Array:
    """Return ‖summed‖², ‖summed - base‖² and ‖merged - summed‖²."""
    update = summed - built(node.base).astype(summed.dtype)
    error = merged.astype(summed.dtype) - summed
    return jnp.stack([jnp.sum(x * x) for x in (summed, update, error)]).astype(jnp.float32)


@jax.jit
def _squares_by_layer(node: LoraArray, merged: Array) -> Array:
    each = lambda pair: _squares(pair[0], forms.weight(pair[0]), pair[1])
    return jnp.sum(lax.map(each, (node, merged)), axis=0)


def _lost_share(squares: Array) -> Array:
    """Return ‖merged - summed‖ / ‖summed - base‖; 0 if the update is only rounding error."""
    total, size, lost = jnp.sqrt(squares)
    return jnp.where(size > 1e-5 * total, lost / size, 0.0)


def _warn_of_loss(params: PyTree, lost: dict[str, Array]) -> None:
    """Warn where a narrow dtype keeps less than half of an update."""
    shares = {path: float(x) for path, x in jax.device_get(lost).items()}
    most = {path: share for path, share in shares.items() if share > 0.5}
    if most:
        path = max(most, key=most.__getitem__)
        node = dict(leaves_with_paths(params, is_adapted))[path]
        kind = f"format, {stored_as(node.base)}," if is_stored(node.base) else "dtype"
        warnings.warn(
            f"`jlora.merge`: rounding to the base's {kind} loses {most[path]:.0%} of the update of "
            f"{describe(path, node.base)}; {len(most)} weights lose more than half of theirs. The "
            "merged model is closer to the base model than to the adapted one. Use the adapter "
            "unmerged, `jlora.lora`, or merge into a base cast to a wider dtype.",
            stacklevel=3,
        )
