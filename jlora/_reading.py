"""What an initializer reads of a weight: its shape, its entries, or matrices that it decomposes.

On a mesh only the last are gathered, which `attach` warns of.
"""

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from jlora import _compat, forms
from jlora._arrays import Geometry
from jlora._base import is_stored
from jlora._paths import describe
from jlora._placed import sharding_of
from jlora._spec import LoraSpec

_DECOMPOSITIONS = {"svd", "qr", "geqrf", "geqp3", "householder_product", "eig", "eigh", "lu"}


def initializer(spec: LoraSpec) -> functools.partial[Any]:
    """Return the initializer of one `(in, out)` matrix, with the spec's rank, scaling and dtype."""
    chosen = spec.init or forms.named(spec.form).init
    return functools.partial(chosen, rank=spec.rank, scaling=spec.s, dtype=jnp.dtype(spec.dtype))


@functools.lru_cache(64)
def _program(spec: LoraSpec, fan_in: int, fan_out: int, dtype: Any) -> _compat.Body:
    key = jax.eval_shape(lambda: jax.random.key(0))
    matrix = jax.ShapeDtypeStruct((fan_in, fan_out), dtype)
    return _compat.body(jax.make_jaxpr(initializer(spec))(key, matrix))


def reads(spec: LoraSpec, geometry: Geometry, dtype: Any) -> bool:
    """Whether the initializer reads more of the weight than its shape."""
    body = _program(spec, geometry.fan_in, geometry.fan_out, jnp.dtype(dtype))
    used = [*body.outvars, *(x for eqn in body.eqns for x in eqn.invars)]
    return any(x is body.invars[-1] for x in used)


def changes(spec: LoraSpec, geometry: Geometry, dtype: Any) -> bool:
    """Whether the initializer also returns another weight, the residual."""
    body = _program(spec, geometry.fan_in, geometry.fan_out, jnp.dtype(dtype))
    return len(body.outvars) > 2


def _decomposed(spec: LoraSpec, geometry: Geometry, dtype: Any) -> int:
    """Count the bytes of the matrices that the initializer decomposes.

    Those of r rows or columns, as of a randomized decomposition, do not count.
    """
    body = _program(spec, geometry.fan_in, geometry.fan_out, jnp.dtype(dtype))
    found: list[tuple[int, Any]] = [
        (times, eqn.invars[0].aval)
        for times, eqn in _equations(body)
        if eqn.primitive.name in _DECOMPOSITIONS
    ]
    return sum(times * x.size * x.dtype.itemsize for times, x in found if min(x.shape) > spec.rank)


def _equations(body: _compat.Body, times: int = 1) -> Iterator[tuple[int, JaxprEqn]]:
    """Yield all equations, inner ones too, and how often each runs."""
    for eqn in body.eqns:
        yield times, eqn
        inner = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from _equations(_compat.body(value), inner)


def warn_of_gathers(leaves: Mapping[str, PyTree], plan: Mapping[str, Any]) -> None:
    """Warn of weights that are sharded and that their initializers decompose."""
    found = {}
    for path, planned in plan.items():
        if planned is not None:
            found[path] = _gathered(leaves[path], *planned)
    most = max(found, key=found.__getitem__, default=None)
    if most is None or not found[most]:
        return
    init = initializer(plan[most][0]).func
    name = getattr(init, "__name__", getattr(getattr(init, "func", None), "__name__", repr(init)))
    others = sum(map(bool, found.values())) - 1
    warnings.warn(
        f"`jlora.attach`: the initializer `{name}` decomposes {describe(most, leaves[most])}, "
        f"which is sharded, so every device gathers {found[most]:,} bytes"
        f"{' for each layer, one layer at a time' if _depth(leaves[most], plan[most][1]) else ''}"
        f"{f' (also for {others} more leaves)' if others else ''}. A randomized decomposition "
        "gathers only matrices with r rows or columns: "
        "`LoraSpec(init=functools.partial(jlora.initializers.pissa, niter=16))`.",
        stacklevel=4,
    )


def _gathered(weight: PyTree, spec: LoraSpec, layout: str) -> int:
    """Return the bytes that a device has to gather to decompose one matrix of a weight."""
    sharding = sharding_of(weight)
    if is_stored(weight) or not isinstance(sharding, NamedSharding):
        return 0
    names = [x for x in sharding.spec[_depth(weight, layout) :] if x is not None]
    flat = [name for x in names for name in (x if isinstance(x, tuple) else (x,))]
    if math.prod(sharding.mesh.shape[name] for name in flat) == 1:
        return 0
    return _decomposed(spec, Geometry.of(weight.shape, layout), weight.dtype)


def _depth(weight: PyTree, layout: str) -> int:
    return len(weight.shape) - len(layout)
