"""Whether a square weight is (out, in), as a Linear's, or (in, out), as that of GPT-2's Conv1D.

PEFT's `fan_in_fan_out` is one entry for all modules, and a model may have both, as an encoder and a
decoder do. The shape of a square weight tells nothing, but those of its neighbors do, by their bias
or their A and B.
"""

from collections.abc import Mapping

import numpy as np


class Conv1D:
    """The orientation of weights that are not square, by the names of the modules around them."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        by_module: Mapping[str, Mapping[str, np.ndarray]],
        call: str,
    ) -> None:
        self._call = call
        self._seen: dict[str, set[bool]] = {}
        for name, shape in shapes.items():
            module, _, own = name.rpartition(".")
            b = by_module.get(module, {}).get(f"{module}.lora_B.weight")
            outputs = shapes.get(f"{module}.bias", (0,))[0] if b is None else b.shape[0]
            if own == "weight" and len(shape) == 2 and shape[0] != shape[1] and outputs in shape:
                for around in _around(module):
                    self._seen.setdefault(around, set()).add(outputs == shape[1])

    def has(self, module: str, size: int) -> bool:
        """Return whether a module's square weight is (in, out), as its nearest neighbors are."""
        near = next((x for x in _around(module) if x in self._seen), None)
        found = self._seen.get(near or "", {True})
        if len(found) > 1:
            raise ValueError(
                f'`{self._call}`: "{module}.weight" [{size}, {size}] is square, and near it are '
                "weights that are (out, in) and others that are (in, out), so nothing tells which "
                "of its axes are inputs. Merge it in PEFT: `merge_and_unload`."
            )
        return found == {True}


def _around(module: str) -> list[str]:
    """Return the names of the modules that a module is in, the nearest first."""
    parts = module.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) - 1, -1, -1)]
