"""bitsandbytes's 4-bit weights, as checkpoints of Hugging Face hold them, byte for byte.

Neither bitsandbytes nor PyTorch is needed: the tensors are those of a safetensors file.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._paths import brief, near_misses, quoted
from jlora.quant import NF4, QuantArray
from jlora.quant.nf4 import LEVELS, NESTED, SCALES

__all__ = ["from_tensors", "to_tensors"]

_STATE = "quant_state.bitsandbytes__nf4"
_DTYPES = ("float32", "bfloat16", "float16")


def from_tensors(tensors: Mapping[str, Any], name: str) -> QuantArray:
    """Make a stored weight of the tensors of a 4-bit checkpoint; no byte changes.

    Args:
        tensors: tensors of a file by name, as `safetensors.numpy.load_file` returns them.
        name: the name of the weight, "model.layers.0.self_attn.q_proj.weight"; its scales are
            `name + ".absmax"`, ".quant_map", ".quant_state.bitsandbytes__nf4" and, if they are
            quantized too, ".nested_absmax" and ".nested_quant_map".

    Returns:
        A weight in `jlora.quant.NF4`, (out, in), with the layout "oi" and the dtype that the file
        says. `as_layout` gives the weight of a model that stores (in, out).

    Raises:
        KeyError: a tensor is missing.
        ValueError: it is of another kind (FP4), its blocks extend over several rows, or its tensors
            do not fit together.

    Example:
        >>> import jlora
        >>> w = jlora.quantize({"w": jnp.ones((4, 64))}, {"w": "nf4"}, layouts={"w": "oi"})["w"]
        >>> from_tensors(to_tensors(w, "m.weight"), "m.weight").shape
        (4, 64)
    """
    call = f"jlora.bitsandbytes.from_tensors(tensors, {name!r})"

    def tensor(ending: str) -> np.ndarray:
        key = f"{name}.{ending}" if ending else name
        if key not in tensors:
            raise KeyError(
                f"`{call}`: there is no tensor {quoted(key)}. {near_misses(key, tensors)}"
            )
        return np.asarray(tensors[key])

    state = _state(tensor(_STATE), call)
    out, inputs = state["shape"]
    block, double = state["blocksize"], "nested_offset" in state
    if inputs % block:
        raise ValueError(
            f"`{call}`: its blocks of {block} weights extend over rows of {inputs}. Dequantize it "
            "with bitsandbytes and store it again, `jlora.quantize`."
        )
    codes, scales = tensor("").reshape(-1).view(np.uint8), tensor("absmax").reshape(-1)
    parts: dict[str, Any] = {"absmax": scales, "codes": codes}
    want = {"codes": (out, inputs // 2), "absmax": (out, inputs // block)}
    maps = {"quant_map": LEVELS}
    if double:
        parts["nested_absmax"] = tensor("nested_absmax")
        parts["offset"] = np.float32(state["nested_offset"])
        want |= {"nested_absmax": (-(-scales.size // NESTED),), "offset": ()}
        maps["nested_quant_map"] = SCALES
    for key, values in maps.items():
        if not np.array_equal(tensor(key).astype(np.float32).reshape(-1), values):
            raise ValueError(
                f"`{call}`: its {key} is not that of NF4 with 8-bit dynamic scales, the one kind "
                "that `jlora.quant.NF4` stores. Dequantize it with bitsandbytes."
            )
    for key, x in parts.items():
        kind = np.uint8 if key == "codes" or (key == "absmax" and double) else np.float32
        if x.dtype != kind or x.size != np.prod(want[key], dtype=int) or not np.isfinite(x).all():
            raise ValueError(
                f"`{call}`: its {key} is {brief(x)}, where a weight of ({out}, {inputs}) has "
                f"finite {np.dtype(kind).name}{list(want[key])}. The file is damaged; copy it."
            )
    format = NF4(block, double)
    made = {key: jnp.asarray(x.reshape(want[key])) for key, x in parts.items()}
    return QuantArray(made, format, "oi", (out, inputs), state["dtype"])


def _state(data: np.ndarray, call: str) -> dict[str, Any]:
    """Read the entries that are no tensors; refuse those that `NF4` does not have."""
    try:
        state = json.loads(bytes(data.astype(np.uint8).reshape(-1)))
        shape = tuple(map(int, state["shape"]))
        found = {"shape": shape, "blocksize": int(state["blocksize"]), "dtype": state["dtype"]}
        if "nested_offset" in state:
            found["nested_offset"] = float(state["nested_offset"])
        good = (
            *(len(shape) == 2, min(shape) > 0, found["dtype"] in _DTYPES),
            *(found["blocksize"] > 0, state["quant_type"] == "nf4"),
            state.get("nested_blocksize", NESTED) == NESTED,
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"`{call}`: its quant_state is not what bitsandbytes writes ({brief(error)}). The file "
            "is damaged; copy it again."
        ) from None
    if not all(good):
        raise ValueError(
            f"`{call}`: its quant_state has quant_type {brief(state['quant_type'])}, shape "
            f"{brief(state['shape'])} and dtype {brief(state['dtype'])}. jlora reads 2-D weights "
            f"in nf4 of {', '.join(_DTYPES)}, with scales in blocks of {NESTED} if quantized."
        )
    return found


def to_tensors(weight: QuantArray, name: str) -> dict[str, np.ndarray]:
    """Return the tensors of a 4-bit checkpoint: the inverse of `from_tensors`.

    Args:
        weight: in the format `jlora.quant.NF4`, of any layout, without stack dimensions.
        name: the name of the weight.

    Returns:
        A mapping from names to tensors, for `safetensors.numpy.save_file`. The rows are (out, in).

    Raises:
        ValueError: the weight is in another format, or a stack.

    Example:
        >>> import jlora
        >>> w = jlora.quantize({"w": jnp.ones((64, 4))}, {"w": "nf4"})["w"]
        >>> sorted(to_tensors(w, "m"))[:4]
        ['m', 'm.absmax', 'm.nested_absmax', 'm.nested_quant_map']
    """
    call = f"jlora.bitsandbytes.to_tensors(weight, {name!r})"
    format = weight.format
    if not isinstance(format, NF4) or weight.stack:
        raise ValueError(
            f"`{call}`: the weight is {brief(weight)}, stored as {format}. A checkpoint has "
            'weights in "nf4", one a layer: `jax.tree.map(lambda x: x[0], weight)` of a stack.'
        )
    parts = {key: np.asarray(x) for key, x in weight.parts.items()}
    out, inputs = parts["codes"].shape[0], 2 * parts["codes"].shape[1]
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": format.block}
    state |= {"dtype": weight.kind, "shape": [out, inputs]}
    made = {
        name: parts["codes"].reshape(-1, 1),
        f"{name}.absmax": parts["absmax"].reshape(-1),
        f"{name}.quant_map": LEVELS,
    }
    if format.double:
        made[f"{name}.nested_absmax"] = parts["nested_absmax"]
        made[f"{name}.nested_quant_map"] = SCALES
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
        state["nested_offset"] = float(parts["offset"])
    made[f"{name}.{_STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return made


def __dir__() -> list[str]:
    return __all__
