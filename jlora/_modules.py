"""The vocabulary of adapter files: what every format says of a module, in PyTorch's orientation.

    W' = W + s · B A        A: (r, in)   B: (out, r)

A bridge turns these into its own files, or its files into these, and knows no other bridge.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jlora._paths import brief, quoted


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """The update of one module's weight.

    Attributes:
        name: the module: "model.layers.0.self_attn.q_proj".
        a: A, `(r, in)`; of a convolution `(r, in, k...)`.
        b: B, `(out, r)`; of a convolution `(out, r, 1...)`.
        scaling: s.
        kind: "linear", "embedding" (A sees the vocabulary) or "conv".
        magnitude: DoRA's m, `(out,)`, or None.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scaling: float
    kind: str = "linear"
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.a)

    @property
    def alpha(self) -> float:
        """The alpha whose alpha / r is s."""
        return self.scaling * self.rank


def check_pair(a: np.ndarray | None, b: np.ndarray | None, name: str, call: str) -> int:
    """Return the rank of A `(r, in, ...)` and B `(out, r, ...)`; refuse what is no pair."""
    if a is None or b is None:
        raise ValueError(f"`{call}`: {quoted(name)} has {'A' if b is None else 'B'} alone.")
    if (
        a.ndim not in (2, 3, 4, 5)
        or b.ndim != a.ndim
        or a.shape[0] != b.shape[1]
        or not a.size * b.size
    ):
        raise ValueError(
            f"`{call}`: {quoted(name)} has {brief(a)} as A and {brief(b)} as B, which are not "
            "(r, in) and (out, r) of one rank r."
        )
    if any(n != 1 for n in b.shape[2:]):
        raise ValueError(
            f"`{call}`: {quoted(name)} has {brief(b)} as B; of a convolution, B is 1×1, as from "
            "PEFT and kohya. Merge it with the program that made it."
        )
    return len(a)


def uses_dora(modules: Sequence[Module], program: str, call: str) -> bool:
    """Whether the modules have magnitudes; refuse a mixture."""
    without = [module.name for module in modules if module.magnitude is None]
    if without and len(without) < len(modules):
        raise ValueError(
            f"`{call}`: {quoted(without[0])} has no magnitude and others have one. {program} has "
            "DoRA in all modules or in none. Merge the adapter, `jlora merge`."
        )
    return not without


def scaled(modules: Sequence[Module], attribute: str) -> float | None:
    """Return the scaling or alpha of all modules, or None if they differ."""
    values = {getattr(module, attribute) for module in modules}
    return values.pop() if len(values) == 1 else None
