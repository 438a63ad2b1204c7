"""How an activation meets a weight's two factors: the forms of x·W + (x·s·A)·B, and the choice."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from jlora._arrays import accumulator
from jlora.transform._labeled import Labels, contract, expanded, flops
from jlora.transform._view import RANK, narrowed, plus, scaled

TOKENS = "tokens"
# Up to this rank a differentiated z·B is a sum of terms: that many multiply-adds where a number is
# used cost less than to store it and read it again (benchmarks/forms.py, form "terms").
MOST_TERMS = 8


class Form(NamedTuple):
    """How an activation meets a weight's factors: labels for the axes of all, and the order.

    The last two are of a differentiated product alone: whether the factor that meets x is turned
    rank first, and whether the last product is written out as a sum of terms.
    """

    x: tuple[Any, ...]
    x_shape: tuple[int, ...]
    factors: tuple[tuple[Any, ...], tuple[Any, ...]]
    first: int
    between: tuple[Any, ...]
    out: tuple[Any, ...]
    dtype: Any
    precision: Any
    turned: bool
    terms: bool


@functools.partial(jax.jit, static_argnames="form")
def low_rank(base: Any, x: Any, parts: tuple[Any, ...], form: Form) -> Any:
    """Return x·W + s·(x·A)·B, the base product given.

    A function of its own under jit: layers of one shape share its trace, its derivative and its
    lowering, which is most of what an adapter costs to trace.
    """
    return _forward(form, base, x, parts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(form: Form, base: Any, x: Any, parts: tuple[Any, ...]) -> Any:
    """Use the factors without transposing: for one decoded token, setup dominates.

    There are two forms of one product. This one, s·(x·A)·B with the scaling between the factors,
    makes the fewest operations, and runs where nothing is differentiated. Where something is, its
    derivative rule replaces it by the other one, x·(s·A)·B with A turned rank first and the last
    product written out in terms: more operations forward, but its gradient is a faster product
    (see `_turned`) and keeps one array less (see `in_terms`). Differentiating this form would give
    its own gradient, so the rule runs and differentiates the other one; both have the same value,
    up to the rounding of a product, and so the same derivative.
    """
    return _product(form._replace(turned=False, terms=False), base, x, parts)


@functools.partial(_forward.defjvp, symbolic_zeros=True)
def _(form: Form, at: tuple[Any, ...], along: tuple[Any, ...]) -> Any:
    """Run and differentiate the form that is fastest together with its gradient."""
    leaves, tree = jax.tree.flatten(at)
    moves = dict(enumerate(tree.flatten_up_to(along)))
    moves = {n: dx for n, dx in moves.items() if not isinstance(dx, SymbolicZero)}

    def run(moved: dict[int, Any]) -> Any:
        return _product(form, *tree.unflatten([moved.get(n, x) for n, x in enumerate(leaves)]))

    return jax.jvp(run, [{n: leaves[n] for n in moves}], [moves])


def _product(form: Form, base: Any, x: Any, parts: tuple[Any, ...]) -> Any:
    """Scale the factor that meets x where it is turned, else what is between the two factors."""
    pair, labels, s = list(parts[:2]), list(form.factors), parts[2:]
    if s and form.turned:
        pair[form.first], labels[form.first] = _turned(s[0], pair[form.first], form)
    x, one, other = (
        narrowed(k, form.dtype)
        for k in (lax.reshape(x, form.x_shape), pair[form.first], pair[1 - form.first])
    )
    z = contract(x, form.x, one, labels[form.first], form.between, form.precision)
    if s and not form.turned:
        stack = [k for k in labels[0] if k in labels[1] and k != RANK]
        z = z * narrowed(expanded(s[0], stack[: s[0].ndim], form.between), z.dtype)
    last, names = in_terms if form.terms else contract, labels[1 - form.first]
    z = narrowed(z, form.dtype)
    update = last(z, form.between, other, names, form.out, form.precision)
    return plus(base, lax.reshape(update, base.shape))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 3, 4, 5))
def in_terms(
    z: Any, z_labels: Labels, factor: Any, labels: Labels, out_labels: Labels, precision: Any
) -> Any:
    """Sum over the rank as `contract` does, term by term: XLA fuses the terms into what reads them.

    So a step keeps one array instead of the base product and the update. The derivative is that of
    the product, so a gradient is a product again.
    """
    del precision  # the terms are exact
    wide = accumulator(z.dtype)
    z, factor = narrowed(z, wide), narrowed(factor, wide)

    def row(n: int, x: Any, names: Labels) -> Any:
        x = lax.index_in_dim(x, n, names.index(RANK), keepdims=False)
        return expanded(x, [k for k in names if k != RANK], out_labels)

    ranks = range(z.shape[z_labels.index(RANK)])
    return functools.reduce(lax.add, [row(n, z, z_labels) * row(n, factor, labels) for n in ranks])


@functools.partial(in_terms.defjvp, symbolic_zeros=True)
def _(z_labels: Labels, labels: Labels, out_labels: Labels, precision: Any, at: Any, along: Any):
    (z, factor), (dz, dfactor) = at, along
    out = in_terms(z, z_labels, factor, labels, out_labels, precision)
    moved = [(dz, factor), (z, dfactor)]
    moved = [pair for pair in moved if not any(isinstance(x, SymbolicZero) for x in pair)]
    parts = [contract(x, z_labels, y, labels, out_labels, precision) for x, y in moved]
    return out, functools.reduce(lax.add, parts) if parts else jnp.zeros_like(out)


def _turned(s: Any, factor: Any, form: Form) -> tuple[Any, tuple[Any, ...]]:
    """Scale the factor that meets x, its rank before all that is summed.

    So its gradient is dzᵀ x, which a CPU multiplies 3 to 7 times as fast as xᵀ dz. XLA would make
    the one of the other if the scaling did not stand between the product and the transpose.
    """
    labels = form.factors[form.first]
    kept = [k for k in labels if k in form.between and k != RANK]
    order = [*kept, RANK, *(k for k in labels if k not in (*kept, RANK))]
    return scaled(lax.transpose(factor, [labels.index(k) for k in order]), s), tuple(order)


@functools.lru_cache(1024)  # layers of one shape share it
def choose(
    x: Any,
    weight_sizes: tuple[tuple[Any, int], ...],
    x_labels: tuple[Any, ...],
    labels: tuple[tuple[Any, ...], tuple[Any, ...]],
    out_labels: tuple[Any, ...],
    dtype: Any,
    precision: Any,
) -> tuple[Form, Any]:
    """Choose how x (its type is given) meets the two factors, by fewer FLOPs, and count these."""
    sizes = dict(weight_sizes)
    tokens = [k for k in x_labels if k not in sizes]
    sizes |= dict(zip(x_labels, x.shape, strict=True))
    if len(tokens) > 1 and _adjacent(x_labels, tokens) and _may_merge(x, x_labels, tokens):
        x_labels, out_labels = (_as_one(group, tokens) for group in (x_labels, out_labels))
        sizes[TOKENS] = math.prod(sizes[k] for k in tokens)

    def between(first: int) -> list[Any]:
        needed = {*labels[1 - first], *out_labels}
        made = [*x_labels, *(k for k in labels[first] if k not in x_labels)]
        batch = [k for k in x_labels if k in labels[first] and k in needed]
        return batch + [k for k in made if k in needed and k not in batch]

    def cost(first: int) -> Any:
        return flops(sizes, x_labels, labels[first]) + flops(
            sizes, between(first), labels[1 - first]
        )

    first = min((0, 1), key=cost)
    shape = tuple(sizes[k] for k in x_labels)
    middle = tuple(between(first))
    summed = [k for k in labels[1 - first] if k not in out_labels]
    terms = summed == [RANK] and sizes[RANK] <= MOST_TERMS and not _explicit(x)
    # Over no more tokens x is no bigger than A: to turn A costs more than its gradient gains.
    many = math.prod(sizes[k] for k in tokens)
    turned = not isinstance(many, int) or many > sizes[RANK]  # symbolic in a `jax.export`
    how = (first, middle, out_labels, jnp.dtype(dtype), precision, turned, terms)
    return Form(x_labels, shape, labels, *how), cost(first)


def _explicit(x: Any) -> bool:
    """Whether every operation must say how its result is sharded."""
    return any(kind == AxisType.Explicit for kind in x.sharding.mesh.axis_types)


def _as_one(labels: tuple[Any, ...], tokens: list[Any]) -> tuple[Any, ...]:
    """Replace neighboring labels by one.

    Contracting two token axes in the gradient of A would otherwise make XLA transpose and copy
    every saved input.
    """
    first = labels.index(tokens[0])
    return (*labels[:first], TOKENS, *labels[first + len(tokens) :])


def _adjacent(labels: tuple[Any, ...], run: list[Any]) -> bool:
    first = labels.index(run[0])
    return labels[first : first + len(run)] == tuple(run)


def _may_merge(x: Any, labels: tuple[Any, ...], run: list[Any]) -> bool:
    """Whether merging axes keeps a sharded array where it lies: at most the first is sharded.

    Under automatic sharding only the mesh is known, not what is sharded over it, so nothing merges.
    """
    sharding = x.sharding
    if any(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return math.prod(sharding.mesh.axis_sizes) == 1
    return all(sharding.spec[labels.index(k)] is None for k in run[1:])
