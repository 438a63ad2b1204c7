"""Read adapter_config.json, and check it key by key; unsupported variants raise by name."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jlora._paths import brief, near_misses
from jlora.peft._match import Patterns

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Variants that change the computation; they raise if enabled.
_VARIANTS = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layers replicated from shared weights",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA)",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
# Entries that do not matter once A and B exist.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out"),
    *("inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    "merge_weights",  # of PEFT 0.2: when to merge, not what
    "ensure_weight_tying",  # both copies are in the file, and here they are one leaf
    "context_length",  # vLLM's, of an adapter for longer contexts
}
_READ = {
    *("alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r"),
    *("rank_pattern", "target_modules", "target_parameters", "use_dora", "use_rslora"),
    *("trainable_token_indices", "d_initial"),
}
# Keys that only another program's configuration has, and how its adapter becomes PEFT's.
_FOREIGN = {
    "MLX-LM": (
        ("fine_tune_type", "lora_parameters", "adapter_path"),
        "its lora_a (in, r) and lora_b (r, out), in adapters.safetensors, are PEFT's lora_A.weight "
        "and lora_B.weight transposed, and its `scale` is s itself: lora_alpha = scale * rank",
    ),
    "Tunix or Qwix": (
        ("module_path", "rank"),
        "its lora_a and lora_b, in an Orbax checkpoint, have jlora's shapes: they are the `lora_a` "
        "and `lora_b` of a `LoraArray`, with s = alpha / rank",
    ),
}
# Other PEFT methods that jlora supports as forms, and those of their entries without effect.
FORMS = {"LORA": "lora", "ADALORA": "adalora", "VERA": "vera"}
_OWN = {
    "ADALORA": {
        *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
        *("total_step", "rank_pattern", "alpha_pattern", "use_rslora", "r", "init_r"),
    },
    "VERA": {"projection_prng_key", "save_projection", "vera_dropout", "init_weights"},
}
EPSILON = 1e-5  # what PEFT's AdaLoRA adds to the rank that it divides by
# Initializers that change the base weights, and depend on data or random numbers.
_MOVES_BASE = ("pissa_niter", "corda", "lora_ga", "loftq")


# For a file without a configuration: alpha, or "rank" for each module's own rank.
Alpha = float | int | Literal["rank"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The entries of a LoRA configuration that jlora uses, with PEFT's defaults."""

    r: int = 8
    lora_alpha: float | int = 8
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    target_modules: str | frozenset[str] | None = None
    target_parameters: frozenset[str] = frozenset()
    exclude_modules: str | frozenset[str] = frozenset()
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] = ()
    modules_to_save: Collection[str] = ()
    bias: str = "none"
    init_lora_weights: bool | str = True
    task_type: str | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    form: str = "lora"
    d_initial: float = 0.1

    def scaling(self, alpha: float | int, rank: int) -> float:
        """Return s: α/r, or α/√r for rsLoRA; AdaLoRA's, and VeRA's, which is 1."""
        if self.form == "vera":
            return 1.0
        if self.form == "adalora":
            return (alpha if alpha > 0 else rank) / (rank + EPSILON)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def alpha_of(s: float | np.floating, rank: int, rslora: bool) -> float | int:
    """Return the alpha of the fewest decimal digits whose α/r is this float32 scaling.

    The scaling is stored as float32, so several alphas give the same one: 10/3 is 3.3333333, and so
    is 9.9999999/3. The shortest is the one that was written.
    """
    divisor = math.sqrt(rank) if rslora else rank
    exact = float(s) * divisor
    written = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
    alpha = next(x for x in written if np.float32(x / divisor) == np.float32(s))
    return int(alpha) if alpha.is_integer() else alpha


def read_json(source: Path, call: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    try:
        entries = json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`{call}`: {source.name} is not JSON ({error or 'nested too deep'}). "
            "Copy the folder again."
        ) from None
    if not isinstance(entries, dict):
        raise ValueError(
            f"`{call}`: {source.name} is not a JSON object but a {type(entries).__name__}."
        )
    return entries


def read_config(config: object, call: str) -> Config:
    """Read a configuration from a dict, a file or a folder."""
    if isinstance(config, Mapping):
        return parse(config, call)
    if not isinstance(config, str | os.PathLike):
        raise TypeError(
            f"`{call}`: the configuration is a {type(config).__name__}; give the dict, the "
            f"{CONFIG} or its folder. Of a PEFT object take `config.to_dict()`."
        )
    file = Path(config)
    file = file / CONFIG if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"`{call}`: there is no {file}.")
    return parse(read_json(file, call), call)


def foreign(entries: Container[Any]) -> str:
    """Return a hint if the keys are those of another program's configuration."""
    for program, (keys, how) in _FOREIGN.items():
        found = [key for key in keys if key in entries]
        if found:
            return f" Its key {found[0]!r} is one of {program}'s: {how}."
    return ""


