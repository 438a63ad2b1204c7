"""Every form over every storage format, in every composition: as over the dequantized weight."""

import functools
from typing import Any

import form_loha
import form_miss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bits, same
from jax import lax
from quantized import NAMES, stored

import jlora
import jlora.checkpoint
from jlora import LoraSpec

assert form_miss and form_loha  # registered by being imported

KEY = jax.random.key(0)
FORMS = ("lora", "dora", "lora_fa", "lora_xs", "vera", "adalora", "mica", "miss", "loha")
X = jax.random.normal(KEY, (4, 256))


def layer(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w) @ v / 16  # random blocks are large, and would saturate the next layer


def net(p: Any, x: jax.Array) -> jax.Array:
    """A scan over two stacks, under remat."""
    one = jax.checkpoint(lambda x, both: (layer(x, *both), None))
    return lax.scan(one, x, (p["up"], p["down"]))[0]


@functools.cache
def base_of(format: str) -> Any:
    base = stored(format)["layers"]["kernel"]
    return {"up": base, "down": base}


def adapted(form: str, format: str) -> tuple[Any, Any]:
    """Two trained adapters over one stored base."""
    form, dora = ("lora", True) if form == "dora" else (form, False)
    spec = LoraSpec(2, alpha=3, form=form, dora=dora, layout="io")
    params = jlora.attach(base_of(format), {".*": spec}, key=KEY)
    trainable, frozen = jlora.partition(params)
    leaves, tree = jax.tree.flatten(trainable)
    rng = np.random.default_rng(5)
    moved = lambda: tree.unflatten(
        [x + (rng.normal(size=x.shape) / 16).astype(np.float32) for x in leaves]
    )
    return jlora.combine(moved(), frozen), jlora.combine(moved(), frozen)


def slopes(params: Any) -> Any:
    """The outputs and the gradients of what trains."""
    trainable, frozen = jlora.partition(params)

    def loss(t: Any) -> Any:
        y = jlora.lora(net, fallback="error")(jlora.combine(t, frozen), X)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    return jax.grad(loss, has_aux=True)(trainable)


def alike(got: Any, want: Any, bound: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(a, b, bound)


@pytest.mark.sample(50)
@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_compositions(form: str, format: str, tmp_path: Any) -> None:
    params, other = adapted(form, format)
    dense = jlora.dequantize(params)
    apply = jlora.lora(net, fallback="error")
    tie = lambda p: jlora.untie(jlora.tie(p, {".*": ("lora_a",)}))

    @jax.jit
    def run(params: Any, dense: Any, adapters: Any) -> Any:
        over = lambda adapter: apply(jlora.bind(base_of(format), adapter), X)
        pairs = {
            "gradients": (slopes(params), slopes(dense)),
            "merged": (apply(params, X), net(jlora.merge(params), X)),
            "tied": (apply(tie(params), X), net(jlora.merge(tie(dense)), X)),
            "moments": (jlora.capture(net, params, X), jlora.capture(net, dense, X)),
        }
        return pairs, jax.vmap(over)(adapters), net(jlora.merge(other), X)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(jlora.detach(p)[1] for p in (params, other)))
    pairs, several, second = run(params, dense, stacked)
    for got, want in pairs.values():
        alike(got, want)
    alike(several, jnp.stack([pairs["merged"][1], second]))

    jlora.checkpoint.save(tmp_path / "adapter", params)
    restored = jlora.checkpoint.restore(tmp_path / "adapter", base_of(format))
    assert [*map(bits, jax.tree.leaves(restored))] == [*map(bits, jax.tree.leaves(params))]

    # A step takes the memory of what it changes, and does not change the base.
    trainable, frozen = jlora.partition(params)
    before = [*map(bits, jax.tree.leaves(frozen))]
    gradients, _ = pairs["gradients"][1]
    want = jax.tree.map(lambda x, g: x - 0.01 * g, trainable, gradients)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(trainable: Any, frozen: Any) -> Any:
        gradients, _ = slopes(jlora.combine(trainable, frozen))
        return jax.tree.map(lambda x, g: x - 0.01 * g, trainable, gradients)

    given = jax.tree.leaves(trainable)
    alike(step(trainable, frozen), want)
    assert all(x.is_deleted() for x in given)
    assert [*map(bits, jax.tree.leaves(frozen))] == before
