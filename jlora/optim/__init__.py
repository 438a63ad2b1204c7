"""Optimizers that distinguish A and B: optax transformations of trees with `LoraArray` nodes.

They accept the tree of `jlora.partition(params)[0]`, or the full tree inside `jlora.freeze(tx)`.
They read A, B and the layout of a node; its base may be missing. Other trainable leaves (DoRA's m,
a `FullArray`) are passed through unchanged, or to the wrapped optimizer.
"""

from jlora.optim._adalora import adalora as adalora
from jlora.optim._adalora import orthogonality as orthogonality
from jlora.optim._fa import lora_fa as lora_fa
from jlora.optim._plus import lora_plus as lora_plus
from jlora.optim._riemannian import riemannian as riemannian
from jlora.optim._rite import lora_rite as lora_rite

__all__ = ["adalora", "lora_fa", "lora_plus", "lora_rite", "orthogonality", "riemannian"]
