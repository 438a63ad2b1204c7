"""Initial values of A and B: plain functions `(key, weight, rank, scaling, dtype) -> (A, B)`.

`weight` is one weight arranged as `(in, out)`; A comes back as `(in, rank)` and B as `(rank, out)`.
`jlora.attach` arranges, and maps over stacks. A function that never reads the weight's values costs
nothing for them: `attach` compiles it, and what is not used is not computed.

A function whose `s·A·B` is not zero may return a third array, `(in, out)`: what is to stand for the
weight, `W - s·A·B`, so that the model starts unchanged all the same. `attach` makes it the node's
`base`, a new array, and marks the node `residual`.

Those that begin a form of their own (`vera`, `lora_xs`, ...) are in its file in `jlora.forms`.
`eva`, `corda` and `lora_ga` read data as well, and come after `attach`: functions of its tree and
of the moments of the inputs, or of a gradient.
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
from jlora.initializers._random import a_zero as a_zero
from jlora.initializers._random import gaussian as gaussian
from jlora.initializers._random import kaiming_rank as kaiming_rank
from jlora.initializers._random import orthogonal as orthogonal
from jlora.initializers._random import uniform as uniform
