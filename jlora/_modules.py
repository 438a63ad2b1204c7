"""The vocabulary of adapter files: what every format says of a module, in PyTorch's orientation.

    W' = W + s · B A        A: (r, in)   B: (out, r)

A bridge turns these into its own files, or its files into these, and knows no other bridge.
"""

import dataclasses

import numpy as np


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
