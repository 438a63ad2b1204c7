"""Every test runs with strict dtype promotion and no silent broadcasting."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # for meshes
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def usual_promotion() -> Iterator[None]:
    """Models written elsewhere mix dtypes and ranks, which the rest of the suite forbids itself."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
