"""Check arguments that are numbers, dtypes or PRNG keys, for the packages that know no trees."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat
from jlora._paths import brief


def check_number(
    value: object,
    call: str,
    argument: str,
    wanted: str = "a number",
    holds: Callable[[Any], Any] | None = None,
    scalar: bool = True,
) -> None:
    """Refuse anything but a real number for which `holds`; the value of a traced one is unknown."""
    kind = np.dtype(type(value)) if isinstance(value, int | float) else getattr(value, "dtype", "O")
    real = jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)
    if not real or (scalar and getattr(value, "shape", ()) != ()):
        raise TypeError(f"`{call}`: `{argument}` is {brief(value)}. Give {wanted}.")
    if holds is not None and not _compat.is_traced(value) and not np.all(holds(np.asarray(value))):
        raise ValueError(f"`{call}`: `{argument}` is {value}. Give {wanted}.")


def check_integer(value: Any, call: str, argument: str, least: int) -> None:
    """Refuse anything but an integer of at least `least`."""
    wanted = f"Give an integer of at least {least}."
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"`{call}`: `{argument}` is {brief(value)}. {wanted}")
    if number < least:
        raise ValueError(f"`{call}`: `{argument}` is {number}. {wanted}")


def check_dtype(dtype: Any, call: str) -> None:
    """Refuse a dtype of A and B that is not floating."""
    try:
        name = None if dtype is None else jnp.dtype(dtype).name  # None would be float64
    except TypeError:
        name = None
    if name is None or not jnp.issubdtype(name, jnp.floating):
        raise TypeError(
            f"`{call}`: `dtype` is {name or brief(dtype)}. A and B are trained, so their "
            "dtype must be floating; omit it for float32."
        )


def check_key(key: Any, call: str) -> None:
    """Refuse anything but one PRNG key, of the new kind or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not (typed or (dtype == jnp.uint32 and shape is not None and len(shape) == 1)):
        raise TypeError(
            f"`{call}`: the key is {brief(key)}. Pass one PRNG key, `key=jax.random.key(0)`."
        )
