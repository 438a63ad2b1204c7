"""Arithmetic of adapters: functions of adapters to adapters, one file each.

    add        Σ wᵢ · sᵢ Aᵢ Bᵢ, exactly: factors are concatenated, no dense update is built
    compress   the best approximation of a lower rank, from the factors
    extract    the update between two checkpoints as an adapter

```python
sum_ = jlora.arithmetic.add([math, code], [0.7, 0.3])
small, kept = jlora.arithmetic.compress(sum_, rank=16)
adapter, errors = jlora.arithmetic.extract(tuned, base, {r".*/kernel": jlora.LoraSpec(rank=16)})
```

An adapter is what `jlora.detach` returns. Adapted parameters are accepted too, and needed where a
parameter trained in full ("full") is scaled or added, because its difference from the original
counts. The results are adapters; `jlora.bind(base, adapter)` puts them on the weights.
"""

from jlora.arithmetic._add import add as add
from jlora.arithmetic._compress import compress as compress
from jlora.arithmetic._extract import extract as extract
from jlora.arithmetic._residual import residual_to_lora as residual_to_lora
from jlora.arithmetic._scale import scale as scale

__all__ = ["add", "compress", "extract", "residual_to_lora", "scale"]


def __dir__() -> list[str]:
    return __all__
