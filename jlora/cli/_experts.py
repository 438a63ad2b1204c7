"""Parameters that hold all experts of a layer, (E, in, out) or (E, out, in), and PEFT's A and B.

PEFT 0.21 takes (E, out, in) unless the module says `is_transposed`; versions before took the other.
A file does not say which, but the shapes of A, (r E, in), and of B, (out, r E), do.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from jlora.cli._checkpoint import Checkpoint

_SINGLE = re.compile(r"\bexperts\.\d+\.")  # in the name of a tensor of one expert


def check_single(modules: Iterable[str], checkpoint: Checkpoint, call: str) -> None:
    """Refuse an update of all experts where each is stored on its own."""
    asked = next((m for m in modules if m.rpartition(".")[2] == "experts"), None)
    own = [name for name in checkpoint.entries if asked and name.startswith(f"{asked}.")]
    single = next(filter(_SINGLE.search, checkpoint.entries), None)
    if asked and single and all(map(_SINGLE.search, own)):
        raise ValueError(
            f'`{call}`: the adapter changes "{asked}" as transformers has it in memory, all '
            f'experts in one tensor, and BASE stores them one by one, as "{single}". Write BASE '
            "as it is in memory: `AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(NEW, "
            "save_original_format=False)`, and pass NEW."
        )


class Experts:
    """The layouts of parameters that are neither weights nor biases of a layer."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        by_module: Mapping[str, Mapping[str, np.ndarray]],
        call: str,
    ) -> None:
        self._shapes, self._call = shapes, call
        self._sides = {module: _sides(tensors) for module, tensors in by_module.items()}

    def layout(self, name: str) -> str:
        """Return "io" or "oi"; refuse a square one that nothing tells of."""
        module, shape = name.rpartition(".")[0], self._shapes[name]
        sides = self._sides.get(module)
        if not sides:
            return "io"
        if len(shape) == 2:
            return "oi"  # as a layer's weight
        near = (n for n in self._shapes if n.rpartition(".")[0] == module)
        votes = [_vote(self._shapes[n], sides) for n in (name, *near)]
        found = next(filter(None, votes), None)
        if found is None and shape[-1] == shape[-2]:
            raise ValueError(
                f'`{self._call}`: "{name}" {list(shape)} is square, so neither it nor the adapter '
                "tells which of its axes are inputs. Merge it in PEFT: `merge_and_unload`."
            )
        return found or "io"


def _sides(tensors: Mapping[str, np.ndarray]) -> set[tuple[int, int]]:
    """Return inputs and outputs of every A and B of a module."""
    found = set()
    for name, a in tensors.items():
        b = tensors.get(name.replace("lora_A", "lora_B"))
        if "lora_A" in name and b is not None and a.ndim == b.ndim == 2:
            found.add((a.shape[1], b.shape[0]))
    return found


def _vote(shape: tuple[int, ...], sides: set[tuple[int, int]]) -> str | None:
    """Return the layout if one alone fits."""
    ways = {"io": shape[-2:], "oi": shape[:-3:-1]}
    fits = [layout for layout, way in ways.items() if way in sides]
    return fits[0] if len(shape) > 2 and len(fits) == 1 else None
