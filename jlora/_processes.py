"""Programs of several processes: arrays of which each process has a part, and files of one writer.

Every process calls the same functions in the same order, as in any program of JAX.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import PyTree


def gathered(tree: PyTree) -> PyTree:
    """Replace arrays that are sharded over several processes by NumPy arrays, one by one."""
    return jax.tree.map(_gather, tree)


def _gather(x: Any) -> Any:
    if getattr(x, "is_fully_addressable", True):
        return x
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def put(x: Any, sharding: Sharding) -> jax.Array:
    """Put an array that every process has on devices; each process puts the shards of its own."""
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])


def in_first(write: Callable[[], None], call: str) -> None:
    """Call a function in process 0 alone; all processes wait for it, and raise if it raises."""
    if jax.process_count() == 1:
        write()
        return
    raised = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as error:  # the others would wait for ever
            raised = error
    failed = multihost_utils.broadcast_one_to_all(np.asarray(raised is not None))
    if raised is not None:
        raise raised
    if failed:
        raise RuntimeError(
            f"`{call}`: process 0, which writes for all processes, raised an error. See its output."
        )
