"""What is asked of every model written elsewhere: one function, `holds(fn, params, *args)`.

The model is taken as it is: `fn(params, *args)` runs it on a plain pytree of its own arrays.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import equations

import jlora
from jlora._paths import leaves_with_paths

# Relative to the largest value: a few roundings of float32, in sums of up to some hundred terms.
TOLERANCE = 1e-5

# Compiling is most of the time here, and each program runs once.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def holds(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    others: Mapping[str, str] | None = None,
    eager: bool = False,
) -> jlora.Explanation:
    """Adapt every weight matrix of a model, and compare it with its merged self in every way.

    Args:
        fn: the model, a function of its parameters and `args`.
        params: a pytree of arrays. Their values are replaced by random ones: several of these
            models start some weights at zero, where a gradient would show nothing.
        *args: the model's other arguments.
        others: which arrays of two or more dimensions are no weight matrices, and why: regular
            expression of their paths to reason.
        eager: run the adapted model without `jax.jit` too, which takes by far the longest: each
            operation is compiled for itself.

    Returns:
        What `jlora.explain` says of the adapted model.
    """
    base = random_values(params, 0)
    adapted = adapt(fn, base, *args, others=others or {})

    report = jlora.explain(fn, adapted, *args)
    assert report.materialized == 0 and report.unused == (), f"\n{report}"
    assert str(report).endswith(f"factored: {len(report.uses)}, materialized: 0, unused: 0")

    run = jlora.lora(fn, fallback="error")
    trainable, frozen = jlora.partition(adapted)

    def traced(fn: Callable[..., Any]) -> Any:
        """The gradient with respect to the adapter, and the outputs beside it."""

        def loss(trainable: Any) -> Any:
            outs = fn(jlora.combine(trainable, frozen), *args)
            return weighed(outs), outs

        return jax.jit(jax.grad(loss, has_aux=True)).trace(trainable)

    program = traced(run)
    gradient, outs = program.lower().compile(QUICKLY)(trainable)
    merged = traced(lambda p, *args: fn(jlora.merge(p), *args)).lower().compile(QUICKLY)
    want_gradient, want = merged(trainable)
    plain = merged(jax.tree.map(jnp.zeros_like, trainable))[1]
    assert distance(plain, want) > 100 * TOLERANCE, "the adapter does nothing here"
    close("the outputs", outs, want, TOLERANCE)
    if eager:
        close("the outputs without jit", run(adapted, *args), want, TOLERANCE)
    # Where a softmax is nearly even, most of the gradient of query and key cancels.
    close("the gradients", gradient, want_gradient, 3 * TOLERANCE)
    for path, leaf in leaves_with_paths(want_gradient):
        assert jnp.any(leaf != 0), f"the gradient of {path} is zero, so comparing it shows nothing"

    # Not in jlora's own words: no product or sum, forward or backward, has a weight's shape.
    made = made_shapes(program.jaxpr.jaxpr) & weight_shapes(adapted)
    assert not made, f"W + s·A·B, or a gradient of its shape, was built: {made}"
    return report


def adapt(
    fn: Callable[..., Any], params: Any, *args: Any, others: Mapping[str, str], rank: int = 2
) -> Any:
    """Attach to every weight matrix, leave `others`, and give A, B and s random values.

    What the program multiplies by, looks up or convolves with has a layout. An array without one
    must be named in `others`, so that nothing is left silently.
    """
    layouts = jlora.layouts(fn, params, *args)
    wide = [p for p, x in leaves_with_paths(params) if floating(x) and x.ndim > 1]
    left = {p for p in wide if any(re.fullmatch(pattern, p) for pattern in others)}
    missed = [p for p in wide if p not in layouts and p not in left]
    assert not missed, f"neither multiplied by nor named as something else: {missed}"
    types = [x.dtype for _, x in leaves_with_paths(params) if floating(x)]
    spec = jlora.LoraSpec(rank=rank, dtype=jnp.result_type(jnp.float32, *types))
    rules = dict.fromkeys(others, None) | {re.escape(p): spec for p in wide if p not in left}
    chosen = {p: layouts[p] for p in wide if p not in left}
    # Shapes only: an initializer of each shape would take longer to compile than the model.
    attach = lambda p: jlora.attach(p, rules, key=jax.random.key(0), layouts=chosen)
    _, adapter = jlora.detach(jax.eval_shape(attach, params))
    return jlora.bind(params, random_values(adapter, 1))


def floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def random_values(tree: Any, seed: int) -> Any:
    """Draw every floating leaf anew, matrices so that activations keep their size."""
    random = np.random.default_rng(seed)

    def new(x: Any) -> Any:
        if not floating(x):
            return x
        if len(x.shape) < 2:  # a bias, a norm, a scaling: of either sign, and not near zero
            sign = random.choice([-1.0, 1.0], x.shape)
            return jnp.asarray(random.uniform(0.3, 1.0, x.shape) * sign, x.dtype)
        # The largest dimension is at least the number of terms in the sum, for most matrices.
        return jnp.asarray(random.standard_normal(x.shape) * max(x.shape) ** -0.5, x.dtype)

    return jax.tree.map(new, tree)


def close(what: str, got: Any, want: Any, tolerance: float) -> None:
    apart = distance(got, want)
    assert apart <= tolerance, f"{what} differ from the merged model's by {apart:.1e}"


def distance(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest value of its leaf; types must agree."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    worst = 0.0
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape
        if floating(x):
            g, x = np.asarray(g, np.float64), np.asarray(x, np.float64)
            worst = max(worst, np.abs(g - x).max() / max(np.abs(x).max(), 1e-3))
        else:
            assert np.array_equal(g, x)
    assert math.isfinite(worst)
    return worst


def weighed(outs: Any) -> jax.Array:
    """One number: every output times fixed numbers unlike one another, so nothing cancels."""
    total = jnp.zeros(())
    for k, x in enumerate(x for x in jax.tree.leaves(outs) if floating(x)):
        weights = np.random.default_rng(k).standard_normal(x.shape)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        total += (x.astype(wide) * jnp.asarray(weights, wide)).sum()
    return total


def weight_shapes(adapted: Any) -> set[tuple[int, ...]]:
    """The shapes of the adapted weights, whole and one of a stack."""
    shapes = set()
    for node in jax.tree.leaves(adapted, is_leaf=lambda x: isinstance(x, jlora.LoraArray)):
        if isinstance(node, jlora.LoraArray):
            shapes |= {node.shape, node.shape[node.ndim - len(node.layout) :]}
    return shapes


def made_shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all products and sums of a program, inner ones too."""
    names = ("dot_general", "conv_general_dilated", "add", "add_any", "mul", "sub")
    return {e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name in names}
