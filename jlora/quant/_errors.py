"""`errors`: how far stored weights are from the weights that they stand for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jlora._arrays import LoraArray, accumulator, is_leaf
from jlora._base import built, is_stored
from jlora._boxes import leaves_with_paths
from jlora._check import check_tree
from jlora._nnx import Opened
from jlora._paths import describe, near_misses


def errors(base: PyTree, params: PyTree) -> dict[str, float]:
    """Compute the relative error of each stored weight, `‖W - Q‖ / ‖W‖` in the Frobenius norm.

    Args:
        base: the weights before `jlora.quantize`.
        params: the same tree with stored weights, adapted or not.

    Returns:
        A mapping from the path of each stored weight in `params` to its error; 0 for a weight that
        is zero.

    Raises:
        KeyError: `base` lacks a weight.
        ValueError: a weight has another shape in `base`.

    Example:
        >>> import jlora
        >>> base = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> found = errors(base, jlora.quantize(base, {"w": "nf4"}))
        >>> {path: round(error, 2) for path, error in found.items()}
        {'w': 0.09}
    """
    call = "jlora.quant.errors(base, params)"
    check_tree(base, call, "base")
    check_tree(params, call)
    known = dict(leaves_with_paths(Opened(base).tree, is_leaf))
    found = {}
    for path, leaf in leaves_with_paths(Opened(params).tree, is_leaf):
        stored = leaf.base if isinstance(leaf, LoraArray) else leaf
        if not is_stored(stored):
            continue
        if path not in known:
            raise KeyError(f'`{call}`: `base` has no "{path}". {near_misses(path, known)}')
        weight = known[path]
        weight = weight.base if isinstance(weight, LoraArray) else weight
        if weight.shape != stored.shape:
            raise ValueError(
                f"`{call}`: {describe(path, weight)} in `base` is {describe(path, stored)} in "
                "`params`. Pass the tree that was quantized."
            )
        found[path] = float(_relative(weight, stored))
    return found


@jax.jit
def _relative(weight: PyTree, stored: PyTree) -> Array:
    weight = built(weight)
    wide = accumulator(weight.dtype)
    weight, quantized = weight.astype(wide), built(stored).astype(wide)
    size = jnp.linalg.norm(weight.ravel())
    return jnp.where(size > 0, jnp.linalg.norm((weight - quantized).ravel()) / size, 0.0)
