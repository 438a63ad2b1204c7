"""`capture(fn, params, ...)`: first and second moments of the inputs of each adapted weight."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jlora import forms
from jlora._arrays import FullArray, Geometry, LoraArray, accumulator, is_adapted, is_leaf
from jlora._base import deferred
from jlora._boxes import outside
from jlora._check import check_function
from jlora._moments import Moments
from jlora._paths import describe
from jlora.transform._inputs import Sums
from jlora.transform._lora import Traced, argument_paths
from jlora.transform._probe import waiting
from jlora.transform._sites import Sites
from jlora.transform._view import Names, View
from jlora.transform._walk import Settings, Walk

_CALL = "jlora.capture(fn, params, ...)"


def capture(fn: Callable[..., Any], params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
    """Sum `x xᵀ`, `x` and 1 over the inputs x of every adapted weight, while `fn` runs.

    `fn(params, *args, **kwargs)` runs forward on the base weights with all adapters off, as in PEFT
    for EVA. The input of a weight is what its input axes are contracted with, flattened: a patch
    for a convolution, the rows of one expert. If a weight is used twice, or split in two pieces
    that are both applied to x, then x counts twice. For a weight split along its inputs only the
    diagonal blocks of the second moment are known; the others are zero.

    Memory is `(in, in)` per weight, independent of the number of inputs. Compile it, as in
    `jax.jit(lambda params, batch: jlora.capture(fn, params, batch))`, and sum over batches with
    `jax.tree.map(jnp.add, one, other)`.

    Args:
        fn: a function of a pytree of parameters, such as a Flax `module.apply`.
        params: its parameters, after `jlora.attach`; the A and B there are not read.
        *args: its other arguments.
        **kwargs: its keyword arguments.

    Returns:
        A tree like `params`: `Moments` for each `LoraArray`, None for anything else.

    Raises:
        ValueError: `params` has no `LoraArray`; the shapes of one do not match; or one has no
            contracted input: an embedding lookup, a tied head, a weight that is materialized.

    Example:
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((2, 3))}, {"w": LoraSpec(1)}, key=jax.random.key(0))
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> moments = capture(lambda p, x: x @ p["w"], params, x)["w"]
        >>> moments.second.tolist(), moments.total.tolist(), moments.count.item()
        ([[10.0, 14.0], [14.0, 20.0]], [4.0, 6.0], 2.0)

    Reference: the input statistics of Paischer et al. 2024, arXiv:2410.07170, and Yang et al. 2024,
    arXiv:2406.05223. PEFT's `get_eva_state_dict` and `preprocess_corda`, which use module hooks.
    """
    check_function(fn, _CALL)
    params = outside(params)
    arguments = ((params, *args), kwargs)
    pairs, tree = jax.tree_util.tree_flatten_with_path(arguments, is_leaf)
    names = argument_paths(pairs, arguments)
    leaves = [x.value if isinstance(x, FullArray) else x for _, x in pairs]
    bases = [x.base if isinstance(x, LoraArray) else x for x in leaves]
    nodes = {
        k: names[k]
        for k, (path, x) in enumerate(pairs)
        if isinstance(x, LoraArray) and (path[0].idx, getattr(path[1], "idx", None)) == (0, 0)
    }
    if not nodes:
        raise ValueError(
            f"`{_CALL}`: there is no LoraArray in `params`, so there is no input to sum over. "
            "Attach an adapter first: `params = jlora.attach(params, rules, key=key)`."
        )
    for k, name in nodes.items():
        forms.check(name, leaves[k], "jlora.capture")
    traced = Traced(fn, tree, bases)
    views = {k: _probe(leaves[k], name) for k, name in nodes.items()}
    sites = Sites()
    walk = Walk(Settings("materialize", instead=sites.apply))
    values = [views.get(k, waiting(bases[k])) for k in traced.dynamic]
    _, found = sites.pulled(walk, traced.jaxpr, values)
    _refuse({name: leaves[k] for k, name in nodes.items() if name not in sites.met}, sites.missed)
    result = iter(_moments(leaves[k], found[traced.dynamic.index(k)]) for k in nodes)
    return jax.tree.map(
        lambda x: next(result) if isinstance(x, LoraArray) else None, params, is_leaf=is_adapted
    )


def _probe(node: LoraArray, name: str) -> View:
    """Return a view of a weight with the identity over its inputs as A, and zeros as B."""
    geometry = Geometry.of(node.shape, node.layout)
    wide, n = accumulator(node.dtype), geometry.fan_in
    eye = jnp.eye(n, dtype=wide).reshape(*geometry.in_dims, n)
    a = jnp.broadcast_to(eye, (*geometry.stack, *eye.shape))
    b = jnp.zeros((*geometry.stack, n, *geometry.out_dims), wide)
    roles = ("s",) * len(geometry.stack) + tuple(node.layout)
    return View(deferred(node.base), (a, b, jnp.ones((), wide)), roles, Names([name]), True)


def _moments(node: LoraArray, sums: Sums) -> Moments:
    stack = Geometry.of(node.shape, node.layout).stack
    n = sums.second.shape[-1]
    total, count = (x.reshape(*stack, n) for x in sums[1:])
    return Moments(sums.second.reshape(*stack, n, n), total, count.max(-1))


def _refuse(unmet: dict[str, LoraArray], missed: dict[str, str]) -> None:
    """Raise for weights without any summed input, and name the operations that used them."""
    if not unmet:
        return
    what = [
        f"{describe(path, node)} ({missed.get(path, 'never used')})" for path, node in unmet.items()
    ]
    raise ValueError(
        f"`{_CALL}`: there are no inputs for {', '.join(what)}. Only a product or a convolution "
        "that contracts a weight's input axes has inputs. Leave these out of the rules here, as "
        f'in `{{"{next(iter(unmet))}": None, ...}}`, and attach them afterwards.'
    )
