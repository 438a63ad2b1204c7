"""LoRA-GA: A and B whose first step moves the weight like a step of full fine-tuning."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jlora._arrays import Geometry
from jlora._check_values import check_number
from jlora._paths import brief, describe
from jlora.forms import Split
from jlora.forms._singular import singular
from jlora.initializers._data import lora_nodes, replaced, split, values_of
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
    """Set A and B to singular vectors of the weight's gradient.

    `G = U S Vᵀ` with G `(in, out)`; `A = c U₁..ᵣ`, `B = c Vᵣ₊₁..₂ᵣᵀ`, `c = out^¼ / √γ`; the base
    becomes `W - s A B`, so the model starts unchanged.

    Each slice of the outputs is decomposed separately. With DoRA the magnitude does not change,
    because the residual plus `s A B` is still W.

    Args:
        params: what `jlora.attach` returned. Its A and B are not read, and it is not modified.
        gradients: the gradient of the loss with respect to the base weights,
            `jax.grad(loss)(base)`, averaged over several batches if desired.
        direction: "ArB2r" as above; "A2rBr", A has the second r directions and B the first;
            "ArBr", B has the first of each pair of directions, and A the second.
        scale: "stable" as above; "unit", c = 1; "peft", only B is scaled, by `c S` with its own
            singular values, so that it depends on the scale of the loss.
        gamma: γ.

    Returns:
        `params` with new A and B, and the residual in W's dtype as base.

    Raises:
        ValueError: the direction or scale is unknown; there is no `LoraArray`, or one over a
            residual; the gradients do not match in structure or shape; 2 · rank is above
            min(in, out); `gamma` is not above 0.
        TypeError: `gamma` is not a number.

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
    options = (("direction", direction, _DIRECTIONS), ("scale", scale, _SCALES))
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(
                f"`jlora.initializers.lora_ga({name}={brief(value)})`: give one of {allowed}."
            )
    check_number(gamma, call, "gamma", "a number above 0, e.g. 16.0", lambda x: x > 0)
    nodes = lora_nodes(params, call)
    new = {}
    for path, gradient in values_of(nodes, gradients, call, "gradients").items():
        node = nodes[path]
        geometry = Geometry.of(node.shape, node.layout)
        if jnp.shape(gradient) != node.shape:
            raise ValueError(
                f"`{call}`: the gradient of {describe(path, node)} has the shape "
                f"{jnp.shape(gradient)}. Pass `jax.grad(loss)(base)` of the base weights."
            )
        width = min(b - a for a, b in node.slices or ((0, geometry.out_dims[0]),))
        outs = geometry.fan_out // geometry.out_dims[0] * width
        if 2 * node.rank > min(geometry.fan_in, outs):
            raise ValueError(
                f"`{call}`: A and B of {describe(path, node)} need 2 · {node.rank} directions of "
                f"the gradient, which has min(in, out) = min({geometry.fan_in}, {outs}). Use a "
                "lower rank."
            )
        init = functools.partial(
            _along_gradient, rank=node.rank, direction=direction, scale=scale, gamma=gamma
        )
        new[path] = split(node, jnp.asarray(gradient), init, by_output=True)
    return replaced(params, new)


def _along_gradient(
    weight: Float[Array, "in out"],
    gradient: Float[Array, "in out"],
    scaling: Array,
    rank: int,
    direction: str,
    scale: str,
    gamma: float,
) -> Split:
    u, s, vt = singular(gradient, slice(2 * rank))
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
