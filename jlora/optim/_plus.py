"""LoRA+: B learns faster than A."""

import optax

from jlora.optim._factors import label, refuse_wrapping


def lora_plus(ratio: float | int = 16.0) -> optax.GradientTransformationExtraArgs:
    """Scale the update of B, so that its learning rate is `ratio` times A's: `η_B = λ η_A`.

    It comes last in a chain: what an optimizer of Adam's kind is given it normalizes away. All of
    B's update is scaled, its weight decay too, as with a parameter group of another rate.

    Args:
        ratio: λ, the learning rate of B over that of A. The paper's advice is about 16.

    Returns:
        A transformation without state, over any tree with `LoraArray` nodes. All but B passes.

    Raises:
        TypeError: `ratio` is an optimizer.
        ValueError: the parameters have no `LoraArray` (on `init`).

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> node = jlora.LoraArray(None, jnp.ones((3, 2)), jnp.ones((2, 4)), None, "io")
        >>> tx = optax.chain(optax.sgd(0.5), lora_plus(16.0))
        >>> updates, _ = tx.update({"w": node}, tx.init({"w": node}))
        >>> float(updates["w"].lora_a[0, 0]), float(updates["w"].lora_b[0, 0])
        (-0.5, -8.0)

    Reference: Hayou et al. 2024, arXiv:2402.12354. PEFT's `create_loraplus_optimizer`, which also
    gives B's rate to whatever has one dimension, and 1e-6 to the factors of an embedding.
    """
    call = "jlora.optim.lora_plus(ratio)"
    refuse_wrapping(call, ratio, "optax.chain(tx, jlora.optim.lora_plus(16.0))")
    return optax.multi_transform(
        {"factor": optax.scale(ratio), "other": optax.identity()}, label(call, "lora_b")
    )
