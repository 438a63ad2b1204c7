"""Read and write the LoRA files of kohya's sd-scripts, for Stable Diffusion 1.5 and SDXL.

    lora_unet_<module>.lora_down.weight  (r, in)     lora_unet_<module>.lora_up.weight  (out, r)
    lora_unet_<module>.alpha             alpha       W' = W + alpha / r · up down

In `<module>` every "." is "_", which does not tell where the dots were; the model's own names do.
`lora_te` is its text encoder; SDXL has `lora_te1` and `lora_te2`, and sgm's names of the U-Net.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jlora import _tensor_file
from jlora._diffusion import SD15, SDXL, TEXT, flat, sgm_name, stable_diffusion
from jlora._diffusion import modules as modules_of
from jlora._disk import replacing_files
from jlora._modules import Module, check_pair
from jlora._paths import near_misses, quoted

__all__ = ["load", "save"]

_PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
_OTHER = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "lora_mid.weight": "CP"}


def __dir__() -> list[str]:
    return __all__


def load(file: str | os.PathLike[str], names: Iterable[str] | None = None) -> list[Module]:
    """Read a LoRA or DoRA of kohya's format.

    Args:
        file: a .safetensors file.
        names: of all modules of the model, with the component first, as diffusers has them:
            "unet.down_blocks.0.resnets.0.conv1". By default those of Stable Diffusion 1.5 and SDXL.

    Returns:
        The updates by diffusers' names; A and B have the dtype of the file.

    Raises:
        ValueError: the file is damaged; it has a module that `names` lacks; A or B is missing or
            has another rank; LoHa, LoKr and CP decompositions; a magnitude of the inputs.

    Example:
        See `save`.

    Reference: sd-scripts's `networks/lora.py`.
    """
    call = f"jlora.kohya.load({os.fspath(file)!r})"
    tensors = _tensor_file.read(Path(file), call)
    known = stable_diffusion() if names is None else _flat(names)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, x in tensors.items():
        name, _, part = key.partition(".")
        if part not in _PARTS:
            raise ValueError(_other(key, part, call))
        if name not in known:
            hint = " Pass `names=`, of the model's modules." if names is None else ""
            raise ValueError(
                f"`{call}`: {quoted(key)} is no module of the model.{hint} "
                f"{near_misses(name, known)}"
            )
        found.setdefault(name, {})[part] = x
    if not found:
        raise ValueError(f"`{call}`: the file has no tensors.")
    return [_module(known[name], name, parts, call) for name, parts in found.items()]


def _other(key: str, part: str, call: str) -> str:
    if part in _OTHER or part.startswith(("hada_", "lokr_")):
        kind = _OTHER.get(part, part.partition("_")[0])
        return (
            f"`{call}`: {quoted(key)} belongs to {kind} of LyCORIS, which is not one A and one B. "
            "Merge it into the model with LyCORIS, or extract a LoRA: `jlora extract`."
        )
    return f"`{call}`: {quoted(key)} is none of kohya's keys: <module>.{', '.join(_PARTS)}."


def _flat(names: Iterable[str]) -> dict[str, str]:
    """Return kohya's names of a model's modules."""
    prefixes = [(prefix, component) for prefix, component in TEXT.items()]
    found: dict[str, str] = {}
    for name in names:
        component, _, inside = name.partition(".")
        own = [prefix for prefix, other in prefixes if other == component]
        for prefix in own or [f"lora_{component}", "lora_unet"]:
            found.setdefault(flat(prefix, inside), name)
    return found


def _module(name: str, written: str, parts: Mapping[str, np.ndarray], call: str) -> Module:
    a, b = parts.get("lora_down.weight"), parts.get("lora_up.weight")
    rank = check_pair(a, b, written, call)
    assert a is not None and b is not None
    alpha = parts.get("alpha", np.float32(rank))
    if alpha.size != 1 or not np.isfinite(float(alpha.reshape(()))):
        raise ValueError(f'`{call}`: "{written}.alpha" is not one finite number.')
    m = parts.get("dora_scale")
    if m is not None and m.size != len(b):
        raise ValueError(
            f'`{call}`: "{written}.dora_scale" {list(m.shape)} is of the inputs; only a magnitude '
            f"of the {len(b)} outputs is DoRA's. Merge it into the model with LyCORIS."
        )
    m = None if m is None else m.reshape(-1)
    scaling = (float(alpha.reshape(())) or rank) / rank  # kohya takes an alpha of 0 for the rank
    return Module(name, a, b, scaling, "conv" if a.ndim == 4 else "linear", m)


def save(
    file: str | os.PathLike[str], modules: Sequence[Module], *, sdxl: bool | None = None
) -> None:
    """Write a LoRA or DoRA in kohya's format.

    Args:
        file: the file to write, .safetensors.
        modules: the updates, by diffusers' names with the component first, as from `load`.
        sdxl: whether the names are SDXL's, sgm's. By default it follows from the modules: a second
            text encoder or cross-attention to 2048 features.

    Raises:
        ValueError: a module is neither in the U-Net nor in a text encoder, or not in the model; an
            embedding.

    Example:
        >>> import tempfile
        >>> a, b = np.ones((2, 320), np.float16), np.ones((320, 2), np.float16)
        >>> block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", [Module(f"{block}.attn1.to_q", a, b, 0.5)])
        ...     (module,) = load(f"{folder}/a.safetensors")
        >>> module.name, module.scaling
        ('unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q', 0.5)

    Reference: sd-scripts's `networks/lora.py` and `library/sdxl_model_util.py`.
    """
    call = f"jlora.kohya.save({os.fspath(file)!r}, modules)"
    sdxl = _is_sdxl(modules) if sdxl is None else sdxl
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        name = _written(module, sdxl, call)
        tensors[f"{name}.lora_down.weight"] = module.a
        tensors[f"{name}.lora_up.weight"] = module.b
        tensors[f"{name}.alpha"] = np.asarray(module.alpha).astype(module.a.dtype)
        if module.magnitude is not None:
            sides = (len(module.b), *[1] * (module.a.ndim - 1))
            tensors[f"{name}.dora_scale"] = module.magnitude.reshape(sides)
    with replacing_files(Path(file).parent) as new:
        _tensor_file.write(new / Path(file).name, tensors, _metadata(modules, sdxl))


def _is_sdxl(modules: Sequence[Module]) -> bool:
    own = modules_of(SDXL) - modules_of(SD15)
    for module in modules:
        component, _, inside = module.name.partition(".")
        wide = inside.endswith(("attn2.to_k", "attn2.to_v")) and module.a.shape[1] == 2048
        if component == "text_encoder_2" or wide or inside in own:
            return True
    return False


def _written(module: Module, sdxl: bool, call: str) -> str:
    """Return a module's name in the file."""
    component, _, inside = module.name.partition(".")
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if sdxl else "lora_te"}
    prefixes |= {"text_encoder_2": "lora_te2"} if sdxl else {}
    if component not in prefixes or module.kind == "embedding":
        raise ValueError(
            f'`{call}`: "{module.name}" is {module.kind} of {quoted(component)}; the file has '
            f"linear layers and convolutions of {', '.join(prefixes)}, the component first."
        )
    of_unet = modules_of(SDXL if sdxl else SD15)
    known = of_unet if component == "unet" else stable_diffusion()
    name = inside if component == "unet" else flat(prefixes[component], inside)
    if name not in known:
        raise ValueError(
            f'`{call}`: "{module.name}" is no module of {"SDXL" if sdxl else "SD 1.5"}. '
            f"{near_misses(name, known)}"
        )
    if component == "unet":
        return flat("lora_unet", sgm_name(inside) if sdxl else inside)
    return name


def _metadata(modules: Sequence[Module], sdxl: bool) -> dict[str, str]:
    ranks, alphas = {m.rank for m in modules}, {m.alpha for m in modules}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(max(alphas)) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "sd_v1",
    }
