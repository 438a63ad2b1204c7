"""The forms in which x·W + (x·s·A)·B can be computed, and the choice between them."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jlora import _compat
from jlora._arrays import accumulator
from jlora.transform._labeled import (
    AnyArray,
    Labels,
    Places,
    contract,
    derived,
    einsum,
    expanded,
    flops,
)
from jlora.transform._view import RANK, narrowed, plus, scaled

TOKENS = "tokens"
# Up to this rank a differentiated z·B is written as a sum of terms: recomputing that many
# multiply-adds at each use costs less than storing the result (benchmarks/forms.py, form "terms").
MOST_TERMS = 8


class Form(NamedTuple):
    """How x is multiplied by the two factors: labels for all axes, and the order of the products.

    The last two fields apply only when differentiating: whether the factor that x is multiplied by
    is transposed to rank first, and whether the last product is written as a sum of terms.
    """

    x: Labels
    x_shape: tuple[int, ...]
    factors: tuple[Labels, Labels]
    first: int
    between: Labels
    out: Labels
    dtype: Any
    precision: Any
    turned: bool
    terms: bool


@functools.partial(jax.jit, static_argnames="form")
def low_rank(base: AnyArray, x: AnyArray, parts: tuple[Any, ...], form: Form) -> Array:
    """Return x·W + s·(x·A)·B, where `base` is x·W.

    Jitted separately so that layers of one shape share its trace, its derivative and its lowering,
    which make up most of an adapter's trace time.
    """
    return _forward(form, base, x, parts)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(form: Form, base: AnyArray, x: AnyArray, parts: tuple[Any, ...]) -> Array:
    """Use the factors without transposing: for one decoded token, setup dominates.

    There are two forms of one product. This one, s·(x·A)·B with the scaling between the factors,
    has the fewest operations and runs when nothing is differentiated. Under differentiation, the
    derivative rule below replaces it by x·(s·A)·B, with A transposed to rank first and the last
    product written as a sum of terms. That takes more operations forward, but its gradient is a
    faster product (see `_turned`) and saves one residual (see `in_terms`). Differentiating this
    form would give its own, slower gradient, so the rule runs and differentiates the other form.
    Both compute the same function up to rounding, and so have the same derivative.
    """
    return _product(form._replace(turned=False, terms=False), base, x, parts)


@functools.partial(_forward.defjvp, symbolic_zeros=True)
def _(form: Form, at: tuple[Any, ...], along: tuple[Any, ...]) -> Any:
    """Run and differentiate the form that is fastest including its gradient."""
    leaves, tree = jax.tree.flatten(at)
    moves = dict(enumerate(tree.flatten_up_to(along)))
    moves = {n: dx for n, dx in moves.items() if not isinstance(dx, SymbolicZero)}

    def run(moved: dict[int, Any]) -> Any:
        return _product(form, *tree.unflatten([moved.get(n, x) for n, x in enumerate(leaves)]))

    return jax.jvp(run, [{n: leaves[n] for n in moves}], [moves])


def _product(form: Form, base: AnyArray, x: AnyArray, parts: tuple[Any, ...]) -> Array:
    """Compute the product, scaling the first factor if it is transposed, else z = x·A."""
    pair, labels, s = list(parts[:2]), list(form.factors), parts[2:]
    if s and form.turned:
        pair[form.first], labels[form.first] = _turned(s[0], pair[form.first], form)
    x, one, other = lax.reshape(x, form.x_shape), pair[form.first], pair[1 - form.first]
    x = narrowed(x, form.dtype)
    narrow, wide = places(base, x, form)
    z = contract(x, form.x, one, labels[form.first], form.between, form.precision, narrow)
    if s and not form.turned:
        stack = [k for k in labels[0] if k in labels[1] and k != RANK]
        z = z * narrowed(expanded(s[0], stack[: s[0].ndim], form.between), z.dtype)
    z, rest = narrowed(z, form.dtype), (labels[1 - form.first], form.out, form.precision)
    if form.terms:
        update = in_terms(z, form.between, other, *rest)
    else:
        update = contract(z, form.between, other, *rest, wide)
    return plus(base, lax.reshape(update, base.shape))


def places(base: AnyArray, x: AnyArray, form: Form) -> tuple[Places | None, Places | None]:
    """Return how both products are sharded on a mesh with explicit axes: as x, and as the base's.

    The rank is not sharded. A product whose contracted axes are sharded, as in a row-parallel
    layer, has no sharding of its own: it must be told.
    """
    sharding = jax.typeof(base).sharding
    if not _compat.is_explicit(sharding):
        return None, None
    of_x = jax.typeof(x).sharding.spec or (None,) * x.ndim
    merged = len(sharding.spec) - len(form.out)  # all token axes are one, sharded as the first
    first = form.out.index(TOKENS) + 1 if merged else 0
    of_base = (*sharding.spec[:first], *sharding.spec[first + merged :])
    return (
        Places(sharding.mesh, dict(zip(form.x, of_x, strict=True)) | {RANK: None}),
        Places(sharding.mesh, dict(zip(form.out, of_base, strict=True))),
    )


def in_terms(
    z: AnyArray,
    z_labels: Labels,
    factor: AnyArray,
    labels: Labels,
    out_labels: Labels,
    precision: lax.PrecisionLike,
) -> Array:
    """Sum over the rank as `contract` does, but term by term, so that XLA can fuse the terms.

    A step then keeps one residual instead of the base product and the update. The derivative is
    that of the product, so a gradient is still one matmul. The terms are exact: the precision is
    that of the derivative.
    """

    def run(z: AnyArray, factor: AnyArray) -> Array:
        wide = accumulator(z.dtype)
        z, factor = narrowed(z, wide), narrowed(narrowed(factor, z.dtype), wide)

        def row(n: int, x: Array, names: Labels) -> Any:
            x = lax.index_in_dim(x, n, names.index(RANK), keepdims=False)
            return expanded(x, [k for k in names if k != RANK], out_labels)

        ranks = range(z.shape[z_labels.index(RANK)])
        terms = [row(n, z, z_labels) * row(n, factor, labels) for n in ranks]
        return functools.reduce(lax.add, terms)

    return derived(run, einsum(z_labels, labels, out_labels, precision), z, factor)


def _turned(s: AnyArray, factor: AnyArray, form: Form) -> tuple[Array, Labels]:
    """Scale the first factor, transposed so that the rank comes before the contracted axes.

    Its gradient is then dzᵀ x, which is 3 to 7 times as fast as xᵀ dz on a CPU. The scaling between
    the product and the transpose keeps XLA from rewriting one as the other.
    """
    labels = form.factors[form.first]
    kept = [k for k in labels if k in form.between and k != RANK]
    order = [*kept, RANK, *(k for k in labels if k not in (*kept, RANK))]
    return scaled(lax.transpose(factor, [labels.index(k) for k in order]), s), tuple(order)


@functools.lru_cache(1024)  # layers of one shape share it
def choose(
    x: Any,
    weight_sizes: tuple[tuple[Any, int], ...],
    x_labels: Labels,
    labels: tuple[Labels, Labels],
    out_labels: Labels,
    dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> tuple[Form, Any]:
    """Choose the order of the products with the fewest FLOPs, and count them; `x` is a type."""
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
    explicit = _compat.is_explicit(x.sharding)
    terms = summed == [RANK] and sizes[RANK] <= MOST_TERMS and not explicit
    # With at most `rank` tokens, transposing A costs more than it saves in the gradient.
    many = math.prod(sizes[k] for k in tokens)
    turned = not isinstance(many, int) or many > sizes[RANK]  # symbolic in a `jax.export`
    how = (first, middle, out_labels, jnp.dtype(dtype), precision, turned, terms)
    return Form(x_labels, shape, labels, *how), cost(first)


def _as_one(labels: tuple[Any, ...], tokens: list[Any]) -> tuple[Any, ...]:
    """Replace adjacent labels by one.

    Otherwise XLA transposes and copies every saved input to contract two token axes in the
    gradient of A.
    """
    first = labels.index(tokens[0])
    return (*labels[:first], TOKENS, *labels[first + len(tokens) :])


def _adjacent(labels: tuple[Any, ...], run: list[Any]) -> bool:
    first = labels.index(run[0])
    return labels[first : first + len(run)] == tuple(run)


def _may_merge(x: Any, labels: tuple[Any, ...], run: list[Any]) -> bool:
    """Whether merging axes keeps a sharded array in place: at most the first one is sharded.

    Under automatic sharding only the mesh is known, not the sharding, so nothing is merged.
    """
    sharding = x.sharding
    if any(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return math.prod(sharding.mesh.axis_sizes) == 1
    return all(sharding.spec[labels.index(k)] is None for k in run[1:])
