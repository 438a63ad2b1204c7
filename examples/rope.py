"""Rotary positions, and the ways in which models extend them to longer contexts.

A rope turns each pair of a head's numbers by position * frequency. A `Scaling` changes the
frequencies of the pairs, and may multiply cosine and sine by an `amplitude`.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp


class Scaling(Protocol):
    """What changes the frequencies: one of the classes below."""

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        ...

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        """Return the frequencies, (D/2,), or (B, T, D/2) where they depend on the length."""
        ...


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation: frequencies are divided by a factor (Chen et al. 2023)."""

    factor: float
    amplitude = 1.0

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        return freq / self.factor


@dataclasses.dataclass(frozen=True)
class Divided:
    """Each frequency has a divisor of its own, as in a GGUF file's `rope_freqs.weight`."""

    by: tuple[float, ...]
    amplitude = 1.0

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        return freq / jnp.asarray(self.by, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Low frequencies are divided by a factor, high ones kept, those between interpolated."""

    factor: float
    low: float
    high: float
    context: float
    amplitude = 1.0

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        turns = self.context / (2 * math.pi) * freq  # rotations of a pair within the old context
        keep = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return freq * (keep + (1.0 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """As `Llama3`, but interpolated by the number of the pair (Peng et al. 2023)."""

    factor: float
    context: float
    amplitude: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        half = freq.shape[0]

        def pair(turns: float) -> float:
            """The pair that makes so many turns within the old context."""
            return half * math.log(self.context / (2 * math.pi * turns)) / math.log(theta)

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high = high + 0.001 if low == high else high
        pairs = jnp.arange(half, dtype=jnp.float32)
        keep = 1.0 - jnp.clip((pairs - low) / (high - low), 0.0, 1.0)
        return freq * (keep + (1.0 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Theta grows with the length of a text that exceeds the context (NTK-aware scaling)."""

    factor: float
    context: int
    amplitude = 1.0

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        assert length is not None
        half = freq.shape[0]
        beyond = jnp.maximum(length.astype(jnp.float32) / self.context, 1.0)  # (B, T, 1)
        grown = self.factor * beyond - (self.factor - 1.0)
        power = jnp.arange(half, dtype=jnp.float32)[None, None] / max(half - 1, 1)
        return freq[None, None] * grown**-power


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Divisors found by search, for texts within the old context and beyond (Ding et al. 2024)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    amplitude: float

    def __call__(self, freq: jax.Array, theta: float, length: jax.Array | None) -> jax.Array:
        assert length is not None
        short, long = (jnp.asarray(x, jnp.float32)[None, None] for x in (self.short, self.long))
        return freq[None, None] / jnp.where(length > self.context, long, short)


BY_LENGTH = (Dynamic, LongRope)  # those whose frequencies depend on the length of the text


def frequencies(
    theta: float, pairs: int, scaling: Scaling | None = None, length: jax.Array | None = None
) -> jax.Array:
    """theta^(-i/pairs) of each pair i, scaled: (D/2,), or (B, T, D/2) by length, (B, T, 1)."""
    freq = jnp.exp(jnp.arange(pairs, dtype=jnp.float32) * (-math.log(theta) / pairs))  # (D/2,)
    return freq if scaling is None else scaling(freq, theta, length)


def rotate(
    x: jax.Array, positions: jax.Array, freq: jax.Array, amplitude: float | jax.Array = 1.0
) -> jax.Array:
    """Rotate each pair (i, i + D/2) of a head by position * freq[i], as Hugging Face does.

    x is (B, T, H, D). With fewer than D/2 frequencies, the last numbers of a head are kept.
    """
    half = freq.shape[-1]
    each = positions.astype(jnp.float32)[:, :, None]  # (B, T, 1)
    angle = each * (freq[None, None, :] if freq.ndim == 1 else freq)  # (B, T, D/2)
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]  # (B, T, 1, D/2)
    if not (isinstance(amplitude, float) and amplitude == 1.0):
        cos, sin = cos * amplitude, sin * amplitude
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)  # (B, T, H, D)
    turned = turned.astype(x.dtype)
    rest = x[..., 2 * half :]
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