def parse(entries: Mapping[Any, Any], call: str) -> Config:
    """Check every key; raise for entries that change the result and are not supported."""
    kind = _as_json(entries.get("peft_type"))
    if kind is None:
        raise ValueError(f'`{call}`: the configuration has no "peft_type".{foreign(entries)}')
    if not isinstance(kind, str) or kind not in FORMS:
        raise ValueError(
            f'`{call}`: peft_type {brief(kind)} is another method than LoRA ("LORA"), and jlora '
            "does not support it. Merge the adapter in PEFT, or train it there."
        )
    entries = _as_lora(entries, kind)
    for key, value in entries.items():
        if key in _VARIANTS and value:
            raise ValueError(
                f"`{call}`: the adapter uses {_VARIANTS[key]} ({key}={brief(value)}), which jlora "
                "does not support; read as LoRA it would compute something else."
            )
        if key not in _VARIANTS and key not in _HARMLESS | _READ and value:
            raise ValueError(
                f'`{call}`: the configuration sets "{key}" to {brief(value)}, which jlora does not '
                "know, and which may change the result. Remove it if it does not. "
                + near_misses(str(key), sorted(_READ | set(_VARIANTS)))
            )
    known = {f.name for f in dataclasses.fields(Config)} - {"form"}
    typed = {
        key: _typed(key, _as_json(value), call)
        for key, value in entries.items()
        if key in known and value is not None
    }
    return Config(**typed, form=FORMS[kind])


def _as_lora(entries: Mapping[Any, Any], kind: str) -> Mapping[Any, Any]:
    """Convert the entries of a method that jlora has as a form to those of LoRA."""
    if kind == "LORA":
        return entries
    kept = {key: x for key, x in entries.items() if key not in _OWN[kind]}
    if kind == "ADALORA":
        return {**kept, "r": entries.get("init_r", 12)}
    bias = entries.get("bias", "none")
    bias = "lora_only" if bias == "vera_only" else bias
    return {**kept, "r": entries.get("r", 256), "bias": bias}


def _as_json(value: object) -> Any:
    """Convert the Python values in `LoraConfig.to_dict`, sets and string enums, to JSON's."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)


def _typed(key: str, value: Any, call: str) -> Any:
    """Check the type of one entry; wrap single values of list entries in a list."""
    if key in ("layers_pattern", "modules_to_save") and isinstance(value, str):
        value = [value] if value else []  # PEFT treats an empty string as none
    if key == "layers_to_transform":
        value = [value] if isinstance(value, int) else value
        value = value or None  # an empty list selects every layer
    good, wanted = {
        "r": (_is_rank, "an integer of at least 1"),
        "d_initial": (_is_alpha, "a finite number"),
        "lora_alpha": (_is_alpha, "a finite number"),
        "rank_pattern": (lambda v: _is_map(v, _is_rank), "an object of integers of at least 1"),
        "alpha_pattern": (lambda v: _is_map(v, _is_alpha), "an object of finite numbers"),
        "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
        "use_dora": (lambda v: isinstance(v, bool), "true or false"),
        "lora_bias": (lambda v: isinstance(v, bool), "true or false"),
        "target_modules": (_is_names, "a string or a list of strings"),
        "exclude_modules": (_is_names, "a string or a list of strings"),
        "layers_to_transform": (lambda v: v is None or _is_list(v, int), "a list of integers"),
        "trainable_token_indices": (
            lambda v: _is_map(v, lambda of: _is_list(of, int)) or _is_list(v, int),
            "a list of integers, or an object of such lists",
        ),
        "bias": (lambda v: v in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
        "init_lora_weights": (lambda v: isinstance(v, bool | str), "true, false or a string"),
        "task_type": (lambda v: isinstance(v, str), "a string"),
    }.get(key, (lambda v: _is_list(v, str), "a list of strings"))
    if not good(value):
        raise ValueError(
            f"`{call}`: the configuration's {key} is {brief(value)}; it must be {wanted}."
        )
    if key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        return Patterns(value if isinstance(value, Mapping) else dict.fromkeys(value))
    if key in ("target_modules", "target_parameters", "exclude_modules"):
        return value if isinstance(value, str) else frozenset(value)
    return value


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30  # also no NaN; far inside float32


def _is_map(value: object, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and good(v) for k, v in value.items()
    )


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in value
    )


def _is_names(value: object) -> bool:
    return isinstance(value, str) or _is_list(value, str)


def check_init(config: Config, call: str) -> None:
    """Raise for adapters that were trained over base weights that cannot be recomputed.

    "pissa" and "olora" change the base weights too, but as a function of the weights alone.
    """
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_MOVES_BASE):
        raise ValueError(
            f"`{call}`: the adapter began with init_lora_weights={brief(init)}, which moves the "
            "base weights, so over the original ones it computes something else. Save it from PEFT "
            "with `path_initial_model_for_weight_conversion=...`, which converts it to LoRA."
        )
    unchanged = ("gaussian", "eva", "orthogonal", "mica")
    if isinstance(init, str) and init.lower() not in (*unchanged, "pissa", "olora"):
        raise ValueError(
            f"`{call}`: the adapter began with init_lora_weights={brief(init)}, which jlora does "
            "not support; it may change more than the initial values of A and B."
        )
