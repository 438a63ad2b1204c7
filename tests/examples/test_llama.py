"""The decoder against itself, packed, padded and cached; against torch: tests/parity."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import rope


def apply_of(config: llama.Config) -> Any:
    return jax.jit(lambda params, *args: llama.Llama(config).apply({"params": params}, *args))


def tokens_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)


def test_llama3_frequencies_by_cases() -> None:
    """Hugging Face's rule, written as it is there: by wavelength, in three cases."""
    factor, low, high, context = 8.0, 1.0, 4.0, 64.0
    base = np.asarray(rope.frequencies(100.0, 8), np.float64)
    wave, expected = 2 * np.pi / base, []
    for f, w in zip(base, wave, strict=True):
        smooth = (context / w - low) / (high - low)
        middle = (1 - smooth) * f / factor + smooth * f
        expected.append(f / factor if w > context / low else f if w < context / high else middle)
    assert len({*np.digitize(wave, [context / high, context / low])}) == 3  # every case occurs
    scaled = rope.frequencies(100.0, 8, rope.Llama3(factor, low, high, context))
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_packed_rows_equal_separate_rows(tiny: Any) -> None:
    config, params = tiny
    apply, (a, b) = apply_of(config), (tokens_of((1, 7)), tokens_of((1, 5), seed=1))
    tokens = np.concatenate([a, b, np.zeros((1, 3), np.int32)], axis=1)
    positions = np.array([[*range(7), *range(5), 0, 0, 0]], np.int32)
    segments = np.array([[1] * 7 + [2] * 5 + [0] * 3], np.int32)
    packed = apply(params, tokens, positions, segments)
    np.testing.assert_allclose(packed[:, :7], apply(params, a), atol=1e-5)
    np.testing.assert_allclose(packed[:, 7:12], apply(params, b), atol=1e-5)


def test_logits_only_where_asked(tiny: Any) -> None:
    config, params = tiny
    tokens, at = tokens_of((2, 6)), np.array([0, 5, 7], np.int32)
    whole = apply_of(config)(params, tokens).reshape(12, -1)
    some = apply_of(config)(params, tokens, None, None, None, at)
    np.testing.assert_allclose(some, whole[at], atol=1e-6)


def test_a_cache_filled_in_pieces_equals_one_pass(tiny: Any) -> None:
    config, params = tiny
    apply, tokens = apply_of(config), tokens_of((2, 9))
    places = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    cache, pieces = llama.init_cache(config, 2, 12), []
    for start, end in [(0, 4), (4, 5), (5, 9)]:
        part = slice(start, end)
        one = np.ones((2, end - start), np.int32)
        logits, cache = apply(params, tokens[:, part], places[:, part], one, cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), apply(params, tokens), atol=1e-5)


def greedy(apply: Any, params: Any, prompt: list[int], steps: int) -> list[int]:
    """Generation without a cache: the whole text anew for each token, padded to one length."""
    ids, start = np.zeros(16, np.int32), len(prompt)
    ids[:start] = prompt
    for end in range(start, start + steps):
        ids[end] = apply(params, ids[None])[0, end - 1].argmax()
    return ids[start : start + steps].tolist()


@pytest.mark.parametrize("left", [True, False])
def test_generation_with_padding_equals_generation_without(tiny: Any, left: bool) -> None:
    config, params = tiny
    apply, prompts = apply_of(config), [tokens_of((n,), seed=n).tolist() for n in (3, 8, 5)]
    tokens, segments = np.full((3, 8), 9, np.int32), np.zeros((3, 8), np.int32)
    for row, prompt in enumerate(prompts):
        place = slice(8 - len(prompt), 8) if left else slice(0, len(prompt))
        tokens[row, place], segments[row, place] = prompt, 1
    answer = functools.partial(llama.generate, apply, config, steps=6, stop=263)
    out = np.asarray(jax.jit(answer)(params, tokens, segments)).tolist()
    assert out == [greedy(apply, params, prompt, 6) for prompt in prompts]


def test_generation_stops_a_row_at_the_end_mark(tiny: Any) -> None:
    config, params = tiny
    apply, prompt = apply_of(config), tokens_of((1, 4))
    free = greedy(apply, params, prompt[0].tolist(), 6)
    stop = free[2]
    out = llama.generate(
        apply, config, params, prompt, np.ones((1, 4), np.int32), steps=6, stop=stop
    )
    at = free.index(stop)
    assert np.asarray(out)[0].tolist() == free[:at] + [stop] * (6 - at)
