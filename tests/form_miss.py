"""A form from outside, in one file: MiSS, `W + s · A D` with a fixed A of zeros and ones.

Input i goes to row i mod r of D, so that `A D` is D repeated down the inputs. Kang and Yin 2024,
arXiv:2409.15371. PEFT's `MissConfig`, whose `miss_block` is D, with s = 1.
"""

import jax.numpy as jnp

from jlora import forms


def blocks(key, weight, rank, scaling=1.0, dtype=jnp.float32):
    """A repeats the unit matrix, D is zero."""
    d_in, d_out = weight.shape
    a = (jnp.arange(d_in)[:, None] % rank == jnp.arange(rank)[None]).astype(dtype)
    return a, jnp.zeros((rank, d_out), dtype)


forms.register(
    forms.Form(
        "miss",
        blocks,
        frozen=("lora_a",),
        refuses={"residual": "A is fixed, so A B is no part of the weight"},
    )
)
