"""Initial values of A and B: plain functions `(key, weight, rank, scaling, dtype) -> (A, B)`.

`weight` is one weight as an `(in, out)` matrix; A is returned as `(in, rank)`, B as `(rank, out)`.
`jlora.attach` reshapes, and maps over stacks. It compiles the function, so a function that does not
read the weight's values does not pay for them.

A function whose `s·A·B` is not zero may return a third array, `(in, out)`: the residual
`W - s·A·B`, so that the model still starts unchanged. `attach` stores it as the node's `base`, a
new array, and marks the node `residual`.

Initializers of a specific form (`vera`, `lora_xs`, ...) are defined with the form in `jlora.forms`.
`eva`, `corda` and `lora_ga` use data and are called after `attach`: they are functions of its tree
and of the moments of the inputs, or of a gradient. So is `loftq`, of the weights before quantizing.
"""

from jlora.forms import Factors as Factors
from jlora.forms import Initializer as Initializer
from jlora.forms import Split as Split
from jlora.forms.adalora import adalora as adalora
from jlora.forms.lora import kaiming as kaiming
from jlora.forms.lora_xs import lora_xs as lora_xs
from jlora.forms.mica import mica as mica
from jlora.forms.vera import vera as vera
from jlora.initializers._corda import corda as corda
from jlora.initializers._decomposed import milora as milora
from jlora.initializers._decomposed import olora as olora
from jlora.initializers._decomposed import pissa as pissa
from jlora.initializers._eva import eva as eva
from jlora.initializers._gradient import lora_ga as lora_ga
from jlora.initializers._loftq import loftq as loftq
from jlora.initializers._random import a_zero as a_zero
from jlora.initializers._random import gaussian as gaussian
from jlora.initializers._random import kaiming_rank as kaiming_rank
from jlora.initializers._random import orthogonal as orthogonal
from jlora.initializers._random import uniform as uniform

__all__ = [
    *("a_zero", "adalora", "corda", "eva", "Factors", "gaussian", "Initializer", "kaiming"),
    *("kaiming_rank", "loftq", "lora_ga", "lora_xs", "mica", "milora", "olora", "orthogonal"),
    *("pissa", "Split", "uniform", "vera"),
]
