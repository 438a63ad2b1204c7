"""What `LoraArray.base` may be: an array, or a stored weight, which is built where it is used.

In the walk a stored weight is `Deferred`: an expression over the stored arrays. Operations that
only rearrange a weight (transpose, slice, cast, concatenate, ...) extend the expression and run
nothing. A product evaluates it, multiplies and drops the result, so only the stored arrays are
residuals of the backward pass:

    y = x · build(stored)      residual: stored      backward: dx = dy · build(stored)ᵀ, rebuilt

`jax.checkpoint` around build and product does this. Stored arrays are frozen: no gradient reaches
them.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, PyTree

from jlora import _compat
from jlora._paths import short_repr


class StoredWeight(Protocol):
    """Represent a weight by a registered pytree node: codes and scales, a packed file's bytes.

    Its leaves are stored in memory and on disk, and visible to `jax.jit`, `jax.device_put` and
    Orbax. jlora treats the node as one leaf.

    Two attributes are optional:

    - `stack`, the number of leading axes that the weight shares with every leaf of the node, so
      that indexing them in each leaf gives the node of one layer. `lax.scan` and indexing then
      build one layer at a time. Derive it from the leaves' shapes, as `shape`.
    - `dot(x, axes, dtype)`, the format's own product `x · W`: contract the axes `axes[0]` of x
      with the axes `axes[1]` of the weight; return the remaining axes of x, then those of the
      weight, in `dtype`. If it returns `NotImplemented`, the weight is built.
      It is asked for products of one dtype at the default precision.

    Three more: `builds = True` says that `dot` builds the weight. Where the leaves have other axes
    than the weight, `axes_of(entries, mesh)` returns the mesh axes of each axis of the weight,
    given those of its largest leaf. On meshes with explicit axes, `explicit_sharding()` returns the
    sharding that `dequantize` gives to the weight; without such axes, None.

    Example:
        >>> import dataclasses, functools, jax, jax.numpy as jnp, jlora
        >>> @functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"),
        ...     meta_fields=())
        ... @dataclasses.dataclass(frozen=True)
        ... class Int8:
        ...     codes: jax.Array  # (in, out)
        ...     scale: jax.Array  # ()
        ...     dtype = jnp.dtype("float32")
        ...     shape = property(lambda self: self.codes.shape)
        ...     def dequantize(self):
        ...         return self.codes.astype(self.dtype) * self.scale
        >>> w = Int8(jnp.ones((4, 6), jnp.int8), jnp.float32(0.5))
        >>> jlora.lora(lambda p, x: x @ p["w"])({"w": w}, jnp.ones((3, 4))).shape
        (3, 6)
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the represented weight."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype of the represented weight."""
        ...

    def dequantize(self) -> Array:
        """Build the weight."""
        ...


def is_stored(x: object) -> bool:
    """Whether `x` is a stored weight. Asks its type, because its leaves may be anything."""
    return hasattr(type(x), "dequantize")


def stored_as(x: PyTree) -> str:
    """Name how a stored weight is stored: by its format, if it has one, or by its type."""
    return str(getattr(x, "format", type(x).__name__))


class Step(NamedTuple):
    """One output of one operation, compared by value so that equal layers share one trace."""

    primitive: Any
    params: tuple[tuple[str, Hashable], ...]
    output: int
    shape: tuple[int, ...]
    dtype: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("operands",), meta_fields=("step",)
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Deferred:
    """A weight that is not built yet: a stored weight, or an operation on one.

    Attributes:
        operands: the operation's operands, arrays or `Deferred`; without one, the stored weight.
        step: the operation, or None for the stored weight itself.
    """

    operands: tuple[Any, ...]
    step: Step | None = None

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.operands[0].shape) if self.step is None else self.step.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.operands[0].dtype if self.step is None else self.step.dtype

    @property
    def ndim(self) -> int:
        """The number of dimensions of the weight."""
        return len(self.shape)

    @property
    def stack(self) -> int:
        """The number of leading axes that can be sliced before the weight is built."""
        return getattr(self.operands[0], "stack", 0) if self.step is None else 0

    def build(self) -> Array:
        """Evaluate the expression."""
        if self.step is None:
            return self.operands[0].dequantize()
        primitive, params, output, _, _ = self.step
        return _compat.apply(primitive, dict(params), *map(built, self.operands))[output]


