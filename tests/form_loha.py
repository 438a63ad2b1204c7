"""A form from outside with parts of its own and another rank: LoHa, `W + s · (A B) ∘ (A₂ B₂)`.

The Hadamard product of two products of rank r is one product of rank r²:
`(A B) ∘ (A₂ B₂) = (A ⊙ A₂) (B ⊙ B₂)`, each row of A ⊙ A₂ the outer product of a row of A and one of
A₂, and each column of B ⊙ B₂ that of a column of B and one of B₂. Hyeon-Woo et al. 2022,
arXiv:2108.06098, eq. 5. PEFT's `LoHaConfig`.
"""

import jax
import jax.numpy as jnp

from jlora import forms, initializers


def drawn(node, shape, dtype):
    return jax.random.normal(jax.random.key(5), shape, dtype) / 4


def factors(node, geometry):
    """Both outer products, rank by rank."""
    at = len(geometry.stack)
    a = node.lora_a[..., :, None] * node.extra["second_a"][..., None, :]
    b = jnp.expand_dims(node.lora_b, at + 1) * jnp.expand_dims(node.extra["second_b"], at)
    outs = geometry.out_dims
    return a.reshape(*a.shape[:-2], -1), b.reshape(*geometry.stack, -1, *outs)


forms.register(
    forms.Form(
        "loha",
        initializers.gaussian,  # B is zero at first
        extra={
            "second_a": forms.Part("si r", begin=drawn, shared=True),
            "second_b": forms.Part("s r o", begin=drawn),
        },
        factors=factors,
    )
)
