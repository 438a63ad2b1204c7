"""Map PEFT's `init_lora_weights` to initializers, and list those that move the base."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import initializers
from jlora._arrays import Geometry, LoraArray
from jlora._paths import brief

_KNOWN: dict[bool | str, initializers.Initializer] = {
    True: initializers.kaiming,
    False: initializers.uniform,
    "gaussian": initializers.gaussian,
    "olora": initializers.olora,
    "orthogonal": initializers.orthogonal,
    "pissa": initializers.pissa,
}
_LACKED = {
    "corda": "is computed from the layers' inputs",
    "eva": "is computed from the layers' inputs",
    "loftq": "is computed with a quantizer, and is for a quantized base",
    "lora_ga": "is computed from gradients",
    "mica": "trains A alone, which rules cannot say",
}
_Splitting = Callable[..., initializers.Split]
# Those that PEFT applies again when it loads an adapter, to get the same residual.
REPEATED: dict[str, _Splitting] = {"pissa": initializers.pissa, "olora": initializers.olora}


def initializer(chosen: bool | str, embedding: bool, call: str) -> initializers.Initializer:
    """Return the initializer for PEFT's name; embeddings have their own."""
    name = chosen.lower() if isinstance(chosen, str) else chosen
    if embedding and name in (True, False, "gaussian"):
        return embedding_normal if name is False else embedding_init
    randomized = re.fullmatch(r"pissa_niter_(\d{1,4})", str(name))
    if randomized:
        return _randomized(int(randomized[1]))
    if name not in _KNOWN:
        why = _LACKED.get(str(name), "is not a name that jlora knows")
        like = "jlora.initializers.mica" if name == "mica" else "a function of your own"
        raise ValueError(
            f"`{call}`: init_lora_weights={brief(chosen)} {why}. Give `init=`, {like}: "
            "`(key, weight, rank, scaling, dtype) -> (A, B)` or `(A, B, residual)`."
        )
    return _KNOWN[name]


@functools.cache
def _randomized(niter: int) -> initializers.Initializer:
    """Return the same function for the same number, so that equal rules compare equal."""
    return functools.partial(initializers.pissa, niter=niter)


@functools.cache
def of_groups(init: initializers.Initializer, n: int) -> initializers.Initializer:
    """Return PEFT's initializer for one of n groups, which has 1/n of the rank.

    Only "gaussian" depends on the rank of all groups: the standard deviation of A is 1/(n r).
    """
    if init is not initializers.gaussian or n == 1:
        return init

    def gaussian(*args: Any, **kwargs: Any) -> initializers.Factors:
        a, b = initializers.gaussian(*args, **kwargs)
        return a / n, b

    return gaussian


def embedding_init(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> initializers.Factors:
    """Set A to zero and draw B from N(0, 1), as PEFT and loralib do for an embedding."""
    d_in, d_out = weight.shape
    return jnp.zeros((d_in, rank), dtype), jax.random.normal(key, (rank, d_out), dtype)


def embedding_normal(
    key: PRNGKeyArray,
    weight: Float[Array, "in out"],
    rank: int,
    scaling: ArrayLike = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> initializers.Factors:
    """Draw A and B from N(0, 1), as PEFT does for an embedding with `init_lora_weights=False`."""
    (d_in, d_out), (of_a, of_b) = weight.shape, jax.random.split(key)
    a = jax.random.normal(of_a, (d_in, rank), dtype)
    return a, jax.random.normal(of_b, (rank, d_out), dtype)


def residual(init: _Splitting, weight: Array, node: LoraArray) -> Array:
    """Return the residual that an initializer leaves of a weight, for the node's rank and scale."""
    geometry = Geometry.of(weight.shape, node.layout)

    def rest(matrix: Array, s: Array) -> Array:
        return init(jax.random.key(0), matrix, node.rank, s, jnp.float32)[2]

    for _ in geometry.stack:
        rest = jax.vmap(rest)
    return geometry.from_matrix(rest(geometry.to_matrix(weight), jnp.asarray(node.scaling)))
