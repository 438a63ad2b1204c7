"""LoRA+: a higher learning rate for B than for A."""

import math

import optax

from jlora._check_values import check_number
from jlora.optim._factors import label, refuse_wrapping


def lora_plus(ratio: float | int = 16.0) -> optax.GradientTransformationExtraArgs:
    """Scale the update of B, so that its learning rate is `ratio` times A's: `η_B = λ η_A`.

    Put it last in a chain: Adam and similar optimizers are invariant to the scale of their input.
    The full update of B is scaled, including weight decay, as by a parameter group with another
    learning rate.

    Args:
        ratio: λ, the learning rate of B divided by that of A. The paper recommends about 16.

    Returns:
        A stateless transformation of trees with `LoraArray` nodes. It changes only B.

    Raises:
        TypeError: `ratio` is an optimizer, or not a number.
        ValueError: `ratio` is not above 0; the parameters have no `LoraArray` (on `init`).

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> node = jlora.LoraArray(None, jnp.ones((3, 2)), jnp.ones((2, 4)), None, "io")
        >>> tx = optax.chain(optax.sgd(0.5), lora_plus(16.0))
        >>> updates, _ = tx.update({"w": node}, tx.init({"w": node}))
        >>> float(updates["w"].lora_a[0, 0]), float(updates["w"].lora_b[0, 0])
        (-0.5, -8.0)

    Reference: Hayou et al. 2024, arXiv:2402.12354. PEFT's `create_loraplus_optimizer`, which also
    uses B's rate for 1-D parameters, and 1e-6 for the factors of an embedding.
    """
    call = "jlora.optim.lora_plus(ratio)"
    refuse_wrapping(call, ratio, "optax.chain(tx, jlora.optim.lora_plus(16.0))")
    check_number(ratio, call, "ratio", "a number above 0, e.g. 16.0", lambda x: 0 < x < math.inf)
    return optax.multi_transform(
        {"factor": optax.scale(ratio), "other": optax.identity()}, label(call, "lora_b")
    )
