"""PEFT's AdaLoRA and VeRA: convert their files to LoRA's and back, with their extra parts.

ADALORA  lora_A (r, in), lora_B (out, r), lora_E (r, 1)        W + α/(r₀ + 1e-5) · B (E ⊙ A)
VERA     vera_lambda_d (r,), vera_lambda_b (out,), and once    W + diag(λ_b) B diag(λ_d) A
         vera_A (r, widest in), vera_B (widest out, r)

r₀ is `init_r`, even if `rank_pattern` has pruned singular values of some modules since.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora import forms
from jlora._arrays import LoraArray
from jlora._paths import brief
from jlora.peft._config import EPSILON, Alpha, Config
from jlora.peft._describe import Adapted
from jlora.peft._keys import Found, Tensors
from jlora.peft._names import Place
from jlora.peft._spell import PREFIX, names_of

_LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_VALUES, _LAMBDAS = "lora_E", {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"}
# PEFT's entries that LoRA does not have, with values that suffice for inference.
_ADALORA = {
    **{"target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85},
    **{"orth_reg_weight": 0.5, "total_step": 1},
}
_VERA = {"d_initial": 0.1, "projection_prng_key": 0, "save_projection": True}
METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ADALORA": ("adalora", _ADALORA),
    "VERA": ("vera", _VERA),
}


class Read(NamedTuple):
    """A file's tensors as LoRA tensors, and the extra parts by module."""

    tensors: dict[str, np.ndarray]
    extra: dict[str, dict[str, np.ndarray]]
    form: str


def as_lora(tensors: Tensors, config: Config | Alpha, found: Found, call: str) -> Read:
    """Convert the tensors of another method to LoRA's A and B, and separate its own parts."""
    form = config.form if isinstance(config, Config) else "lora"
    if form == "lora" or not isinstance(config, Config):
        return Read(dict(tensors), {}, "lora")
    by_module: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    own = {*_LORA, _VALUES} if form == "adalora" else set(_LAMBDAS)
    names = names_of(tensors, found.places, call)
    for key, name in names.items():
        module, _, part = name.rpartition(".")
        if part in own:
            by_module.setdefault(module, {})[part] = tensors[key]
        else:
            rest[key] = tensors[key]
    for module, parts in by_module.items():
        lacking = sorted(own - set(parts))
        if lacking:
            raise ValueError(f'`{call}`: "{module}" has no {lacking} in the file; copy it again.')
    if form == "adalora":
        return _adalora(by_module, rest, config, call)
    return _vera(by_module, rest, names, found, call)


def _adalora(
    by_module: Mapping[str, Mapping[str, np.ndarray]],
    rest: dict[str, np.ndarray],
    config: Config,
    call: str,
) -> Read:
    """Pad pruned ranks with zeros, so that all layers of a stacked leaf have one rank."""
    extra = {}
    for module, parts in by_module.items():
        a, b, e = (parts[name] for name in (*_LORA, _VALUES))
        if not (a.ndim == b.ndim == e.ndim == 2 and len(a) == len(e) == b.shape[1] <= config.r):
            raise ValueError(
                f'`{call}`: "{module}" has lora_A {list(a.shape)}, lora_B {list(b.shape)} and '
                f"lora_E {list(e.shape)}; they need one rank, at most init_r={config.r}."
            )
        less = config.r - len(a)
        rest[f"{PREFIX}{module}.{_LORA['lora_A']}"] = np.pad(a, ((0, less), (0, 0)))
        rest[f"{PREFIX}{module}.{_LORA['lora_B']}"] = np.pad(b, ((0, 0), (0, less)))
        extra[module] = {"singular_values": np.pad(e[:, 0], (0, less))}
    return Read(rest, extra, "adalora")


def _vera(
    by_module: Mapping[str, Mapping[str, np.ndarray]],
    rest: dict[str, np.ndarray],
    names: Mapping[str, str],
    found: Found,
    call: str,
) -> Read:
    """Slice each module's A and B out of the shared ones."""
    shared = {names[key]: key for key in rest if names[key] in ("vera_A", "vera_B")}
    if len(shared) < 2:
        raise ValueError(
            f"`{call}`: the file has no vera_A and vera_B. Without them (save_projection=False) "
            "they are PyTorch's random numbers of projection_prng_key. Save the adapter with "
            "`save_projection=True`."
        )
    a, b = (rest.pop(shared[name]) for name in ("vera_A", "vera_B"))
    extra = {}
    for module, parts in by_module.items():
        place = found.places.get(f"{module}.weight")
        ins, outs = a.shape[-1], len(parts["vera_lambda_b"])
        if place is not None:
            geometry = found.geometry(place, "linear", call)
            ins, outs = geometry.fan_in, geometry.fan_out
        fits = a.ndim == b.ndim == 2 and a.shape[1] >= ins and len(b) >= outs
        ranks = len(a), b.shape[-1], *parts["vera_lambda_d"].shape
        if not fits or len(set(ranks)) > 1 or parts["vera_lambda_b"].shape != (outs,):
            raise ValueError(
                f'`{call}`: "{module}" is ({ins}, {outs}) here, and the file has vera_A '
                f"{list(a.shape)}, vera_B {list(b.shape)}, vera_lambda_d "
                f"{list(parts['vera_lambda_d'].shape)} and vera_lambda_b "
                f"{list(parts['vera_lambda_b'].shape)}. Is it an adapter of this model?"
            )
        rest[f"{PREFIX}{module}.{_LORA['lora_A']}"] = a[:, :ins]
        rest[f"{PREFIX}{module}.{_LORA['lora_B']}"] = b[:outs]
        extra[module] = {ours: parts[theirs] for theirs, ours in _LAMBDAS.items()}
    return Read(rest, extra, "vera")


