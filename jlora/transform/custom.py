"""Rules for `custom_vjp`, `custom_jvp` and `custom_vmap`, which keep the user's own rules.

The user's rule is traced on the shapes of the base weights, through JAX's `vjp` or `jvp` or by
calling it, and the traced program is walked like any other, so its products are factored too.
Dropout does not apply inside: a rule written for `x W` is not defined for an input that is dropped
in only one of two terms.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import PyTree

from jlora import _base, _compat
from jlora.transform._labeled import AnyArray
from jlora.transform._registry import rule
from jlora.transform._view import View
from jlora.transform._walk import Atom, Walk
from jlora.transform._weight import Value, Weight


def _struct(x: Value) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an operand, on which the user's rule is traced."""
    x = x.base if isinstance(x, Weight) else x
    if isinstance(x, _base.Deferred):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _trained(operands: Sequence[Any]) -> list[int]:
    return [k for k, x in enumerate(operands) if jnp.issubdtype(_struct(x).dtype, jnp.inexact)]


def _filled(operands: Sequence[Any], where: Sequence[int], values: Sequence[Any]) -> list[Any]:
    out = list(operands)
    for k, x in zip(where, values, strict=True):
        out[k] = x
    return out


@rule("custom_vjp_call", kind="custom", body="call_jaxpr")
def _custom_vjp(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    inner = walk.inside(eqn, None)
    n = eqn.params["num_consts"]  # closed over: not differentiable in JAX either
    consts, args = operands[:n], operands[n:]
    moved = _trained(args)
    shapes = [_struct(x) for x in operands]

    @functools.cache
    def forward() -> tuple[Any, Any]:
        def run(*arrays: Array) -> Any:
            def call(*values: Array) -> Any:
                return _compat.bind(eqn, *arrays[:n], *_filled(arrays[n:], moved, values))

            return jax.vjp(call, *(arrays[n + k] for k in moved))

        return jax.make_jaxpr(run, return_shape=True)(*shapes)

    @functools.cache
    def backward() -> Any:
        outs, pull = forward()[1]
        return jax.make_jaxpr(lambda pull, cts: pull(cts))(pull, outs)

    @jax.custom_vjp
    def call(*args: Value) -> Any:
        return inner.arrays(eqn, inner.evaluate(eqn.params["call_jaxpr"], [*consts, *args]))

    def fwd(*args: Value) -> Any:
        jaxpr, (outs, _) = forward()
        values = inner.evaluate(jaxpr, [*consts, *args])
        return inner.arrays(eqn, values[: len(outs)]), (values[len(outs) :], args)

    def bwd(saved: tuple[Any, Any], cts: Sequence[Any]) -> Any:
        residuals, args = saved
        targets = {j: args[k] for j, k in enumerate(moved) if isinstance(args[k], View)}
        grads = _pull(inner, eqn, backward(), [*residuals, *cts], targets)
        return tuple(_filled([None] * len(args), moved, grads))

    call.defvjp(fwd, bwd)
    return call(*args)


def _pull(
    walk: Walk,
    eqn: JaxprEqn,
    jaxpr: ClosedJaxpr | Jaxpr,
    values: Sequence[Any],
    targets: dict[int, View],
) -> list[Any]:
    """Walk a backward rule, without building a weight's cotangent where that is a product.

    The rule was written for a weight V and returns its cotangent G. With V = W + A·B (s is in B)
    the cotangent of W is G itself, and those of A and B are G·Bᵀ and Aᵀ·G, the gradients of the
    scalar <G, A·B>. W is frozen, so in a compiled step G is only needed for these two. If G is a
    product p·q, such as xᵀ·dy, they are p·(q·Bᵀ) and (Aᵀ·p)·q, and G is never built.
    """
    body = _compat.body(jaxpr)
    chains = {j: _product_chain(body, body.outvars[j]) for j in targets}
    ends = {j: chain[0].invars for j, chain in chains.items() if chain}
    wanted = [*body.outvars, *(v for pair in ends.values() for v in pair)]
    outs = walk.evaluate(body._replace(outvars=wanted), values)
    found = iter(outs[len(body.outvars) :])
    grads = walk.arrays(eqn, outs[: len(body.outvars)])
    for j, view in targets.items():
        pair = [next(found), next(found)] if j in ends else []
        if pair and not any(isinstance(x, Weight) for x in pair):
            parts = _factor_grads(walk, chains[j], pair[0], pair[1], view)
        else:
            parts = _through(view, grads[j])
        base = None if isinstance(view.base, _base.Deferred) else grads[j]  # None for zeros
        grads[j] = dataclasses.replace(view, base=base, parts=parts)
    return grads


def _product_chain(body: _compat.Body, out: Atom) -> list[JaxprEqn]:
    """Return the equations from a dot_general to `out` if the others only rearrange, else none."""
    made = {v: e for e in body.eqns for v in e.outvars}
    chain: list[JaxprEqn] = []
    while out in made:
        eqn = made[out]
        chain.insert(0, eqn)
        if eqn.primitive.name == "dot_general":
            return chain
        if eqn.primitive.name not in ("transpose", "reshape", "convert_element_type", "copy"):
            return []
        out = eqn.invars[0]
    return []


def _factor_grads(
    walk: Walk, chain: list[JaxprEqn], p: AnyArray, q: AnyArray, view: View
) -> tuple[Array, ...]:
    """Return the gradients of A and B for the cotangent `chain(p, q)`, without building it.

    For fixed p the chain is linear in q. Let T be its transpose; then <chain(p, q), A·B> =
    <q, T(A·B)>. T undoes the chain's rearrangements and multiplies the result by p. JAX transposes
    the program, and the walk factors it like any other, so the scalar is <q, (p·A)·B>: two narrow
    products, and two more for its gradient. The view's W only adds a constant to it.
    """

    def through(p: Array, q: Array) -> Array:
        out = _compat.bind(chain[0], p, q)[0]
        for eqn in chain[1:]:
            out = _compat.bind(eqn, out)[0]
        return out

    def transposed(p: Array, w: Array) -> Array:
        return jax.linear_transpose(functools.partial(through, p), _struct(q))(w)[0]

    jaxpr = jax.make_jaxpr(transposed)(_struct(p), _struct(view))

    def paired(parts: tuple[Any, ...]) -> Array:
        seen = walk.evaluate(jaxpr, [p, dataclasses.replace(view, parts=parts)])[0]
        return (seen * q).sum()

    return jax.grad(paired)(view.parts)


def _through(view: View, cotangent: AnyArray) -> tuple[Array, ...]:
    """Return the gradients of A and B for a dense cotangent of the weight."""

    def update(parts: tuple[Any, ...]) -> Array:
        return dataclasses.replace(view, parts=parts).delta()

    out, pull = jax.vjp(update, view.parts)
    return pull(cotangent.astype(out.dtype))[0]


@rule("custom_jvp_call", kind="custom", body="call_jaxpr")
def _custom_jvp(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    inner = walk.inside(eqn, None)
    moved = _trained(operands)
    shapes = [_struct(x) for x in operands]

    half = len(eqn.outvars)

    @functools.cache
    def forward() -> _compat.Body:
        def run(arrays: Sequence[Array], tangents: Sequence[Array]) -> Any:
            def call(*values: Array) -> Any:
                return _compat.bind(eqn, *_filled(arrays, moved, values))

            return jax.jvp(call, [arrays[k] for k in moved], tangents)

        return _compat.body(jax.make_jaxpr(run)(shapes, [shapes[k] for k in moved]))

    @jax.custom_jvp
    def call(*args: Value) -> Any:
        return inner.arrays(eqn, inner.evaluate(eqn.params["call_jaxpr"], args))

    @call.defjvp
    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        by_a = [_tangent(primals[k], tangents[k], 0) for k in moved]
        by_b = [_tangent(primals[k], tangents[k], 1) for k in moved]
        inner.tangents.update(forward().invars[len(primals) :])
        outs = inner.arrays(eqn, inner.evaluate(forward(), [*primals, *by_a]))
        if not any(isinstance(x, View) for x in by_b):
            return outs[:half], outs[half:]
        # Linear in the tangents: walk those of A and those of B separately, and add the results.
        body = forward()._replace(outvars=forward().outvars[half:])
        more = inner.arrays(eqn, inner.evaluate(body, [*primals, *by_b]))
        return outs[:half], [x + y for x, y in zip(outs[half:], more, strict=True)]

    return call(*operands)


def _tangent(x: Value, tangent: Any, moving: int) -> Value:
    """Return one of the two terms of an operand's tangent, dW + dA·B + A·dB.

    The tangent of W + A·B has rank 2r. It is the sum of two views of rank r, dW + dA·B (`moving` 0)
    and 0 + A·dB (`moving` 1). The rule, which was traced for the tangent of a dense weight, is
    walked with each of them, and by linearity the results are added.
    """
    if not isinstance(x, View):
        return tangent if moving == 0 else jnp.zeros_like(tangent)
    factors = tuple(tangent.factors[k] if k == moving else x.factors[k] for k in (0, 1))
    still = moving == 1 or isinstance(x.base, _base.Deferred)
    base = jnp.zeros(x.shape, x.base.dtype) if still else tangent.base
    return View(base, factors, x.roles, x.names)


@rule("custom_vmap_call", kind="custom", body="call")
def _custom_vmap(walk: Walk, eqn: JaxprEqn, *operands: Value) -> Any:
    inner = walk.inside(eqn, None)
    operands = tuple(x.with_built_base() if isinstance(x, Weight) else x for x in operands)

    @jax.custom_batching.custom_vmap
    def call(*args: Value) -> Any:
        return inner.arrays(eqn, inner.evaluate(eqn.params["call"], args))

    @call.def_vmap
    def batched(size: int, flags: Sequence[PyTree], *args: Value) -> Any:
        axes = [0 if any(jax.tree.leaves(f)) else None for f in flags]
        lifted = [
            _lifted(x, f, size) if axis == 0 else x
            for x, f, axis in zip(args, flags, axes, strict=True)
        ]
        run = jax.vmap(functools.partial(_compat.bind, eqn), in_axes=axes, axis_size=size)
        jaxpr = jax.make_jaxpr(run)(*(_struct(x) for x in lifted))
        outs = inner.arrays(eqn, inner.evaluate(jaxpr, lifted))
        return outs, [True] * len(outs)

    return call(*operands)


def _lifted(x: Value, flags: PyTree, size: int) -> Any:
    """Map every leaf of a weight if one is mapped, so that the rule sees a weight per lane."""

    def lift(leaf: Any, flag: bool) -> Any:
        return leaf if flag else jnp.broadcast_to(leaf[None], (size, *leaf.shape))

    x = jax.tree.map(lift, x, flags)
    return x.remade(x.base, x.components, (x.new_role, *x.roles)) if isinstance(x, Weight) else x