Base = Array | Deferred


def deferred(base: PyTree) -> PyTree:
    """Wrap a stored weight in `Deferred`, without gradient; return any other base unchanged."""
    return Deferred((jax.tree.map(lax.stop_gradient, base),)) if is_stored(base) else base


def built(x: PyTree) -> PyTree:
    """Build a stored weight or a `Deferred`; return anything else unchanged."""
    if isinstance(x, Deferred):
        return x.build()
    return x.dequantize() if is_stored(x) else x


def standin(x: PyTree) -> PyTree:
    """Return what a function is traced on: the shape and dtype of a stored weight, or `x`."""
    if not is_stored(x):
        return x
    sharding = x.explicit_sharding() if hasattr(x, "explicit_sharding") else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def using(fn: Callable[..., Any], *operands: PyTree) -> PyTree:
    """Build deferred operands, for this call alone, and call `fn`: see the top of this file."""
    if not any(isinstance(x, Deferred) for x in operands):
        return fn(*operands)
    return jax.checkpoint(lambda *operands: fn(*map(built, operands)))(*operands)


def bind(eqn: JaxprEqn, *operands: PyTree) -> list[Any]:
    """Apply an equation; deferred operands are built for this equation alone."""
    if not any(isinstance(x, Deferred) for x in operands):
        return _compat.bind(eqn, *operands)

    def run(*operands: PyTree) -> list[Any]:
        own = _own_product(eqn, operands)
        return _compat.bind(eqn, *map(built, operands)) if own is NotImplemented else [own]

    return jax.checkpoint(run)(*operands)


def rearrange(eqn: JaxprEqn, *operands: PyTree) -> list[Any]:
    """Apply an equation whose results are weights; for a deferred operand, defer it too."""
    if not any(isinstance(x, Deferred) for x in operands):
        return _compat.bind(eqn, *operands)
    sliced = _layers(eqn, operands)
    if sliced is not None:
        return [sliced]
    params = tuple(sorted(eqn.params.items()))
    try:
        hash(params)
    except TypeError:
        return bind(eqn, *operands)
    avals: list[Any] = [v.aval for v in eqn.outvars]
    return [
        Deferred(operands, Step(eqn.primitive, params, n, tuple(aval.shape), aval.dtype))
        for n, aval in enumerate(avals)
    ]


def _layers(eqn: JaxprEqn, operands: Sequence[Any]) -> Deferred | None:
    """Index a stored weight along its stack axes, leaf by leaf; None for other operations."""
    x, name, p = operands[0], eqn.primitive.name, eqn.params
    if not (isinstance(x, Deferred) and x.stack):
        return None
    own = x.shape[x.stack :]
    if name == "squeeze":
        if any(d >= x.stack for d in p["dimensions"]):
            return None
        index = lambda leaf: lax.squeeze(leaf, p["dimensions"])
    elif name == "slice":
        start, limit, strides = p["start_indices"], p["limit_indices"], p["strides"]
        if start[x.stack :] != (0,) * len(own) or limit[x.stack :] != own or strides:
            return None

        def index(leaf: Array) -> Array:
            rest = leaf.shape[x.stack :]
            first, last = (*start[: x.stack], *(0 for _ in rest)), (*limit[: x.stack], *rest)
            return lax.slice(leaf, first, last)
    elif name == "dynamic_slice":
        if p["slice_sizes"][x.stack :] != own:
            return None

        def index(leaf: Array) -> Array:
            for axis in range(x.stack):
                size = p["slice_sizes"][axis]
                leaf = lax.dynamic_slice_in_dim(leaf, operands[1 + axis], size, axis)
            return leaf
    else:
        return None
    return Deferred((jax.tree.map(index, x.operands[0]),))


