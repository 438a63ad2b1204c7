"""The variants of LoRA: one file each, and one line in the table below.

A form defines the parts of an update besides A and B: their axes, their initial values, whether
they train, how they combine into one A and one B, and what is not supported. All other code asks
the form. `register` adds a form from outside, for `LoraSpec(form=...)` and all of jlora.

DoRA's magnitude, `LoraSpec(dora=True)`, composes with every form; see `jlora.forms.dora`.

```python
def blocks(key, weight, rank, scaling, dtype):
    ...  # A, which is frozen, and B, which is initially zero


jlora.forms.register(jlora.forms.Form("miss", blocks, frozen=("lora_a",)))
spec = jlora.LoraSpec(rank=8, alpha=8, form="miss")
```
"""

from jlora.forms import adalora, lora, lora_fa, lora_xs, mica, vera
from jlora.forms._factors import as_lora as as_lora
from jlora.forms._factors import changed_b as changed_b
from jlora.forms._factors import delta as delta
from jlora.forms._factors import factor_shapes as factor_shapes
from jlora.forms._factors import factors as factors
from jlora.forms._factors import shapes as shapes
from jlora.forms._form import Factors as Factors
from jlora.forms._form import Form as Form
from jlora.forms._form import Initializer as Initializer
from jlora.forms._form import Part as Part
from jlora.forms._form import Split as Split
from jlora.forms._form import named as named
from jlora.forms._form import register as register
from jlora.forms._form import shareable as shareable
from jlora.forms._form import zeros as zeros
from jlora.forms._node import base_of as base_of
from jlora.forms._node import begun as begun
from jlora.forms._node import check as check
from jlora.forms._node import gain as gain
from jlora.forms._node import has_gain as has_gain
from jlora.forms._node import of as of
from jlora.forms._node import parts as parts
from jlora.forms._node import weight as weight
from jlora.forms._version1 import from_version_1 as from_version_1

__all__ = [
    *("as_lora", "base_of", "begun", "changed_b", "check", "delta", "factor_shapes", "Factors"),
    *("factors", "Form", "from_version_1", "gain", "has_gain", "Initializer", "named", "of"),
    *("Part", "parts", "register", "shapes", "shareable", "Split", "weight", "zeros"),
]

for _form in (lora, lora_fa, lora_xs, vera, adalora, mica):
    register(_form.FORM)


def __dir__() -> list[str]:
    return __all__
