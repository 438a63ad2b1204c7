"""Storage formats for frozen weights: `jlora.quantize` puts a `QuantArray` in place of an array.

A rule has a format, such as `NF4(block=128)`, or its name, `"nf4"`. A format is a small frozen
dataclass in a file of its own: `Format` says what it must have.

- `Int8()`: a scale per output; products use the codes and build no weight.
- `Int4(group=128)`: a scale per group of inputs.
- `NF4(block=64, double=True)`: QLoRA's, as bitsandbytes stores it.
- `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`, `Q4_K`, `Q5_K`, `Q6_K`: the blocks of GGUF files. The
  last three are read from files (`jlora.gguf`), not written.
"""

from jlora.quant._array import QuantArray as QuantArray
from jlora.quant._errors import errors as errors
from jlora.quant._format import Format as Format
from jlora.quant.ggml import Q4_0 as Q4_0
from jlora.quant.ggml import Q4_1 as Q4_1
from jlora.quant.ggml import Q5_0 as Q5_0
from jlora.quant.ggml import Q5_1 as Q5_1
from jlora.quant.ggml import Q8_0 as Q8_0
from jlora.quant.ggml import Ggml as Ggml
from jlora.quant.ggml_k import Q4_K as Q4_K
from jlora.quant.ggml_k import Q5_K as Q5_K
from jlora.quant.ggml_k import Q6_K as Q6_K
from jlora.quant.int4 import Int4 as Int4
from jlora.quant.int8 import Int8 as Int8
from jlora.quant.nf4 import NF4 as NF4

__all__ = [
    *("errors", "Format", "Ggml", "Int4", "Int8", "NF4", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1"),
    *("Q5_K", "Q6_K", "Q8_0", "QuantArray"),
]


def __dir__() -> list[str]:
    return __all__
