"""The type checker of the suite: beartype, for all but functions inside of functions.

Python makes such a function anew at each call, and beartype would compile a check for it each time,
which took an eighth of the suite. Their arguments come from the function around them, whose own are
checked.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn if "<locals>" in fn.__qualname__ else beartype(fn)
