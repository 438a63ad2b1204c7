"""LoRA-GA: A and B begin so that their first step moves the weight as its own gradient would."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora._arrays import Geometry, accumulator
from jlora._paths import describe
from jlora.forms import Split
from jlora.initializers._data import adapted, given, replaced, split
from jlora.initializers._decomposed import residual_of

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr")
_SCALES = ("stable", "unit", "peft")


def lora_ga(
    params: PyTree,
    gradients: PyTree,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
) -> PyTree:
    """Set A and B to singular vectors of the weight's gradient; what they add W is freed of.

    `G = U S Vᵀ` with G `(in, out)`; `A = c U₁..ᵣ`, `B = c Vᵣ₊₁..₂ᵣᵀ`, `c = out^¼ / √γ`; the
    residual is `W - s A B`.

    A slice of the outputs is a weight of its own. Under DoRA the magnitude stays: the residual and
    `s A B` are W together.

    Args:
        params: what `jlora.attach` returned; its A and B are not read, it is not changed.
        gradients: of the loss in the plain weights, a tree like these: `jax.grad(loss)(base)`,
            the mean over batches where there are several.
        direction: "ArB2r" as above; "A2rBr", where A has the second r and B the first; "ArBr",
            where B has the first of each pair, and A the second.
        scale: "stable" as above; "unit", c = 1; "peft", where B alone is multiplied, by
            `c S` of its own singular values: so it hangs on the size of the loss.
        gamma: γ.

    Returns:
        `params` with other A and B, over the residual in W's dtype.

    Raises:
        ValueError: another direction or scale; no `LoraArray`; one over a residual; gradients of
            another structure or shape; 2 · rank above min(in, out).

    Example:
        >>> import jax, jlora
        >>> base = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> params = jlora.attach(base, {"w": jlora.LoraSpec(1)}, key=jax.random.key(1))
        >>> gradients = jax.grad(lambda p: jnp.sin(jnp.ones((2, 4)) @ p["w"]).sum())(base)
        >>> params = lora_ga(params, gradients)
        >>> bool(jnp.allclose(jlora.merge(params)["w"], base["w"], atol=1e-5))
        True

    Reference: Wang et al. 2024, arXiv:2407.05000, algorithm 1. PEFT's
    `init_lora_weights="lora_ga"`, `LoraGAConfig(direction, scale, stable_gamma)`.
    """
    call = "jlora.initializers.lora_ga(params, gradients)"
    for name, value, known in (("direction", direction, _DIRECTIONS), ("scale", scale, _SCALES)):
        if value not in known:
            raise ValueError(
                f"`jlora.initializers.lora_ga({name}={value!r})`: give one of {known}."
            )
    nodes = adapted(params, call)
    new = {}
    for path, gradient in given(nodes, gradients, call, "gradients").items():
        node = nodes[path]
        geometry = Geometry.of(node.shape, node.layout)
        if jnp.shape(gradient) != node.shape:
            raise ValueError(
                f"`{call}`: the gradient of {describe(path, node)} has the shape "
                f"{jnp.shape(gradient)}. Give `jax.grad(loss)(base)` of the plain weights."
            )
        width = min(b - a for a, b in node.slices or ((0, geometry.out_dims[0]),))
        outs = geometry.fan_out // geometry.out_dims[0] * width
        if 2 * node.rank > min(geometry.fan_in, outs):
            raise ValueError(
                f"`{call}`: A and B of {describe(path, node)} need 2 · {node.rank} directions of "
                f"the gradient, which has min(in, out) = min({geometry.fan_in}, {outs}). Take a "
                "lower rank there."
            )
        init = functools.partial(
            _along, rank=node.rank, direction=direction, scale=scale, gamma=gamma
        )
        new[path] = split(node, geometry.to_matrix(gradient), init, by_output=True)
    return replaced(params, new)


def _along(
    weight: Float[Array, "in out"],
    gradient: Float[Array, "in out"],
    scaling: Array,
    rank: int,
    direction: str,
    scale: str,
    gamma: float,
) -> Split:
    wide = accumulator(weight.dtype)
    u, s, vt = jnp.linalg.svd(gradient.astype(wide), full_matrices=False)
    first, second = slice(rank), slice(rank, 2 * rank)
    of_a, of_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
    }[direction]
    c = 1.0 if scale == "unit" else weight.shape[1] ** 0.25 / gamma**0.5
    a, b = u[:, of_a], c * vt[of_b]
    a, b = (a, s[of_b, None] * b) if scale == "peft" else (c * a, b)
    return a, b, residual_of(weight, a, b, scaling)
