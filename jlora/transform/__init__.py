"""The transform: `lora(fn)` takes adapted parameters where `fn` takes plain ones."""

from jlora.transform import (
    control,
    conv,
    custom,
    joining,
    linear,
    lookup,
    ragged,
    sharded,
    structural,
)
from jlora.transform._capture import capture as capture
from jlora.transform._layouts import layouts as layouts
from jlora.transform._lora import lora as lora

__all__ = ["capture", "layouts", "lora"]

# Importing the rule files registers their rules.
del control, conv, custom, joining, linear, lookup, ragged, sharded, structural
