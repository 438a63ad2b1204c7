"""A toy stored weight, int8 rows and their scales, and the table of cases over it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from cases import Case

import jlora
from jlora._paths import leaves_with_paths, map_with_paths


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("own", "kind")
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Int8 rows along the last axis, a scale each; `own` axes belong to one layer's weight."""

    codes: Any  # (*stack, *dims)
    scale: Any  # (*stack, *dims[:-1], 1)
    own: int
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


def pack(weight: jax.Array, own: int) -> Rows:
    wide = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), 1e-6) / 127
    codes = jnp.round(wide / scale).astype(jnp.int8)
    return Rows(codes, scale, own, str(weight.dtype))


def stored(case: Case) -> Case:
    """The same case over int8 weights: each that its rules adapt, and none other."""
    layouts = jlora.layouts(case.fn, case.params, *case.args)
    params = jlora.attach(
        case.params, {case.rules: jlora.LoraSpec(rank=1)}, key=jax.random.key(0), layouts=layouts
    )
    own = {
        path: len(node.layout)
        for path, node in leaves_with_paths(params, lambda x: isinstance(x, jlora.LoraArray))
        if isinstance(node, jlora.LoraArray)
    }
    packed = map_with_paths(lambda p, x: pack(x, own[p]) if p in own else x, case.params)
    return dataclasses.replace(case, name=f"stored_{case.name}", params=packed)


def dequantized(params: Any) -> Any:
    """The same tree with plain arrays."""
    is_rows = lambda x: isinstance(x, Rows)
    return jax.tree.map(lambda x: x.dequantize() if is_rows(x) else x, params, is_leaf=is_rows)
