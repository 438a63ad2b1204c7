"""A toy stored weight, int8 rows and their scales, and the table of cases over it."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora._paths import leaves_with_paths, map_with_paths


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("own", "kind")
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Int8 rows along the last axis, with a scale each."""

    codes: Any  # (*stack, *dims)
    scale: Any  # (*stack, *dims[:-1], 1)
    own: int  # how many axes one layer's weight has
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.kind)

    @property
    def stack(self) -> int:
        return self.codes.ndim - self.own

    def dequantize(self) -> jax.Array:
        return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)


def pack(weight: jax.Array, own: int = 2) -> Rows:
    """Round a weight to int8."""
    wide = jnp.asarray(weight).astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), 1e-6) / 127
    return Rows(jnp.round(wide / scale).astype(jnp.int8), scale, own, str(weight.dtype))


def is_rows(x: Any) -> bool:
    return isinstance(x, Rows)


def base_of(case: Any) -> Any:
    """A case's base weights; of a stored one those that its rules adapt are packed."""
    if not case.stored:
        return case.params
    layouts = case.layouts(case.params)
    params = jlora.attach(
        case.params, {case.rules: jlora.LoraSpec(rank=1)}, key=jax.random.key(0), layouts=layouts
    )
    node = lambda x: isinstance(x, jlora.LoraArray)
    own = {path: x.layout for path, x in leaves_with_paths(params, node) if node(x)}
    if isinstance(case.stored, str):
        return jlora.quantize(case.params, {re.escape(p): case.stored for p in own}, layouts=own)
    return map_with_paths(lambda p, x: pack(x, len(own[p])) if p in own else x, case.params)


def over(params: Any, base: Any) -> Any:
    """The same adapter over other base weights."""
    return jlora.bind(base, jlora.detach(params)[1])