def with_extra(
    node: LoraArray, places: list[Place], read: Read, dtype: DTypeLike | None
) -> LoraArray:
    """Give a node that was read as LoRA the form and parts of its method."""
    if read.form == "lora":
        return node
    stack = node.lora_a.shape[: node.lora_a.ndim - node.layout.count("i") - 1]
    outs = node.lora_b.shape[len(stack) + 1 :]
    parts = {}
    for name in read.extra[places[0].module]:
        x = np.stack([read.extra[place.module][name] for place in places])
        shape = (*stack, *(outs if name == "lambda_b" else (-1,)))
        parts[name] = jnp.asarray(x.reshape(shape), dtype)
    return dataclasses.replace(node, form=read.form).with_parts(parts)


def bare(path: str, node: Any, method: str, call: str) -> Any:
    """Return the A and B of a node with the method's form, without its extra parts."""
    if not isinstance(node, LoraArray):
        return node
    if method not in METHODS or node.form != METHODS[method][0] or forms.has_gain(node):
        raise ValueError(
            f"`{call}`: peft_type={brief(method)} is none of {['LORA', *METHODS]}, or not every "
            f'node is of its form: "{path}" is of the form {node.form!r}. Leave `peft_type` out: '
            "LoRA with the same update is written."
        )
    return dataclasses.replace(node, form="lora", extra={})


def of_lora(
    method: str,
    parts: Mapping[Place, Adapted],
    nodes: Mapping[str, Any],
    entries: Mapping[str, Any],
    call: str,
) -> tuple[dict[Place, Adapted], dict[str, np.ndarray], dict[str, Any]]:
    """Convert LoRA's A and B to another method's tensors by module, shared tensors and entries."""
    for place, one in parts.items():
        stack = nodes[place.path].lora_a.ndim - nodes[place.path].layout.count("i") - 1
        if one.is_parameter or list(one.tensors) != [*_LORA.values()] or stack != len(place.index):
            raise ValueError(
                f'`{call}`: PEFT has {method} of linear layers alone, and "{place.name}" is '
                "another. Leave `peft_type` out: LoRA with the same update is written."
            )
    write = _write_adalora if method == "ADALORA" else _write_vera
    return write(parts, nodes, entries, call)


def _at(node: LoraArray, name: str, place: Place) -> np.ndarray:
    return np.asarray(node.extra[name], np.float32)[place.index].reshape(-1)


def _s(one: Adapted) -> float:
    return one.alpha / one.rank


def _write_adalora(
    parts: Mapping[Place, Adapted],
    nodes: Mapping[str, Any],
    entries: Mapping[str, Any],
    call: str,
) -> tuple[dict[Place, Adapted], dict[str, np.ndarray], dict[str, Any]]:
    """Give all modules the highest rank and the first scaling: PEFT has one of each."""
    rank, s = max(one.rank for one in parts.values()), _s(next(iter(parts.values())))
    if s <= 0:
        raise ValueError(f"`{call}`: PEFT's AdaLoRA has no scaling of {s}. Leave `peft_type` out.")
    made = {}
    for place, one in parts.items():
        a, b = (one.tensors[name] for name in _LORA.values())
        e = _at(nodes[place.path], "singular_values", place) * np.float32(_s(one) / s)
        less = rank - one.rank
        tensors = {
            "lora_A": np.pad(a, ((0, less), (0, 0))),
            "lora_B": np.pad(b, ((0, 0), (0, less))),
            _VALUES: np.pad(e, (0, less))[:, None],
        }
        made[place] = one._replace(tensors=tensors)
    said = {"init_r": rank, "lora_alpha": s * (rank + EPSILON), "peft_type": "ADALORA", "r": 8}
    return made, {}, {**entries, **_ADALORA, **said, "alpha_pattern": {}, "rank_pattern": None}


def _write_vera(
    parts: Mapping[Place, Adapted],
    nodes: Mapping[str, Any],
    entries: Mapping[str, Any],
    call: str,
) -> tuple[dict[Place, Adapted], dict[str, np.ndarray], dict[str, Any]]:
    """Write one A and one B; every module uses their first columns and rows."""
    shared: dict[str, np.ndarray] = {}
    for part, axis in (("lora_A", 1), ("lora_B", 0)):
        every = {place: one.tensors[_LORA[part]] for place, one in parts.items()}
        widest = max(every.values(), key=lambda x: x.shape[axis])
        for place, x in every.items():
            if not np.array_equal(x, widest.take(range(x.shape[axis]), axis)):
                raise ValueError(
                    f"`{call}`: PEFT's VeRA has one A and one B for all layers, and those of "
                    f'"{place.path}" differ. Share them, `jlora.tie(params, {{".*": ("lora_a", '
                    '"lora_b")})`, or leave `peft_type` out: LoRA is written.'
                )
        shared[f"base_model.vera_{part[-1]}"] = widest
    made = {}
    for place, one in parts.items():
        node = nodes[place.path]
        scaled = _at(node, "lambda_b", place) * np.float32(_s(one))
        tensors = {"vera_lambda_d": _at(node, "lambda_d", place), "vera_lambda_b": scaled}
        made[place] = one._replace(tensors=tensors)
    dropout = entries["lora_dropout"]
    lacks = {"alpha_pattern", "init_lora_weights", "lora_alpha", "lora_bias", "lora_dropout"}
    lacks |= {"rank_pattern", "target_parameters", "trainable_token_indices", "use_dora"}
    kept = {key: x for key, x in entries.items() if key not in lacks | {"use_rslora"}}
    bias = {"lora_only": "vera_only"}.get(entries["bias"], entries["bias"])
    said = {"bias": bias, "init_weights": True, "peft_type": "VERA", "vera_dropout": dropout}
    return made, shared, {**kept, **_VERA, **said}
