"""The key of dropout: each call has its own.

A function with dropout is for one call. One that is called again, compiled with its key as a
constant, or mapped over examples with one key for all of them drops the same elements every time;
nothing shows it but a model that learns less. So each of the three is an error.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PRNGKeyArray, PyTree

from jlora import _compat
from jlora._partition import still

_WRITE = (
    "Build it where it is called, with a key that is an argument of the step: "
    "`jlora.lora(fn, dropout=..., key=step_key)(params, ...)`, where `step_key` is "
    "`jax.random.fold_in(key, step)`"
)


def call_key(dropout: float | Array, key: PRNGKeyArray | None) -> "CallKey | None":
    """Validate the arguments of `jlora.lora`; return the key, or None without dropout."""
    traced = _compat.is_traced(dropout)
    if jnp.ndim(dropout) or not (traced or 0.0 <= dropout < 1.0):
        raise ValueError(f"`jlora.lora(dropout={dropout})`: the rate must be a number in [0, 1).")
    if not traced and not dropout:
        return None
    if key is None:
        raise ValueError(
            f"`jlora.lora(dropout={dropout})` needs a key: `jlora.lora(fn, dropout={dropout}, "
            "key=step_key)`, another one each step. To evaluate leave the dropout out."
        )
    return CallKey(key)


# The name that weights get where a function with dropout is called on plain ones.
PLAIN = "jlora.lora(dropout=...)(plain)"


def plain(arguments: PyTree) -> PyTree:
    """Name the traced arrays, so that an outer transform sees that they lose their dropout."""

    def named(x: Any) -> Any:
        real = _compat.is_traced(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return checkpoint_name(x, PLAIN) if real else x

    return jax.tree.map(named, arguments)


class CallKey:
    """The key of the one call of a function with dropout."""

    def __init__(self, key: PRNGKeyArray) -> None:
        self._key = key
        self._taken = False

    def take(self, arguments: PyTree) -> Any:
        """Return the key for a call with these arguments; raise if masks would be repeated."""
        if self._taken:
            raise ValueError(
                "`jlora.lora(dropout=..., key=...)`: the function is called a second time with one "
                f"key, and would drop the same elements again. {_WRITE}."
            )
        self._taken = True
        # What is computed from a concrete key is traced only if it becomes part of a program.
        if not _compat.is_traced(self._key) and _compat.is_traced(jax.random.fold_in(self._key, 0)):
            raise ValueError(
                "`jlora.lora(dropout=..., key=...)`: the key is a constant of the program that is "
                "traced (`jax.jit`, `jax.checkpoint`, the body of a loop), so every run would drop "
                f"the same elements. {_WRITE}."
            )
        traced = [x for x in jax.tree.leaves(arguments) if _compat.is_traced(x)]
        return _mapped_with(self._key, [still(x) for x in traced]) if traced else self._key


@jax.custom_batching.custom_vmap
def _mapped_with(key: Any, arguments: list[Any]) -> Any:
    """Return the key; under `jax.vmap`, require that it is mapped if the arguments are."""
    return key


@_mapped_with.def_vmap
def _(size: int, mapped: Any, key: Any, arguments: list[Any]) -> Any:
    if any(mapped[1]) and not mapped[0]:
        raise ValueError(
            f"`jlora.lora(dropout=..., key=...)`: `jax.vmap` maps the arguments over {size} "
            "examples but not the key, so all of them would drop the same elements. Map the key "
            "too: `jax.vmap(lambda x, key: jlora.lora(fn, dropout=..., key=key)(params, x))(xs, "
            f"jax.random.split(step_key, {size}))`."
        )
    return _mapped_with(key, arguments), mapped[0]
