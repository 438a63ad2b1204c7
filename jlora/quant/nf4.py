"""NF4: the 4-bit format of QLoRA, as bitsandbytes stores it."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jlora.quant import _nibbles

# Dettmers et al. 2023, appendix E: quantiles of the normal distribution, with an exact zero.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_PAIRS = _nibbles.pairs_of(LEVELS)
NESTED = 256  # scales that share a scale of their own


def _dynamic_map() -> np.ndarray:
    """Return the 256 levels of 8-bit scales: for each power of ten, twice as many linear steps.

    Dettmers 2016, arXiv:1511.04561, section 2.1.3, with a sign.
    """
    found = [np.array([0.0, 1.0], np.float32)]
    for exponent in range(7):
        at, last = np.arange(2**exponent + 1), 2**exponent
        # PyTorch's `linspace` in float32: it counts from the nearer end and rounds once.
        low, high = np.float32(0.1), np.float32(1)
        step = np.float64((high - low) / np.float32(last))
        near = np.float64(low) + step * at, high - step * (last - at)
        edges = np.where(at < (last + 1) // 2, *near).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive = np.float32(10.0 ** (exponent - 6)) * means
        found += [positive, -positive]
    return np.sort(np.concatenate(found))


SCALES = _dynamic_map()


@dataclasses.dataclass(frozen=True)
class NF4:
    """Store a weight as 4-bit NormalFloat, with a scale per block of inputs.

    `W ≈ levels[codes] · absmax`, where `absmax = max|W|` over each block. With `double`, the scales
    are stored in 8 bits themselves, `absmax ≈ map[codes] · nested_absmax + offset`, in blocks of
    256 over the rows of one layer, and `offset` is their mean: 4.127 bits a weight with blocks of
    64, instead of 4.5.

    Attributes:
        block: the number of consecutive inputs that share a scale, an even number.
        double: whether the scales are quantized too.

    Example:
        >>> import jax, jlora
        >>> w = jax.random.normal(jax.random.key(0), (128, 256))
        >>> stored = jlora.quantize({"w": w}, {"w": NF4()})["w"]
        >>> {name: x.shape for name, x in stored.parts.items()}
        {'absmax': (256, 2), 'codes': (256, 64), 'nested_absmax': (2,), 'offset': ()}
        >>> stored.nbytes / w.nbytes < 0.13
        True

    Reference: Dettmers et al. 2023, arXiv:2305.14314, section 3. bitsandbytes's
    `quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)`.
    """

    block: int = 64
    double: bool = True

    name = "nf4"
    settings = property(dataclasses.asdict)

    def __post_init__(self) -> None:
        _nibbles.check_block(self.block, f"{self!r}")

    def pack(self, rows: Float[Array, "*stack out inputs"]) -> dict[str, Array]:
        """Choose the nearest level of each weight, and of each scale."""
        blocks = rows.reshape(*rows.shape[:-1], -1, self.block)
        absmax = jnp.abs(blocks).max(-1)
        codes = _nearest(blocks, absmax, LEVELS).reshape(rows.shape)
        parts = {"absmax": absmax, "codes": _nibbles.pack(codes)}
        if self.double:
            flat = absmax.reshape(*absmax.shape[:-2], -1)
            offset = flat.mean(-1)
            grouped = _grouped(flat - offset[..., None])
            nested = jnp.abs(grouped).max(-1)
            scales = _nearest(grouped, nested, SCALES).reshape(*flat.shape[:-1], -1)
            parts["absmax"] = scales[..., : flat.shape[-1]].reshape(absmax.shape)
            parts |= {"nested_absmax": nested, "offset": offset}
        return parts

    def unpack(self, parts: Mapping[str, Array]) -> Float[Array, "*stack out inputs"]:
        """Multiply levels and scales."""
        codes = parts["codes"]
        blocks = _nibbles.look_up(codes.reshape(*codes.shape[:-1], -1, self.block // 2), _PAIRS)
        rows = blocks * self._scales(parts)[..., None]
        return rows.reshape(*codes.shape[:-1], -1)

    def _scales(self, parts: Mapping[str, Array]) -> Float[Array, "*stack out blocks"]:
        absmax = parts["absmax"]
        if not self.double:
            return absmax
        values = _nibbles.look_up_scales(absmax, SCALES)
        flat = values.reshape(*values.shape[:-2], -1)
        nested = jnp.repeat(parts["nested_absmax"], NESTED, axis=-1)[..., : flat.shape[-1]]
        return (flat * nested + parts["offset"][..., None]).reshape(absmax.shape)


def _nearest(
    blocks: Float[Array, "*rows block"], absmax: Float[Array, "*rows"], levels: np.ndarray
) -> UInt8[Array, "*rows block"]:
    """Return the index of the level nearest to each `value / absmax`; the lower one of a tie."""
    scaled = blocks * (1.0 / jnp.maximum(absmax, 1e-38))[..., None]
    bounds = (levels[:-1] + levels[1:]) / 2
    method = "compare_all" if len(levels) == 16 else "scan"
    return jnp.searchsorted(jnp.asarray(bounds), scaled, method=method).astype(jnp.uint8)


def _grouped(flat: Float[Array, "*stack scales"]) -> Float[Array, "*stack groups 256"]:
    """Divide the scales of one layer into groups of 256; zeros fill the last."""
    more = -flat.shape[-1] % NESTED
    padded = jnp.pad(flat, ((0, 0),) * (flat.ndim - 1) + ((0, more),))
    return padded.reshape(*flat.shape[:-1], -1, NESTED)
