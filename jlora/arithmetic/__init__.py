"""Arithmetic of adapters: functions of adapters to adapters, one file each.

    add          Σ wᵢ · sᵢ Aᵢ Bᵢ, exactly: factors are concatenated, no dense update is built
    scale        w · s A B; slerp: the arc between two updates
    compress     the nearest update of a lower rank, from the factors
    extract      the difference of two checkpoints as an adapter
    ties, dare, magnitude, della, breadcrumbs, sce, knots    merging that resolves interference
    inspect      norms, spectra, intruder dimensions; similarity: cosines and overlaps

```python
both = jlora.arithmetic.add([math, code], [0.7, 0.3])
small, kept = jlora.arithmetic.compress(both, rank=16)
adapter, errors = jlora.arithmetic.extract(tuned, base, {r".*/kernel": jlora.LoraSpec(rank=16)})
```

An adapter is what `jlora.detach` returns. Adapted parameters are accepted too, and needed where a
parameter trained in full ("full") is scaled or added, because its difference from the original
counts. The results are adapters; `jlora.bind(base, adapter)` puts them on the weights.

The methods that resolve interference are defined on the updates, not on A and B by themselves, so
they build one dense update at a time. With `rank=` the result is A and B, otherwise the merged
weights.
"""

from jlora.arithmetic._add import add as add
from jlora.arithmetic._breadcrumbs import breadcrumbs as breadcrumbs
from jlora.arithmetic._compress import compress as compress
from jlora.arithmetic._dare import dare as dare
from jlora.arithmetic._della import della as della
from jlora.arithmetic._extract import extract as extract
from jlora.arithmetic._inspect import inspect as inspect
from jlora.arithmetic._knots import knots as knots
from jlora.arithmetic._magnitude import magnitude as magnitude
from jlora.arithmetic._residual import residual_to_lora as residual_to_lora
from jlora.arithmetic._scale import scale as scale
from jlora.arithmetic._sce import sce as sce
from jlora.arithmetic._similarity import similarity as similarity
from jlora.arithmetic._slerp import slerp as slerp
from jlora.arithmetic._ties import ties as ties

__all__ = [
    *("add", "breadcrumbs", "compress", "dare", "della", "extract", "inspect", "knots"),
    *("magnitude", "residual_to_lora", "scale", "sce", "similarity", "slerp", "ties"),
]


def __dir__() -> list[str]:
    return __all__
