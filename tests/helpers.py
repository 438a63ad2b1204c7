"""What several test files share: adapters, comparisons, and the equations of a program."""

import functools
import re
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from stored import base_of

import jlora
from jlora import LoraSpec

if TYPE_CHECKING:
    from cases import Case


def adapted(case: "Case", init=None, random: bool = True):
    """Attach rank 2 by the case's rules and, unless told otherwise, give B random values too."""
    # Every law asks for the same adapter; the containers are new each time, the arrays are not.
    return jax.tree.map(lambda x: x, _adapted(case, init, random))


@functools.cache
def _adapted(case: "Case", init, random: bool):
    base = base_of(case)
    layouts = case.layouts(base)
    spec = jlora.LoraSpec(rank=2, alpha=3, init=init, dora=case.dora, form=case.form)
    params = jlora.attach(base, {case.rules: spec}, key=jax.random.key(7), layouts=layouts)
    if not random:
        return params
    trainable, frozen = jlora.partition(params)
    # NumPy's numbers: `jax.random` would compile a program for each shape.
    rng = np.random.default_rng(8)
    trainable = jax.tree.map(
        lambda x: jnp.asarray((rng.normal(size=x.shape) * 0.3).astype(x.dtype)), trainable
    )
    return jlora.combine(trainable, frozen)


def transform(case: "Case"):
    """The adapted model, which may materialize only where the case says so."""
    return jlora.lora(case.fn, fallback="materialize" if case.materialized else "error")


def close(got, want, scale: float = 1.0):
    """Compare within rounding: 1e-5 of the largest value in float32, four steps in bfloat16."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape
        tol = 4 * 2.0**-8 if x.dtype == jnp.bfloat16 else 1e-5
        g, x = np.asarray(g, np.float64), np.asarray(x, np.float64)
        assert np.max(np.abs(g - x), initial=0) <= scale * tol * max(1.0, np.abs(x).max(initial=0))


def coarse(case: "Case") -> float:
    """A program that computes in bfloat16 compares in its rounding, whatever its parameters are."""
    rounds = case.name in ("cast", "linen_bf16_compute") or case.name.endswith("bfloat16")
    return 2000.0 if rounds else 1.0


def loss_of(case: "Case", fn):
    """Weigh every output by fixed random numbers, so that no gradient cancels."""

    def loss(params, *args):
        outs = [x for x in jax.tree.leaves(fn(params, *args)) if hasattr(x, "dtype")]
        total = jnp.zeros(())
        for k, x in enumerate(outs):
            # NumPy's numbers are a constant of the program, and not its costliest part to compile.
            weight = np.random.default_rng(k).normal(size=x.shape).astype(np.float32)
            total += (x.astype(jnp.float32) * weight).sum()
        return total

    return loss


def jlora_node(x):
    """Whether this is an adapted weight."""
    return isinstance(x, jlora.LoraArray)


def equations(jaxpr):
    """Every equation, those of inner jaxprs too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


class Decoder(nn.Module):
    """Attention and an MLP, unrolled: how a program grows with its layers."""

    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            h = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
            x = x + h
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return x


def rank_one(params, layouts=None, rules=r".*w", **spec):
    """Attach the smallest adapter, where only the inputs of the weights matter."""
    return jlora.attach(
        params, {rules: LoraSpec(1, **spec)}, key=jax.random.key(0), layouts=layouts
    )


def moments_are(moments, inputs):
    """Compare moments with the sums over inputs `(*stack, number, in)`."""
    x = np.asarray(inputs, np.float64)
    same(moments.second, np.swapaxes(x, -1, -2) @ x)
    same(moments.total, x.sum(-2))
    same(moments.count, np.full(x.shape[:-2], x.shape[-2]))


def same(got, want, most=1e-6):
    """Compare in float64, relative to the largest value where that is above 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=most * max(1.0, np.abs(want).max()), rtol=0)


def bits(x):
    """What is equal of two arrays only if every bit is."""
    x = np.asarray(x)
    return x.dtype.name, x.shape, x.tobytes()


def says(*parts: str) -> str:
    """A pattern of these texts in this order, whatever is between them."""
    return "(?s)" + ".*".join(re.escape(p) for p in parts)
