"""The variants that quality.py compares: rules, learning rate, optimizer and initialization.

A row lists what differs from the job of examples/finetune.py. An optimizer is a function of the
learning rate and the number of steps.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import jlora
from jlora import initializers, optim

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import training
from evaluation import Job, make_apply

LR = 2e-3  # the job's own


class Variant(NamedTuple):
    """Rules, learning rate, optimizer, and an optional step between `attach` and training."""

    rules: dict[str, Any]
    lr: float = LR
    optimizer: Callable[[float, int], optax.GradientTransformation] = training.make_optimizer
    begin: Callable[[Job], Any] | None = None  # the job, adapted by the rules -> its parameters


def linear(**spec: Any) -> dict[str, Any]:
    """Rules for all linear layers."""
    return {r".*_proj/kernel": jlora.LoraSpec(**spec)}


def share_factors(job: Job) -> Any:
    """Give all layers one A and one B, as VeRA does."""
    return jlora.tie(job.params, {".*": ("lora_a", "lora_b")})


def from_inputs(job: Job) -> Any:
    """Initialize with EVA from the inputs of the first batches."""
    apply = make_apply(job.config)

    @jax.jit
    def seen(batch: training.Batch) -> Any:
        return jlora.capture(
            apply, job.params, batch["tokens"], batch["positions"], batch["segments"]
        )

    moments = [seen(batch) for batch in job.batches[:4]]
    return initializers.eva(job.params, jax.tree.map(lambda *xs: sum(xs), *moments))


def plus(lr: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(training.make_optimizer(lr, steps), optim.lora_plus(16.0))


def preconditioned(lr: float, steps: int) -> optax.GradientTransformation:
    return optax.chain(optim.riemannian(), training.make_optimizer(lr, steps))


def rite(lr: float, steps: int) -> optax.GradientTransformation:
    return optim.lora_rite(training.make_schedule(lr, steps))


def projected(lr: float, steps: int) -> optax.GradientTransformation:
    return optim.lora_fa(training.make_optimizer(lr, steps), scaling=jlora.LoraSpec().s)


def allocated(lr: float, steps: int) -> optax.GradientTransformation:
    inner, phase = training.make_optimizer(lr, steps), steps // 4
    ends = {"warmup_steps": phase, "final_steps": phase}
    return optim.adalora(inner, target_rank=8, total_steps=steps, **ends)


VARIANTS = {
    "lora": Variant(linear()),  # rank 8, alpha 16
    "lora_qv": Variant({r".*/(q|v)_proj/kernel": jlora.LoraSpec()}),
    "lora_lr_low": Variant(linear(), LR / 4),
    "lora_lr_high": Variant(linear(), LR * 4),
    "lora_lr_highest": Variant(linear(), LR * 16),
    "lora_r64": Variant(linear(rank=64)),
    "rslora_r64": Variant(linear(rank=64, scaling="rslora")),  # s is that of rank 8
    "dora": Variant(linear(dora=True)),
    "pissa": Variant(linear(init=initializers.pissa)),
    "olora": Variant(linear(init=initializers.olora)),
    "orthogonal": Variant(linear(init=initializers.orthogonal)),
    "eva": Variant(linear(), begin=from_inputs),
    # B at the higher rate, or steps that do not depend on how A·B is split.
    "lora_plus": Variant(linear(), LR / 4, plus),
    "riemannian": Variant(linear(), LR, preconditioned),
    "lora_rite": Variant(linear(), LR, rite),
    "lora_fa": Variant(linear(), LR, projected),
    "adalora": Variant(linear(form="adalora", rank=12, alpha=24), LR, allocated),
    # The authors' scripts use rank 64 with alpha equal to it, and a rate of 4e-3.
    "lora_xs": Variant(linear(form="lora_xs", rank=32, alpha=32), 2 * LR),
    # The paper tunes Llama at ten times LoRA's rate. 192 is the narrowest layer's width.
    "vera": Variant(linear(form="vera", rank=192, alpha=192), 10 * LR, begin=share_factors),
    # "LoRA Without Regret" finds full fine-tuning's best rate at a tenth of LoRA's. The others
    # vary it as their `lora_lr_*` counterparts do.
    "full": Variant({".*": "full"}, LR / 10),
    "full_lr_low": Variant({".*": "full"}, LR / 10 / 4),
    "full_lr_high": Variant({".*": "full"}, LR / 10 * 4),
    "full_lr_highest": Variant({".*": "full"}, LR / 10 * 16),
}
