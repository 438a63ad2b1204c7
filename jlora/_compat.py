"""Differences between JAX releases, and the functions through which jlora uses JAX's tracing.

Jaxpr parameters are not a stable interface: in 2026 `scan` replaced `num_consts`/`num_carry` by
`ft_in`/`ft_out`, and `ClosedJaxpr` became `Jaxpr`. Parameters that changed between the releases
that jlora supports are read here; rules read the other parameters of their own primitives.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Primitive
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import PyTree


class Body(NamedTuple):
    """A jaxpr and its constants, independent of the class that JAX wraps it in."""

    eqns: Sequence[JaxprEqn]
    constvars: Sequence[Any]
    consts: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]


def body(jaxpr: Any) -> Body:
    """Unpack a `Jaxpr` or `ClosedJaxpr`; before JAX 0.11 the second wraps the first."""
    consts = getattr(jaxpr, "consts", ())
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return Body(inner.eqns, inner.constvars, consts, inner.invars, inner.outvars)


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many of a scan's operands are constants and how many are carries."""
    if "ft_in" in params:  # JAX 0.11 and later
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def bind(eqn: JaxprEqn, *operands: PyTree) -> list[Any]:
    """Apply an equation's primitive, with the equation's parameters, to `operands`."""
    return apply(eqn.primitive, eqn.params, *operands)


def apply(primitive: Primitive, params: dict[str, Any], *operands: PyTree) -> list[Any]:
    """Apply a primitive with the parameters of an equation."""
    out = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


def named_like(eqn: JaxprEqn) -> Any:
    """Return a context that restores an equation's named scopes and source line, for profiles."""
    source = eqn.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    return source_info_util.user_context(source.traceback, name_stack=names)


def source_line(eqn: JaxprEqn) -> str:
    """Return the user's `file:line (function)` that created an equation."""
    return source_info_util.summarize(eqn.source_info)


def is_traced(x: object) -> bool:
    """Whether a value is being traced, so that it cannot be read, but may be differentiated.

    Only arrays with values can be waited for. Reading the value instead would be an error for a
    tracer, whose message JAX writes by searching the trace: asked once a weight, tracing a model
    would take time quadratic in its layers. The class is asked, because a tracer looks up what its
    class lacks.
    """
    return isinstance(x, jax.Array) and not hasattr(type(x), "block_until_ready")


def varying_axes(x: PyTree) -> list[str]:
    """Return the mesh axes along which an array is known to vary inside a shard_map."""
    if not isinstance(x, jax.Array):  # a stored weight, which is built before a shard_map
        return []
    aval = jax.typeof(x)
    kinds = getattr(aval, "manual_axis_type", None)  # `vma` before 0.10.2
    return sorted(getattr(aval, "vma", ()) if kinds is None else kinds.varying)


def in_mesh_of(x: ArrayLike) -> Any:
    """Return a context in which an explicitly sharded array may be used, whatever the current mesh.

    An equation that leaves an explicit mesh (`reshard` in `auto_axes`) is already outside of it.
    """
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types and mesh != jax.sharding.get_abstract_mesh():
        return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext()


def in_mesh_of_any(arrays: Iterable[Any]) -> Any:
    """Return a context with the mesh that some of the arrays are on, unless there is one."""
    meshes = (getattr(getattr(x, "sharding", None), "mesh", None) for x in arrays)
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def without_shardings(fn: Callable[..., Any], out: Any, *args: PyTree) -> Any:
    """Return `fn(*args)`, where the shardings of arrays are not a part of their types inside `fn`.

    `out` are the shardings of the result along explicit axes of a mesh; None without such axes.
    """
    if out is None:
        return fn(*args)
    with in_mesh_of(jax.tree.leaves(args)[0]):
        return jax.sharding.auto_axes(fn, out_sharding=out)(*args)


def is_explicit(sharding: Any) -> bool:
    """Whether a sharding is along explicit axes of a mesh, so that the types of arrays have it."""
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def is_distributed(x: ArrayLike) -> bool:
    """Whether the compiler places an array on several devices."""
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def sharded_like(x: Any, like: ArrayLike) -> Any:
    """Give an array the sharding of another that it has the shape of, or is broadcast to.

    It is returned as it is unless the types of arrays have shardings.
    """
    sharding = jax.typeof(like).sharding
    if not is_explicit(sharding):
        return x
    sizes = zip(x.shape, jnp.shape(like), sharding.spec, strict=True)
    spec = PartitionSpec(*(names if size == full else None for size, full, names in sizes))
    to = NamedSharding(sharding.mesh, spec)
    return x if jax.typeof(x).sharding == to else jax.reshard(x, to)


def manual_axes(params: dict[str, Any]) -> Any:
    """Return the mesh axes that are manual inside a shard_map."""
    return params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]


def kernel_name(eqn: JaxprEqn) -> str | None:
    """Return the name of the function behind a primitive that many share: `pallas_call`, `jit`."""
    return eqn.params.get("name")
