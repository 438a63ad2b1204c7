"""`jlora.capture` where a weight is rearranged first, and inside other transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import w
from helpers import moments_are, rank_one, same
from jax import lax

from jlora import capture

X, Y = w(4, 5, 11), w(4, 5, 3)
MOVED = {
    "joined outputs": (
        lambda p, x, y: x @ jnp.concatenate([p["w"], p["v"]["w"]], 1),
        {"w": w(11, 7), "v": {"w": w(11, 5)}},
        lambda x, y: (x, x),
    ),
    "joined inputs": (
        lambda p, x, y: jnp.concatenate([x, y], -1) @ jnp.concatenate([p["w"], p["v"]["w"]]),
        {"w": w(11, 7), "v": {"w": w(3, 7)}},
        lambda x, y: (x, y),
    ),
    "a cut of the inputs": (
        lambda p, x, y: y @ p["w"][2:5] + x @ p["v"]["w"],
        {"w": w(11, 7), "v": {"w": w(11, 7)}},
        lambda x, y: (np.pad(y, ((0, 0), (2, 6))), x),
    ),
    "turned around": (
        lambda p, x, y: x @ p["w"][::-1] + x @ p["v"]["w"].T.reshape(7, 11).T,
        {"w": w(11, 7), "v": {"w": w(11, 7)}},
        lambda x, y: (x[:, ::-1], x),
    ),
    "scaled": (
        lambda p, x, y: x @ (p["w"] * -2.0) + x @ (p["v"]["w"] * jnp.arange(1.0, 12.0)[:, None]),
        {"w": w(11, 7), "v": {"w": w(11, 7)}},
        lambda x, y: (x, x * np.arange(1.0, 12.0)),
    ),
    "cast and stopped": (
        lambda p, x, y: (
            x @ lax.stop_gradient(p["w"]),
            lax.stop_gradient(x.astype(jnp.bfloat16) @ p["v"]["w"].astype(jnp.bfloat16)),
        ),
        {"w": w(11, 7), "v": {"w": w(11, 7)}},
        lambda x, y: (x, np.float64(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16))),
    ),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", MOVED)
def test_what_is_done_to_a_weight_first(name):
    fn, params, seen = MOVED[name]
    moments = capture(fn, rank_one(params), X, Y)
    flat = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (X, Y)]
    for got, want in zip((moments["w"], moments["v"]["w"]), seen(*flat), strict=True):
        same(got.second, want.T @ want)
        same(got.total, want.sum(0))
        assert got.count == len(want)


@jax.custom_vjp
def odd(x, k):
    return x @ k


odd.defvjp(
    lambda x, k: (x @ k, None), lambda saved, ct: (ct @ jnp.zeros((7, 11)), jnp.ones((11, 7)))
)


@jax.custom_jvp
def silent(x, k):
    return x @ k


silent.defjvp(lambda primals, tangents: (silent(*primals), jnp.zeros((4, 5, 7))))
WRAPPED = {
    "jit": lambda p, x: jax.jit(lambda k: x @ k)(p["w"]),
    "checkpoint": lambda p, x: jax.checkpoint(lambda x, k: x @ k)(x, p["w"]),
    "custom_vjp": lambda p, x: odd(x, p["w"]),
    "custom_jvp": lambda p, x: silent(x, p["w"]),
    "not differentiable": lambda p, x: jnp.argmax(x @ p["w"], -1),
    "rounded": lambda p, x: jnp.round(x @ p["w"]),
    "under grad": lambda p, x: jax.grad(lambda x: jnp.sin(x @ p["w"]).sum())(x),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("compiled", [False, True])
def test_inside_other_transforms(name, compiled):
    params = rank_one({"w": w(11, 7)})
    run = functools.partial(capture, WRAPPED[name])
    moments_are((jax.jit(run) if compiled else run)(params, X)["w"], np.asarray(X).reshape(-1, 11))
