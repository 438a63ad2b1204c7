"""The random distribution shared by forms and initializers."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray


def bounded(
    key: PRNGKeyArray, shape: tuple[int, int], bound: float, dtype: DTypeLike
) -> Float[Array, "m n"]:
    """Draw from `U(±bound)`."""
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)
