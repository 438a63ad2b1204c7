"""LoRA for JAX: a function transform that accepts low-rank-adapted weights."""

from jlora import _foreign
from jlora import arithmetic as arithmetic
from jlora import bank as bank
from jlora import forms as forms
from jlora import initializers as initializers
from jlora import optim as optim
from jlora import quant as quant
from jlora import transform as transform
from jlora._adapt import bind as bind
from jlora._adapt import detach as detach
from jlora._adapt import unmerge as unmerge
from jlora._arrays import FullArray as FullArray
from jlora._arrays import LoraArray as LoraArray
from jlora._attach import attach as attach
from jlora._freeze import freeze as freeze
from jlora._merge import merge as merge
from jlora._moments import Moments as Moments
from jlora._partition import apply_updates as apply_updates
from jlora._partition import combine as combine
from jlora._partition import labels as labels
from jlora._partition import partition as partition
from jlora._partition import value_and_grad as value_and_grad
from jlora._report import Explanation as Explanation
from jlora._report import explain as explain
from jlora._report import summary as summary
from jlora._sharding import shardings as shardings
from jlora._sharding import specs as specs
from jlora._spec import LoraSpec as LoraSpec
from jlora._tie import tie as tie
from jlora._tie import untie as untie
from jlora.quant._quantize import dequantize as dequantize
from jlora.quant._quantize import quantize as quantize
from jlora.transform import capture as capture
from jlora.transform import layouts as layouts
from jlora.transform import lora as lora

__version__ = "0.1.0"

__all__ = [
    *("apply_updates", "arithmetic", "attach", "bank", "bind", "capture", "combine", "dequantize"),
    *("detach", "explain", "Explanation", "forms", "freeze", "FullArray", "initializers"),
    *("labels", "layouts", "lora", "LoraArray", "LoraSpec", "merge", "Moments", "optim"),
    *("partition", "quant", "quantize", "shardings", "specs", "summary", "tie", "transform"),
    *("unmerge", "untie", "value_and_grad"),
]

_foreign.hint_in(__name__)
