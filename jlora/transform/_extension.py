"""The public decorator that registers a rule for a custom primitive or kernel."""

from collections.abc import Callable
from typing import Literal

from jlora._paths import brief
from jlora.transform import _registry
from jlora.transform._registry import Rule, RuleFn

_KINDS = ("rearrange", "product", "join")


def rule(
    primitive: str,
    *,
    kind: Literal["rearrange", "product", "join"],
    kernel: str | None = None,
    replace: bool = False,
) -> Callable[[RuleFn], RuleFn]:
    """Register a rule that applies a custom primitive to an adapted weight, for all transforms.

    The decorated function is called as `fn(walk, eqn, *operands)` when an operand is an adapted
    weight: a `View`, with `base`, `shape`, `roles` and `factors` (A and s·B, each with its axes in
    the order of the base and the rank last). The other operands are arrays. In `jlora.layouts`
    weights are `Probe`s, which have no factors; `Weight` covers both. `eqn` is the equation, a
    `jax.extend.core.JaxprEqn`. The function returns the equation's outputs in a list, arrays or
    weights, computed with

    - `jlora.transform.product(walk, eqn, operands, dimension_numbers)` for a product;
    - `walk.bind(eqn, *operands)`, which applies the primitive to the base weights;
    - `weight.moved(base, roles, move)` for a rearrangement: the weight with a new base and the
      roles of its axes in the new order. `move(f, axes)` is applied to each factor `f`, which has
      these axes of the base and then the rank.

    It returns `NotImplemented`, before it binds anything, if no factored form exists. The weight is
    then materialized as `jlora.lora(fallback=)` says. `jlora.capture` does not see the products in
    such a rule, and raises for a weight whose inputs are contracted there only.

    Args:
        primitive: the primitive's name, as printed in a jaxpr.
        kind: "product" if the output is an activation; "rearrange" if it is the weight with its
            entries moved, repeated or dropped; "join" if it is the weight combined with other
            operands, or padded. A "product" and a "rearrange" receive DoRA's gain, and the calls
            above apply it; for a "join" a weight with a gain is materialized first.
        kernel: for a primitive shared by many functions, its name: `pallas_call(..., name="...")`.
        replace: whether to replace a rule that is already registered.

    Returns:
        A decorator, which returns the function unchanged.

    Raises:
        ValueError: the primitive (or this kernel of it) already has a rule and `replace` is False;
            `kind` is none of the three.
        TypeError: an argument, or what is decorated, has another type.

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

    call = "jlora.transform.rule(primitive, kind=...)"
    if not isinstance(primitive, str):
        raise TypeError(
            f"`{call}`: `primitive` is {brief(primitive)}. Pass its name, as printed in a jaxpr: "
            '`@jlora.transform.rule("dot_general", kind="product")`.'
        )
    if kind not in _KINDS:
        raise ValueError(f"`{call}`: `kind` is {brief(kind)}. Give one of {', '.join(_KINDS)}.")
    if not (kernel is None or isinstance(kernel, str)):
        raise TypeError(f"`{call}`: `kernel` is {brief(kernel)}. Give its name, or None.")
    if not isinstance(replace, bool):
        raise TypeError(f"`{call}`: `replace` is {brief(replace)}. Give True or False.")

    def enter(fn: RuleFn) -> RuleFn:
        if not callable(fn):
            raise TypeError(
                f"`{call}`: the rule is {brief(fn)}. Decorate a function `(walk, eqn, *operands) "
                "-> outputs`."
            )
        _registry.register(Rule(fn, kind), primitive, kernel, replace)
        return fn

    return enter