def _own_product(eqn: JaxprEqn, operands: Sequence[Any]) -> Any:
    """Return the format's own product, if it has one and the equation is a single product."""
    at = [n for n, x in enumerate(operands) if isinstance(x, Deferred)]
    if eqn.primitive.name != "dot_general" or len(at) > 1:
        return NotImplemented
    (summed, batch), (k,) = eqn.params["dimension_numbers"], at
    weight = operands[k]
    axes = list(range(weight.ndim))  # of the stored weight, for each axis of `weight`
    while weight.step is not None and weight.step.primitive.name in _MOVES:
        order = dict(weight.step.params).get("permutation", range(weight.ndim))
        axes, weight = [order[n] for n in axes], weight.operands[0]
    free = [axis for n, axis in enumerate(axes) if n not in summed[k]]
    own = weight.step is None and hasattr(weight.operands[0], "dot")
    if not own or batch[k] or free != sorted(free) or not _usual(eqn):
        return NotImplemented
    aval: Any = eqn.outvars[0].aval
    dtype = eqn.params["preferred_element_type"] or aval.dtype
    contracted = tuple(summed[1 - k]), tuple(axes[n] for n in summed[k])
    found = True

    def product(weight: Any, x: Any) -> Any:
        nonlocal found
        out = weight.dot(x, contracted, dtype)
        found = out is not NotImplemented
        if not found:  # which must not leave `jax.sharding.auto_axes`
            return lax.full(aval.shape, 0, dtype)
        first = out.ndim - len(free)
        return out if k == 1 else lax.transpose(out, (*range(first, out.ndim), *range(first)))

    sharding = aval.sharding if _compat.is_explicit(aval.sharding) else None
    out = _compat.without_shardings(product, sharding, weight.operands[0], operands[1 - k])
    return out if found else NotImplemented


def _usual(eqn: JaxprEqn) -> bool:
    """Whether a product has operands of one dtype and the default precision."""
    avals: list[Any] = [v.aval for v in eqn.invars]
    asked: Any = eqn.params["precision"]
    usual = (None, lax.Precision.DEFAULT)
    each = asked if isinstance(asked, tuple) else (asked,)
    return avals[0].dtype == avals[1].dtype and all(p in usual for p in each)


def how(eqn: JaxprEqn, weight: PyTree) -> str:
    """Say how an equation uses a stored weight, for reports: built, or by the format's product."""
    if not isinstance(weight, Deferred):
        return ""
    root: Any = weight
    while isinstance(root, Deferred):
        root = next((x for x in root.operands if isinstance(x, Deferred)), root.operands[0])
    own: Any = NotImplemented
    avals: list[Any] = [v.aval for v in eqn.invars]
    at = [k for k, x in enumerate(avals) if tuple(x.shape) == weight.shape]
    if eqn.primitive.name == "dot_general" and at:
        zeros = [lax.full(x.shape, 0, x.dtype) for x in avals]
        own = _own_product(eqn, [weight if k == at[0] else x for k, x in enumerate(zeros)])
    builds = own is NotImplemented or getattr(root, "builds", False)
    return f"{stored_as(root)}, {'built here' if builds else 'used as stored'}"


def peel(x: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Split a scanned operand into what the scan slices and a function applied to each slice.

    A stored weight is sliced leaf by leaf if every leaf has the layers' axis, also under casts and
    transposes that keep this axis first. Anything else is built before the loop.
    """
    if not isinstance(x, Deferred):
        return x, lambda piece: piece
    if x.step is None and x.stack:
        return x, lambda piece: piece
    if x.step is not None and x.step.primitive.name in _MOVES:
        params: dict[str, Any] = dict(x.step.params)
        order = params.get("permutation", (0,))
        layers, layer_of = peel(x.operands[0]) if order[0] == 0 else (None, None)
        if layer_of is not None and not isinstance(layers, jax.Array):
            if "permutation" in params:
                params["permutation"] = tuple(k - 1 for k in order[1:])
            one = x.step._replace(params=tuple(sorted(params.items())), shape=x.shape[1:])
            return layers, lambda piece: Deferred((layer_of(piece),), one)
    return built(x), lambda piece: piece


_MOVES = ("transpose", "convert_element_type", "copy")
