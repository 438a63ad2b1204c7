"""Create the parts of one weight's update, where the weight is; the model is unchanged at first."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from jlora import _compat, forms
from jlora._arrays import FullArray, Geometry, LoraArray
from jlora._base import built, is_stored, stored_as
from jlora._paths import describe
from jlora._placed import Names, at_base, sharding_of
from jlora._reading import changes, initializer, reads
from jlora._spec import LoraSpec
from jlora._stacks import at_once, in_place, is_split, layer_by_layer
from jlora.forms._initial import ReturnError, check_returned


def adapted(
    path: str, key: PRNGKeyArray, weight: PyTree, spec: LoraSpec, layout: str, replicate: Names
) -> LoraArray:
    """Adapt one weight; a weight of `ShapeDtypeStruct`s gives a node of them."""
    sharding, abstract = sharding_of(weight), _is_abstract(weight)
    if not abstract:
        key = jax.random.fold_in(_at(key, sharding), zlib.crc32(path.encode()))
    try:
        if abstract or sharding is not None:
            shapes = jax.tree.map(_without_sharding, (key, weight))
            node = _begun.eval_shape(*shapes, spec, layout, together=True)  # one tracing less
        else:
            node = _begun(key, weight, spec, layout)
    except ReturnError as error:
        said = f"`jlora.attach`: the initializer of {describe(path, weight)} {error}"
        raise TypeError(said) from None
    _check(path, weight, spec, node)
    if sharding is not None:
        at = at_base(node, weight.shape, sharding, replicate, "jlora.attach(replicate=...)")
        at = dataclasses.replace(at, base=sharding if node.residual else None)
        if abstract:
            node = jax.tree.map(_struct, node, at)
        else:
            together = is_split(sharding, len(weight.shape) - len(layout))
            shardings, structure = jax.tree.flatten(at)
            node = _begun_at(spec, layout, together, structure, *shardings)(key, weight)
    return node if node.residual else dataclasses.replace(node, base=weight)


def in_full(weight: PyTree) -> FullArray:
    """Train a parameter in full, from a copy: the same buffer must not be donated twice."""
    if _is_abstract(weight):
        return FullArray(weight, weight)
    sharding = sharding_of(weight)
    if sharding is None or _compat.is_traced(weight):
        return FullArray(weight, jnp.array(weight, copy=True))
    return FullArray(weight, jax.jit(jnp.copy, out_shardings=sharding)(weight))


def _is_abstract(weight: PyTree) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(weight))


def _without_sharding(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _struct(x: Any, at: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)


def _at(key: PRNGKeyArray, sharding: Sharding | None) -> PRNGKeyArray:
    """Put a key that is committed to a device on those of the weight."""
    if sharding is None or _compat.is_traced(key) or not getattr(key, "committed", False):
        return key
    everywhere = sharding
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(key, everywhere)


def _check(path: str, weight: PyTree, spec: LoraSpec, node: LoraArray) -> None:
    """Refuse an initializer that changes a weight which cannot change."""
    if not node.residual:
        return
    if is_stored(weight):
        raise ValueError(
            f"`jlora.attach`: the initializer of {describe(path, weight)} subtracts A B from the "
            f"weight, but the weight is stored as `{stored_as(weight)}` and cannot change. "
            "Omit `init`, or pass the array itself, `leaf.dequantize()`."
        )
    why = forms.named(spec.form).refusal("residual")
    if why is not None:
        raise ValueError(
            f'`jlora.attach`: the initializer of "{path}" subtracts A B from the weight, but with '
            f'`form="{spec.form}"` {why}. Omit `init`, or pass an initializer that does not change '
            "the weight."
        )


@functools.partial(jax.jit, static_argnames=("spec", "layout", "together"))
def _begun(
    key: PRNGKeyArray, weight: PyTree, spec: LoraSpec, layout: str, together: bool = False
) -> LoraArray:
    """Return the node of one weight with all its parts; without base, unless it is a residual."""
    lora_a, lora_b, *rest = _factors(key, weight, spec, layout, together)
    scaling = jnp.full(Geometry.of(weight.shape, layout).stack, spec.s, jnp.float32)
    node = LoraArray(
        rest[0] if rest else weight,
        lora_a,
        lora_b,
        scaling,
        layout,
        spec.slices,
        residual=bool(rest),
        form=spec.form,
    )
    node = forms.begun(node, spec.dora, jnp.dtype(spec.dtype))
    return node if rest else dataclasses.replace(node, base=None)


@functools.lru_cache(1024)  # layers of one shape share one program
def _begun_at(
    spec: LoraSpec, layout: str, together: bool, structure: Any, *shardings: Sharding
) -> Callable[..., Any]:
    """Return `_begun`, compiled so that each part is created on its own devices."""
    make: Callable[..., Any] = functools.partial(
        _begun, spec=spec, layout=layout, together=together
    )
    at = structure.unflatten(shardings)
    if _compat.is_explicit(shardings[0]):
        # Initializers are written without shardings: inside, the compiler chooses them.
        make = jax.sharding.auto_axes(make, out_sharding=at)
    known = not isinstance(getattr(shardings[0], "mesh", None), AbstractMesh)
    return jax.jit(make, out_shardings=at) if known else make


def _factors(
    key: PRNGKeyArray, weight: PyTree, spec: LoraSpec, layout: str, together: bool
) -> tuple[ArrayLike, ...]:
    """Call the initializer on `(in, out)` matrices, one per stack element, and reshape.

    Returns A and B and, if the initializer changes the base, the residual. An initializer that
    reads the weight gets one element of the stack at a time, unless it gets them `together`.
    """
    geometry = Geometry.of(weight.shape, layout)
    given = initializer(spec)

    def init(key: PRNGKeyArray, matrix: Array) -> tuple[Array, ...]:
        made = given(key, matrix)
        check_returned(made, matrix.shape, spec.rank)
        return made

    one, depth = dataclasses.replace(geometry, stack=()), len(geometry.stack)
    shapes = forms.factor_shapes(one, spec.rank, spec.slices)
    run = init if spec.slices is None else _sliced(init, spec.slices, geometry)

    def make(key: PRNGKeyArray, weight: PyTree) -> tuple[ArrayLike, ...]:
        a, b, *rest = run(key, one.to_matrix(built(weight)))
        return a.reshape(shapes[0]), b.reshape(shapes[1]), *map(one.from_matrix, rest)

    if depth:
        key = jax.random.split(key, geometry.stack)
    if depth and not together and reads(spec, one, weight.dtype):
        if changes(spec, one, weight.dtype) and not is_stored(weight):
            return in_place(lambda weight, key: make(key, weight), depth)(weight, key)
        whole = is_stored(weight) and getattr(weight, "stack", 0) < depth
        return layer_by_layer(make, depth)(key, built(weight) if whole else weight)
    return at_once(make, depth)(key, built(weight))


def _sliced(
    init: Callable[..., tuple[Array, ...]], slices: tuple[tuple[int, int], ...], geometry: Geometry
) -> Callable[[PRNGKeyArray, Array], tuple[Array, ...]]:
    """Initialize each range of outputs as a separate weight."""
    per = geometry.fan_out // geometry.out_dims[0]  # columns per element of the sliced dimension

    def run(key: PRNGKeyArray, matrix: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, len(slices))
        columns = [slice(start * per, stop * per) for start, stop in slices]
        parts = [init(k, matrix[:, some]) for k, some in zip(keys, columns, strict=True)]
        a, b = (jnp.concatenate([p[k] for p in parts], axis=1) for k in (0, 1))
        if len(parts[0]) == 2:
            return a, b
        for some, part in zip(columns, parts, strict=True):
            matrix = matrix.at[:, some].set(part[2])
        return a, b, matrix

    return run
