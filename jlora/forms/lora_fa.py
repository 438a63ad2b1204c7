"""LoRA-FA: `W + s · A B` with a frozen A, so that no inputs are saved for A's gradient.

Zhang et al. 2023, arXiv:2308.03303. PEFT's `create_lorafa_optimizer` also freezes A; for its
gradient of B see `jlora.optim.lora_fa`.
"""

from jlora.forms._form import Form
from jlora.forms.lora import kaiming

FORM = Form("lora_fa", kaiming, frozen=("lora_a",))
