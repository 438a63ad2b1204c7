"""Optimizers that know A from B: optax transformations over trees with `LoraArray` nodes.

They take the tree of `jlora.partition(params)[0]`, and the whole one under `jlora.freeze(tx)`. Of a
node they read A, B and the layout; its base may be absent. Whatever else trains (DoRA's m, a
parameter trained whole) is left as it comes, or goes to the optimizer that is wrapped.
"""

from jlora.optim._adalora import adalora as adalora
from jlora.optim._adalora import orthogonality as orthogonality
from jlora.optim._fa import lora_fa as lora_fa
from jlora.optim._plus import lora_plus as lora_plus
from jlora.optim._riemannian import riemannian as riemannian
from jlora.optim._rite import lora_rite as lora_rite
