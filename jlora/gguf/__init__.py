"""GGUF, the files of llama.cpp: quantized models are read, byte for byte, and adapters are written.

The library `gguf` is needed: `pip install 'jlora[gguf]'`.
"""

from jlora.gguf._adapter import save
from jlora.gguf._model import blocks, read

__all__ = ["blocks", "read", "save"]


def __dir__() -> list[str]:
    return __all__
