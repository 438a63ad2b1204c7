"""Every test runs with strict dtype promotion and no silent broadcasting."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)  # for meshes
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
