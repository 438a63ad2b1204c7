"""Products in float16, whose range is small: kept in float32 and rounded once, after the update.

x W may overflow where x (W + s A B) does not, and rounding it first would also make the sum of two
finite terms infinite. Other dtypes have the range of float32, or are rounded as the model does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jlora._arrays import accumulator
from jlora.transform._walk import Walk
from jlora.transform._weight import Value, Weight


def bound(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Array:
    """Apply an equation that multiplies to the bases of weights; return float16 as float32."""
    aval: Any = eqn.outvars[0].aval
    if aval.dtype != jnp.float16 or "preferred_element_type" not in eqn.params:
        return walk.bind(eqn, *operands)[0]
    wide = accumulator(aval.dtype)
    unrounded = eqn.replace(params={**eqn.params, "preferred_element_type": wide})

    @jax.custom_jvp
    def product(*operands: Any) -> Any:
        return walk.bind(unrounded, *operands)[0]

    @product.defjvp
    def _(at: Any, along: Any) -> Any:
        # In float16 as in the model, so that the transpose, a product of W's size, is no slower.
        moved = jax.jvp(lambda *xs: walk.bind(eqn, *xs)[0], at, along)[1]
        return product(*at), moved.astype(wide)

    return product(*(x.base if isinstance(x, Weight) else x for x in operands))
