"""Read models from GGUF files: their quantized blocks as stored weights, byte for byte."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jlora._paths import brief, quoted
from jlora.gguf._entries import check_header
from jlora.quant import QuantArray
from jlora.quant._formats import GGML
from jlora.quant.ggml import Ggml, fields_of, records

_FORMATS = {x.name.upper(): x for x in GGML}
_ARRAYS = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "|i1", "I16": "<i2", "I32": "<i4"}
# llama.cpp's converter reorders the rows of q and k of these architectures.
_PERMUTED = ("llama",)
_ARCHITECTURE = "general.architecture"


def read(path: str | os.PathLike[str]) -> dict[str, Array | QuantArray]:
    """Read the tensors of a GGUF file without dequantizing them.

    Of the architecture "llama", the rows of `attn_q` and `attn_k` are put back in the order of the
    model before conversion, the two halves of a head that RoPE rotates; blocks are along rows, so
    they move as they are. All other tensors are as in the file. Memory is that of the file.

    Args:
        path: a file.

    Returns:
        A mapping from the name of each tensor, "blk.0.attn_q.weight", to an array, if the file has
        plain numbers, or to a `jlora.quant.QuantArray` of its format: (out, in), with the layout
        "oi"; experts are stacks of such. `QuantArray.as_layout` gives the weight of a model that
        stores (in, out).

    Raises:
        ValueError: the file is no GGUF file, truncated or damaged, or has a type of tensor that
            jlora does not read.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = gguf.GGUFWriter(folder + "/a.gguf", "llama")
        ...     rows = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
        ...     data = gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
        ...     writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        ...     writer.write_header_to_file(), writer.write_kv_data_to_file()
        ...     writer.write_tensors_to_file()
        ...     writer.close()
        ...     found = read(folder + "/a.gguf")
        (None, None)
        >>> found["w"].format, found["w"].shape
        (Q8_0, (2, 64))
    """
    call = f"jlora.gguf.read({str(path)!r})"
    metadata = _checked(path, call)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # a damaged header may fail anywhere in the library
        raise ValueError(
            f"`{call}`: this is not a complete GGUF file "
            f"({type(error).__name__}: {brief(str(error))}); it may be truncated. Copy it again."
        ) from error
    return {x.name: _tensor(x, _heads(x, metadata, call), call) for x in reader.tensors}


def check(path: str | os.PathLike[str]) -> None:
    """Refuse a GGUF file that is truncated or damaged, by its header alone.

    Lengths are compared with the size of the file, tensors have to follow one another up to its
    end, and the metadata has to be that of one architecture. gguf-py's reader believes what a
    header says, so check a file of unknown origin first. `read` does.

    Args:
        path: a file.

    Returns:
        None: the header fits the file.

    Raises:
        ValueError: the header does not fit the file.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b"GGUF\\3\\0\\0\\0"), file.flush()
        ...     check(file.name)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `jlora.gguf.check(...)`: ... is not a complete GGUF file: it ends early. ...
    """
    _checked(path, f"jlora.gguf.check({str(path)!r})")


def _checked(path: str | os.PathLike[str], call: str) -> dict[str, Any]:
    """Return the metadata of a file whose header fits it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{call}`: there is no such file.")
    metadata = check_header(Path(path), call)
    kind, count = metadata.get(_ARCHITECTURE), ".attention.head_count"
    owners = {key.partition(count)[0] for key in metadata if count in key}
    if not isinstance(kind, str) or owners - {kind}:
        raise ValueError(
            f"`{call}`: its metadata has {_ARCHITECTURE}={brief(kind)}, but the number of heads of "
            f"{brief(sorted(owners))}. The file is damaged; copy it again."
        )
    return metadata


def _tensor(tensor: Any, heads: int | None, call: str) -> Array | QuantArray:
    """Return one tensor, with its rows in the order of the model."""
    shape = tuple(map(int, tensor.shape[::-1]))  # GGUF lists them from the innermost
    kind, data = tensor.tensor_type.name, np.asarray(tensor.data)
    where = f"{quoted(tensor.name)} {kind}[{','.join(map(str, shape))}]"
    order = _order(shape, heads, where, call)
    if kind in _ARRAYS or kind == "BF16":
        dtype = jnp.bfloat16 if kind == "BF16" else _ARRAYS[kind]
        values = data.reshape(-1).view(np.uint8).view(dtype).reshape(shape)
        return jnp.asarray(values if order is None else values[..., order, :])
    if kind not in _FORMATS or len(shape) < 2:
        raise ValueError(
            f"`{call}`: {where} is of a type that jlora does not read. It reads "
            f"{', '.join([*_FORMATS, *_ARRAYS, 'BF16'])}. Convert the file with llama.cpp's "
            "`llama-quantize --allow-requantize`, or build the weight with `gguf.dequantize`."
        )
    format = _FORMATS[kind]
    rows = data.reshape(*shape[:-1], shape[-1] // format.block * format.record)
    parts = fields_of(format, rows if order is None else rows[..., order, :])
    for name, type_, _ in format.fields:
        if type_ == "<f2" and not np.isfinite(np.asarray(parts[name])).all():
            raise ValueError(
                f"`{call}`: the scales {name!r} of {where} are not finite, so the file is damaged. "
                "Copy it again."
            )
    return QuantArray(parts, format, "oi", shape[-2:], "float32")


def _heads(tensor: Any, metadata: Mapping[str, Any], call: str) -> int | None:
    """Return the number of heads whose rows the converter reordered; None for other tensors."""
    name, entry = tensor.name, lambda key: metadata.get(f"{architecture}.{key}")
    architecture = metadata.get(_ARCHITECTURE)
    part = name.split(".")[-2] if name.endswith(".weight") else ""
    if architecture not in _PERMUTED or part not in ("attn_q", "attn_k"):
        return None
    heads = count = entry("attention.head_count")
    if part == "attn_k":
        count = metadata.get(f"{architecture}.attention.head_count_kv", count)
    if not isinstance(count, int) or count < 1 or not isinstance(heads, int) or heads < 1:
        raise ValueError(
            f"`{call}`: the order of the rows of {quoted(name)} depends on the number of heads, "
            f"but the metadata has {brief(count)} for it. The file is damaged; copy it again."
        )
    rows, width = int([*tensor.shape, 1][1]), entry("embedding_length")
    said = [entry("attention.key_length"), entry("rope.dimension_count")]
    said += [width // heads] if said[0] is None and isinstance(width, int) else []
    if any(x is not None and x != rows / count for x in said):
        raise ValueError(
            f"`{call}`: {quoted(name)} has {rows} rows for {count} heads, but the metadata has "
            f"heads of {brief([x for x in said if x is not None])} rows. The file is damaged; copy "
            "it again."
        )
    return count


def _order(shape: tuple[int, ...], heads: int | None, where: str, call: str) -> Any:
    """Return the rows in the order of the model; None to leave them."""
    if heads is None:
        return None
    if len(shape) < 2 or shape[-2] % (2 * heads):
        raise ValueError(
            f"`{call}`: the rows of {where} do not divide into {heads} heads of even width. The "
            "file is damaged; copy it again."
        )
    return np.arange(shape[-2]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def blocks(weight: QuantArray, heads: int | None = None) -> np.ndarray:
    """Return the bytes of a stored weight as in a GGUF file, the inverse of `read`.

    Args:
        weight: in one of the formats of GGUF, of any layout.
        heads: for `attn_q` and `attn_k` of the architecture "llama", the number of heads: rows are
            put in llama.cpp's order, the two numbers that RoPE rotates next to each other.

    Returns:
        `(*stack, out, bytes)` of uint8, for `gguf.GGUFWriter.add_tensor(name, blocks,
        raw_dtype=gguf.GGMLQuantizationType.Q4_1)`.

    Raises:
        ValueError: the weight is stored in another format; the rows do not divide into heads.

    Example:
        >>> import jlora
        >>> w = jlora.quantize({"w": jnp.ones((64, 3))}, {"w": "q4_1"})["w"]
        >>> blocks(w).shape, blocks(w)[0, :4].view(np.float16).tolist()
        ((3, 40), [0.0, 1.0])
    """
    call = "jlora.gguf.blocks(weight)"
    if not isinstance(weight.format, Ggml):
        raise ValueError(
            f"`{call}`: the weight is stored as {weight.format}, which is no format of GGUF. Store "
            f'it in one first: `jlora.quantize({{"w": weight.dequantize()}}, {{"w": "q8_0"}})`.'
        )
    rows = records(weight.format, weight.parts)
    order = _order((*rows.shape[:-1], 0), heads, f"the weight {brief(weight)}", call)
    return rows if order is None else rows[..., np.argsort(order), :]
