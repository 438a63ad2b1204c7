"""LoRA-FA: `W + s · A B` over a frozen A, so that no input is kept for A's gradient.

Zhang et al. 2023, arXiv:2308.03303. PEFT's `create_lorafa_optimizer` freezes A as well; its
gradient of B is `jlora.optim.lora_fa`.
"""

from jlora.forms._form import Form
from jlora.forms.lora import kaiming

FORM = Form("lora_fa", kaiming, frozen=("lora_a",))
