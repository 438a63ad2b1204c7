"""The transform: `lora(fn)` accepts adapted parameters in place of the base weights."""

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
from jlora.transform._extension import rule as rule
from jlora.transform._layouts import layouts as layouts
from jlora.transform._lora import lora as lora
from jlora.transform._probe import Probe as Probe
from jlora.transform._product import product as product
from jlora.transform._view import View as View
from jlora.transform._walk import Walk as Walk
from jlora.transform._weight import Weight as Weight

__all__ = [
    *("capture", "layouts", "lora"),
    *("Probe", "View", "Walk", "Weight", "product", "rule"),  # to extend it
]

# Importing the rule files registers their rules.
del control, conv, custom, joining, linear, lookup, ragged, sharded, structural
