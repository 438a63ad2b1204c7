"""`layouts(fn, params, ...)`: infer the input and output axes of each parameter."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from jlora import _compat
from jlora._arrays import is_adapted, is_leaf
from jlora._base import is_stored, standin
from jlora._check import check_function
from jlora._nnx import of_states
from jlora._paths import leaves_with_paths, of_attention
from jlora.transform._lora import Traced, argument_paths
from jlora.transform._probe import Probe
from jlora.transform._walk import Settings, Use, Walk


def layouts(
    fn: Callable[..., Any], params: PyTree, *args: PyTree, **kwargs: PyTree
) -> dict[str, str]:
    """Infer from a function which axes of each parameter are inputs and which are outputs.

    `fn(params, *args, **kwargs)` is traced, not run; outside of a mesh, in that of its arguments.
    An axis that is contracted, indexed by a lookup or slid over an image is an input, `i`; an axis
    that the result keeps is an output, `o`; leading axes that are scanned, mapped or indexed are
    stack axes and have no letter, also if each token looks up a matrix of its own, that of its
    expert. The first use of a parameter decides: a tied embedding is looked up first.

    A warning is issued where a leading axis is an output, as in `einsum("td,edf->tef")`: the heads
    of an attention share one A, but each expert of a mixture needs its own. Parameters with the
    name of an attention's (`attn`, `q_proj`, `key`, ...) are heads.

    Args:
        fn: a function of a pytree of parameters, such as a Flax `module.apply`.
        params: the parameters, adapted or not; arrays or `jax.ShapeDtypeStruct`.
        *args: its other arguments.
        **kwargs: its keyword arguments.

    Returns:
        The layout by path, for each parameter of two or more dimensions that is used in a product,
        a lookup or a convolution. Pass it to `jlora.attach(layouts=...)`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"q": jnp.ones((8, 2, 4)), "out": jnp.ones((2, 4, 8)), "b": jnp.ones(8)}
        >>> def attend(p, x):
        ...     return jnp.einsum("bhd,hdm->bm", jnp.einsum("bm,mhd->bhd", x, p["q"]), p["out"])
        >>> layouts(attend, params, jnp.ones((3, 8)))
        {'out': 'iio', 'q': 'ioo'}
    """
    check_function(fn, "jlora.layouts(fn, params, ...)")
    found: dict[str, list[Use]] = {}
    told = {path for path, x in leaves_with_paths(params, is_leaf) if is_adapted(x)}
    settings = Settings(observe=lambda eqn, use: found.setdefault(use.name, []).append(use))
    fn, ((params, *rest), kwargs) = of_states(fn, ((params, *args), kwargs))
    params = jax.tree.map(
        lambda x: getattr(x, "base", getattr(x, "value", x)) if is_adapted(x) else x,
        params,
        is_leaf=is_leaf,
    )
    arguments = jax.tree.map(standin, ((params, *rest), kwargs), is_leaf=is_stored)
    pairs, tree = jax.tree_util.tree_flatten_with_path(arguments)
    names = argument_paths(pairs, arguments)
    own = [
        path[0].idx == 0 and len(path) > 1 and getattr(path[1], "idx", None) == 0
        for path, _ in pairs
    ]
    shapes: dict[str, tuple[int, ...]] = {}

    def probe(*arrays: jax.Array) -> None:
        leaves = [x for _, x in pairs]
        for k, x in zip(dynamic, arrays, strict=True):
            leaves[k] = x
        traced = Traced(fn, tree, leaves)
        values = []
        for k in traced.dynamic:
            name = names[k]
            if own[k] and leaves[k].ndim >= 2:
                shapes[name] = leaves[k].shape
                values.append(Probe.of(leaves[k], name))
            else:
                values.append(leaves[k])
        Walk(settings).evaluate(traced.jaxpr, values)

    dynamic = [k for k, (_, x) in enumerate(pairs) if hasattr(x, "shape") and hasattr(x, "dtype")]
    arrays = [pairs[k][1] for k in dynamic]
    with _compat.in_mesh_of_any(x for x in arrays if not _compat.is_traced(x)):
        jax.eval_shape(probe, *arrays)
    deciding = {name: _deciding(uses) for name, uses in sorted(found.items())}
    spelled = {name: _spell(use, len(shapes[name])) for name, use in deciding.items()}
    spelled = {name: layout for name, layout in spelled.items() if "i" in layout}
    _doubt(spelled, deciding, {name: shape for name, shape in shapes.items() if name not in told})
    return spelled


def _deciding(uses: list[Use]) -> Use:
    """Return the first use; for a lookup of a matrix for each token, the product with it."""
    products = (use for use in uses if use.looked_up)
    return next(products, uses[0]) if uses[0].primitive == "gather" else uses[0]


def _doubt(
    spelled: dict[str, str], deciding: dict[str, Use], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Warn if outputs come first: heads of an attention share an A, experts need their own."""
    first = [
        name
        for name, layout in spelled.items()
        if name in shapes
        and not of_attention(name)
        and deciding[name].primitive == "dot_general"
        and layout[0] == "o"
        and len(layout) > 2
    ]
    if not first:
        return
    name = first[0]
    layout, shape = spelled[name], shapes[name]
    size = shape[len(shape) - len(layout)]
    more = f" (and {len(first) - 1} more)" if len(first) > 1 else ""
    warnings.warn(
        f'`jlora.layouts`: the first axis of "{name}" {list(shape)}{more} is neither contracted '
        f"nor mapped, so its layout is {layout!r}: right for the heads of an attention, which "
        f"share one A. If these are {size} experts of a mixture, give each its own A and B: "
        f'`jlora.attach(..., layouts={{**layouts, "{name}": "{layout[1:]}"}})`, and the same for '
        "the weights that follow.",
        stacklevel=3,
    )


def _spell(use: Use, ndim: int) -> str:
    """Return the layout for one use: leading axes that are not contracted or kept are stack."""
    sides = ["i" if k in use.contracted else "o" if k in use.free else "" for k in range(ndim)]
    stack = next((n for n, side in enumerate(sides) if side), ndim)
    if "o" not in sides and 0 < stack < ndim:
        stack -= 1  # scanned row by row: the stacked results are the output
        sides[stack] = "o"
    return "".join(side or "i" for side in sides[stack:])
