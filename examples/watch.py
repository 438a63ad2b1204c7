"""What people watch while a run trains: TensorBoard, Weights & Biases, and the use of the device.

Both packages are optional and imported where they are asked for.
"""

import argparse
import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import placing

# Peak dense bfloat16 FLOP/s of one device, by the beginning of its `device_kind`; the longest one
# that fits counts. JAX reports a TPU v2 or v3 core, and a v4 or later chip, as one device.
# TPU: cloud.google.com/tpu/docs, "System architecture" of each version.
# NVIDIA: the data sheets of the A100, H100, H200, L4, L40S and B200; without sparsity.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
Log = Callable[[int, dict[str, float]], None]


def peak_of(kind: str) -> float | None:
    """The peak of a kind of device, or None where it is not known."""
    found = max((name for name in PEAKS if named(kind, name)), key=len, default=None)
    return None if found is None else PEAKS[found]


def named(kind: str, name: str) -> bool:
    """Whether `kind` begins with the words of `name`: "NVIDIA L40" is no "NVIDIA L4"."""
    return f"{kind} ".replace("-", " ").startswith(f"{name} ")


def flops_of_token(trainable: Any, frozen: Any, tied: bool) -> float:
    """What the model needs: 4 FLOPs for each frozen weight, 6 for each trainable one.

    A frozen weight has a product in the forward pass and one for the gradient of its input. An
    embedding that is not the head as well has none. The products of attention with itself, and
    what --remat computes again, are not counted.
    """
    stored = lambda x: hasattr(x, "dequantize")

    def size(tree: Any) -> int:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=stored)
        used = [x for path, x in leaves if tied or "embed" not in jax.tree_util.keystr(path)]
        return sum(math.prod(x.shape) for x in used if len(x.shape) > 1)

    return 4.0 * size(frozen) + 6.0 * size(trainable)


def utilization(flops_of_token: float, tokens_per_second: float) -> dict[str, float]:
    """The model's FLOPs over the peak of all devices, or nothing where the peak is not known."""
    devices = jax.devices()
    peak = peak_of(devices[0].device_kind)
    if peak is None:
        return {}
    return {"mfu": flops_of_token * tokens_per_second / (peak * len(devices))}


def check(names: Sequence[str]) -> None:
    """Raise ValueError if a package is not installed."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise ValueError(
                f"`--log {name}`: {MODULES[name]} is not installed ({error}). Run pip install "
                f"{MODULES[name]}, or leave it out: metrics.jsonl has the same numbers."
            ) from error


@contextlib.contextmanager
def loggers(args: argparse.Namespace) -> Iterator[list[Log]]:
    """Yield the functions that log the numbers of a step or of an evaluation.

    Of several processes, the first one logs.
    """
    settings = {name: str(value) for name, value in vars(args).items() if value is not None}
    opening = {"tensorboard": tensorboard, "wandb": wandb}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(opening[name](args.out, settings))
            for name in (args.log if placing.is_first() else ())
        ]


@contextlib.contextmanager
def tensorboard(out: Path, settings: dict[str, Any]) -> Iterator[Log]:
    """Write event files into OUT/tensorboard."""
    from tensorboardX import SummaryWriter

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in named_numbers(numbers).items():
            writer.add_scalar(name, value, step)
        writer.flush()

    with SummaryWriter(str(out / "tensorboard")) as writer:
        writer.add_text("settings", "\n\n".join(f"{k}: {v}" for k, v in settings.items()))
        yield log


@contextlib.contextmanager
def wandb(out: Path, settings: dict[str, Any]) -> Iterator[Log]:
    """Log to Weights & Biases, as its environment variables say."""
    module = importlib.import_module("wandb")
    with module.init(project="jlora", name=out.name, dir=str(out), config=settings) as run:
        yield lambda step, numbers: run.log(named_numbers(numbers), step=step)


def named_numbers(line: dict[str, float]) -> dict[str, float]:
    """A line of metrics.jsonl without its step."""
    return {name: value for name, value in line.items() if name != "step"}
