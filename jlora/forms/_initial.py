"""What an initializer is called with and what it returns."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora._check_values import check_dtype, check_integer, check_key, check_number
from jlora._paths import brief

P = ParamSpec("P")
T = TypeVar("T")
_CALL = "init(key, weight, rank=..., scaling=..., dtype=...)"


class RankError(ValueError):
    """A rank for which a decomposition has too few directions; `jlora.attach` adds the path."""


class ReturnError(TypeError):
    """What an initializer of the user returned; `jlora.attach` begins the sentence."""


def initializer(fn: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of an initializer that is called directly, and the shapes it returns."""
    call, signature = f"jlora.initializers.{fn.__name__}", inspect.signature(fn)

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"`{call}`: {error}. Call it as `{call}(key, weight, rank)`, or pass the function "
                f"itself: `LoraSpec(init={call})`."
            ) from None
        given.apply_defaults()
        _check(given.arguments, call)
        made = fn(*args, **kwargs)
        sides, rank = given.arguments["weight"].shape, given.arguments["rank"]
        if _shapes(made)[:2] != [(sides[0], rank), (rank, sides[1])]:
            raise RankError(
                f"`{call}`: rank {rank} is above min(in, out) = min{sides}, and A and B are "
                f"computed from the weight, which has no more directions. Use {min(sides)} or less."
            )
        return made

    return checked


def _check(given: dict[str, Any], call: str) -> None:
    key, weight, rank = given["key"], given["weight"], given["rank"]
    check_key(key, call)
    array = isinstance(weight, jax.Array | np.ndarray)
    if not (array and weight.ndim == 2 and jnp.issubdtype(weight.dtype, jnp.floating)):
        raise TypeError(
            f"`{call}`: `weight` is {brief(weight)}. Pass one floating-point array (in, "
            "out); for a stack use `jax.vmap`, and for a tree of parameters `jlora.attach`, with "
            f"`LoraSpec(init={call})`."
        )
    check_integer(rank, call, "rank", 1)
    check_number(given["scaling"], call, "scaling", "a number, s = alpha/rank")
    check_dtype(given["dtype"], call)
    if given.get("niter") is not None:
        check_integer(given["niter"], call, "niter", 0)


def _shapes(made: object) -> list[Any]:
    """Return the shapes of what an initializer returned; None for what is not an array."""
    many = made if isinstance(made, tuple | list) else [made]
    return [getattr(x, "shape", None) for x in many]


def check_initializer(init: Any, call: str) -> None:
    """Refuse anything that cannot be called as an initializer."""
    if not callable(init):
        raise TypeError(
            f"`{call}`: pass a function, e.g. `init=jlora.initializers.kaiming`, that is called as "
            f"`{_CALL}`."
        )
    try:
        signature = inspect.signature(init)
    except ValueError:  # some callables written in C have none
        return
    names = list(signature.parameters)
    try:
        signature.bind(None, None, rank=1, scaling=1.0, dtype=None)
    except TypeError as error:
        hint = "Name the last three parameters so, or accept `**kwargs`."
        if names[:1] == ["params"]:
            line = f"jlora.initializers.{getattr(init, '__name__', init)}(params, {names[1]})"
            hint = f"This one takes adapted parameters: attach first, then `params = {line}`."
        raise TypeError(f"`{call}`: it is called as `{_CALL}`: {error}. {hint}") from None


def supports_rank(init: functools.partial[Any], key: Any, weight: jax.ShapeDtypeStruct) -> bool:
    """Whether an initializer returns A and B of its rank, or something else altogether."""
    made: list[Any] = []
    try:
        jax.eval_shape(lambda *args: made.extend(_shapes(init(*args))), key, weight)
    except RankError:
        return False
    rank, factors = (init.keywords["rank"],), made[:2]
    if len(factors) < 2 or not all(factors):
        return True
    return factors[0][-1:] == rank and factors[1][:1] == rank


def check_returned(made: Any, sides: tuple[int, ...], rank: int) -> None:
    """Refuse anything but A, B and optionally a residual."""
    want = [(sides[0], rank), (rank, sides[1]), sides]
    if not isinstance(made, tuple | list) or _shapes(made) not in (want[:2], want):
        raise ReturnError(
            f"returned {brief(made)}. For this weight and rank {rank} it must return A {want[0]} "
            f"and B {want[1]} and, if A B is a part of the weight, the residual {sides}."
        )
