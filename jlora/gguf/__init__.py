"""GGUF, the files of llama.cpp: read quantized models, byte for byte; read and write adapters.

The library `gguf` is needed: `pip install 'jlora[gguf]'`.
"""

from jlora.gguf._adapter import load, save
from jlora.gguf._model import blocks, check, read

__all__ = ["blocks", "check", "load", "read", "save"]


def __dir__() -> list[str]:
    return __all__
