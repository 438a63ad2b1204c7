"""Rules from outside: a primitive or a kernel of one's own in the transform."""

from collections.abc import Callable
from typing import Literal

from jlora.transform import _registry
from jlora.transform._registry import Rule, RuleFn


def rule(
    primitive: str,
    *,
    kind: Literal["rearrange", "product", "join"],
    kernel: str | None = None,
    replace: bool = False,
) -> Callable[[RuleFn], RuleFn]:
    """Register how a primitive of one's own takes an adapted weight, for all transforms.

    The decorated function is called as `fn(walk, eqn, *operands)` where an operand is an adapted
    weight: a `View`, with `base`, `shape`, `roles` and `factors` (A and s·B, each with its axes in
    the order of the base's and the rank last). The other operands are arrays. In `jlora.layouts`
    weights are `Probe`s, which have no factors; `Weight` is either. `eqn` is the equation, a
    `jax.extend.core.JaxprEqn`. The function returns the equation's outputs in a list, arrays or
    weights, made by

    - `jlora.transform.product(walk, eqn, operands, dimension_numbers)`, for what multiplies;
    - `walk.bind(eqn, *operands)`, the primitive itself on the base weights, as often as is needed;
    - `weight.moved(base, roles, move)`, for what rearranges: the weight over a new base, its axes'
      roles in their new order, `move(f, axes)` done to each factor, which has these of the base's
      axes and then the rank.

    It returns `NotImplemented`, before it binds anything, where the factored form does not exist;
    then the weight is built, as `jlora.lora(fallback=)` says. `jlora.capture` does not look into
    the products of such a rule: a weight that meets its inputs in these alone is refused there.

    Args:
        primitive: the primitive's name, as a jaxpr prints it.
        kind: "product" if the output is an activation; "rearrange" if it is the weight again, its
            entries moved, repeated or left out; "join" if it is a weight that is combined with
            something else or filled up. DoRA's gain is part of what a "product" and a "rearrange"
            get, and both calls above see to it; for a "join" a weight with a gain is built first.
        kernel: of a primitive that many functions share, the function's name: `pallas_call(...,
            name="...")`.
        replace: whether to take the place of a rule that is registered already.

    Returns:
        A decorator, which returns the function as it is.

    Raises:
        ValueError: the primitive, or this kernel of it, has a rule, and `replace` is False.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jax.experimental import pallas as pl
        >>> def kernel(x, w, out):
        ...     out[...] = x[...] @ w[...]
        >>> def matmul(x, w):
        ...     out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
        ...     return pl.pallas_call(kernel, out, interpret=True, name="example")(x, w)
        >>> @jlora.transform.rule("pallas_call", kind="product", kernel="example")
        ... def example(walk, eqn, x, w):
        ...     return jlora.transform.product(walk, eqn, (x, w), (((1,), (0,)), ((), ())))
        >>> params = jlora.attach({"w": jnp.ones((4, 6))}, {"w": jlora.LoraSpec(2)},
        ...                       key=jax.random.key(0))
        >>> run = jlora.lora(lambda p, x: matmul(x, p["w"]), fallback="error")
        >>> run(params, jnp.ones((3, 4))).shape
        (3, 6)
    """

    def enter(fn: RuleFn) -> RuleFn:
        _registry.register(Rule(fn, kind), primitive, kernel, replace)
        return fn

    return enter
