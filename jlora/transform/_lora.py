"""`lora(fn)`: trace the function on the base weights' shapes, then walk it with the real values."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from jlora import _base, forms
from jlora._arrays import FullArray, LoraArray, is_adapted, is_leaf
from jlora._boxes import inside
from jlora._check import check_function
from jlora._partition import constant
from jlora._paths import brief, path_strs
from jlora.transform._key import call_key, plain
from jlora.transform._probe import waiting
from jlora.transform._state import Arguments
from jlora.transform._view import View
from jlora.transform._walk import Fallback, Settings, Walk
from jlora.transform._weight import Weight

P = ParamSpec("P")
T = TypeVar("T")
_FALLBACKS = ("warn", "error", "materialize")


def lora(
    fn: Callable[P, T],
    *,
    dropout: float | Array = 0.0,
    key: PRNGKeyArray | None = None,
    fallback: Fallback = "warn",
    dtype: DTypeLike | None = None,
    freeze: bool = True,
) -> Callable[P, T]:
    """Let a function take adapted parameters: every `x W` becomes `x W + s · (x A) B`.

    `lora(fn)(params, x) == fn(jlora.merge(params), x)`, and `W + s · A B` is never built. The
    function, any JAX function of pytrees, is traced; outside a `jax.jit`, at every call. The result
    composes with `jax.jit`, `jax.grad`, `jax.vmap`, `jax.lax.scan` and `jax.checkpoint`. For DoRA,
    the gain `m / ‖W + s · A B‖`, differentiated in m only, scales the result of a product, or its
    input if the outputs are contracted, as in a tied head.

    Frozen leaves are constants of differentiation: the base, the scaling, the frozen parts of a
    form, and every other leaf of an argument that contains a `LoraArray` or a `FullArray`. Their
    gradients are zeros, which XLA drops; trainable leaves have the merged model's gradients.
    Arguments without such a node, positional or keyword, are differentiated as usual: pass inputs
    that need a gradient as separate arguments.

    NNX: what `fn` changes in place in a module among its arguments (the count of dropout's keys,
    running statistics) is written back to that module, as by `fn` itself. An `nnx.State` is a
    value: there `fn` must return what it changes, or `lora` raises.

    Args:
        fn: a function of pytrees, such as a Flax `module.apply`. Arrays among its arguments are
            traced; other leaves (bools, ints, floats, strings, callables) are passed unchanged.
        dropout: the rate at which elements of the adapter's input are dropped while training; a
            number, or a traced scalar, whose range is not checked. An embedding lookup has no input
            to drop. For DoRA, the change that the gain makes to `x W` uses the dropped input too,
            which costs one more product. PEFT's `lora_dropout`.
        key: a PRNG key for dropout. Each use of a weight, at each step of a loop inside `fn`, draws
            its own mask. The result is for one call: build it in the training step, with a key that
            is an argument of the step, and under `jax.vmap` with a key per example.
        fallback: what to do if an operation requires the materialized weight: "warn" (build it
            and report where, and the cost), "error", or "materialize" (build it silently).
        dtype: of the narrow products; `None` is the activation's dtype, as in Flax layers, with
            float32 accumulation; float32 for float16, whose range `x A` may exceed, and bfloat16
            for 8 bits. PEFT computes them in float32 over a bfloat16 base.
        freeze: whether frozen leaves are constants of differentiation. With `False` every array is
            differentiated, for the gradient of the base itself.

    Returns:
        A function of the same arguments, any of whose array leaves may be a `LoraArray`, a
        `FullArray` or a stored weight. A node that `fn` returns unchanged is returned as that node.

    Raises:
        ValueError: a rate outside [0, 1), dropout without a key, an unknown fallback; when called,
            a node whose parts do not fit, a change to an `nnx.State` that is not returned or, under
            `fallback="error"`, a weight that must be materialized; with dropout, a second call, a
            key that is a constant of a compiled program, or one key for all examples of a
            `jax.vmap`: the masks would repeat; or a call inside a function that another `lora`
            adapts, where nothing would be dropped.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import LoraSpec, attach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> jax.jit(lora(lambda p, x: x @ p["w"]))(params, jnp.ones((3, 4))).shape
        (3, 6)

    References: Hu et al. 2021, arXiv:2106.09685, eq. 3; Liu et al. 2024, arXiv:2402.09353, eq. 5
    and section 4.3. PEFT's `LoraLayer` and `DoraLinearLayer`.
    """
    check_function(fn, "jlora.lora(fn)")
    own_key = call_key(dropout, key)
    if fallback not in _FALLBACKS:
        raise ValueError(
            f"`jlora.lora(fallback={brief(fallback)})`: give one of "
            + ", ".join(f'"{f}"' for f in _FALLBACKS)
            + "."
        )
    if not isinstance(freeze, bool):
        raise TypeError(f"`jlora.lora(freeze={brief(freeze)})`: give True or False.")
    settings = Settings(fallback, dropout, None if dtype is None else jnp.dtype(dtype))

    @functools.wraps(fn)
    def adapted(*args: P.args, **kwargs: P.kwargs) -> T:
        taken = None if own_key is None else own_key.take((args, kwargs))
        return call(fn, settings, taken, args, kwargs, freeze)

    vars(adapted)[OPTIONS] = Options(adapted, fn, settings, own_key, freeze)
    return adapted


class Options(NamedTuple):
    """What `lora` was called with, kept on its result for `jlora.bank`."""

    made: Callable[..., Any]  # the result: a wrapper of it may have a copy of this attribute
    fn: Callable[..., Any]
    settings: Settings
    key: Any
    freeze: bool


OPTIONS = "_jlora_options"


def options_of(fn: Callable[..., Any]) -> Options | None:
    """Return the options of a function that `lora` returned; None for any other function."""
    found = getattr(fn, OPTIONS, None)
    return found if found is not None and found.made is fn else None


def call(
    fn: Callable[..., Any],
    settings: Settings,
    key: Any,
    args: Any,
    kwargs: Any,
    freeze: bool = True,
) -> Any:
    """Call `fn` with adapted arguments."""
    arguments = Arguments(fn, args, kwargs)
    pairs, tree = jax.tree_util.tree_flatten_with_path(arguments.opened, is_leaf=is_leaf)
    if not any(is_leaf(x) for _, x in pairs):
        if key is not None and not arguments.has_state:
            args, kwargs = plain((args, kwargs))
        return fn(*args, **kwargs)
    leaves = [x.value if isinstance(x, FullArray) else x for _, x in pairs]
    names = argument_paths(pairs, arguments.opened)
    if not (arguments.has_state or any(map(is_leaf, leaves))):
        args, kwargs = tree.unflatten(_constants(pairs, leaves) if freeze else leaves)
        return fn(*args, **kwargs)
    for name, x in zip(names, leaves, strict=True):
        if isinstance(x, LoraArray) and settings.mix is None:  # a bank's adapters were checked
            forms.check(name, x, "jlora.lora")
    bases = [x.base if isinstance(x, LoraArray) else x for x in leaves]
    traced = Traced(functools.wraps(fn)(lambda *a, **k: arguments.run(*a, **k)), tree, bases)
    if settings.observe is None:
        arguments.check(traced.jaxpr)
    seen = _constants(pairs, leaves) if freeze else leaves
    values = [
        View.of(seen[k], names[k]) if isinstance(seen[k], LoraArray) else waiting(seen[k])
        for k in traced.dynamic
    ]
    untouched = {
        id(v): leaves[k]
        for v, k in zip(values, traced.dynamic, strict=True)
        if isinstance(v, Weight)
    }
    walk = Walk(settings, key)
    outs = arguments.without_copies(walk.evaluate(traced.jaxpr, values))
    if settings.mix is not None and any(isinstance(x, Weight) for x in outs):
        settings.mix.refuse("a weight that is returned")
    result, new, _ = traced.result(
        [(untouched.get(id(x)) or x.dense()) if isinstance(x, Weight) else x for x in outs]
    )
    if settings.observe is None:
        arguments.write(new)
    return inside(result)


def _constants(pairs: Sequence[tuple[KeyPath, PyTree]], leaves: list[PyTree]) -> list[PyTree]:
    """Make frozen leaves of arguments with adapted nodes constants of differentiation."""
    adapted = {path[:2] for path, x in pairs if is_adapted(x)}
    return [
        constant(x) if path[:2] in adapted and not isinstance(node, FullArray) else x
        for (path, node), x in zip(pairs, leaves, strict=True)
    ]


def argument_paths(pairs: Sequence[tuple[Any, Any]], arguments: tuple[Any, Any]) -> list[str]:
    """Name leaves of `(args, kwargs)` by their paths inside their own arguments."""
    return path_strs([path for path, _ in pairs], arguments, start=2)


class Traced:
    """A function traced on the arrays among its leaves; what is not an array stays Python."""

    def __init__(self, fn: Callable[..., Any], tree: Any, leaves: list[Any]) -> None:
        leaves = [_base.standin(x) for x in leaves]
        arrays = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
        self.dynamic = [k for k, x in enumerate(leaves) if isinstance(x, arrays)]
        self._out: tuple[Any, list[Any]] = (None, [])

        # With the arguments and the name of `fn`, so that JAX's errors name what the user wrote.
        @functools.wraps(fn)
        def traced(*args: Any, **kwargs: Any) -> list[Any]:
            filled = list(leaves)
            values = jax.tree.leaves((args, kwargs))
            for k, value in zip(self.dynamic, values, strict=True):
                filled[k] = value
            args, kwargs = tree.unflatten(filled)
            outs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
            is_array = [isinstance(x, arrays) for x in outs]
            static = [None if a else x for x, a in zip(outs, is_array, strict=True)]
            self._out = (out_tree, list(zip(is_array, static, strict=True)))
            return [x for x, a in zip(outs, is_array, strict=True) if a]

        shown: list[Any] = [None] * len(leaves)
        for k in self.dynamic:
            shown[k] = leaves[k]
        args, kwargs = tree.unflatten(shown)
        self.jaxpr = jax.make_jaxpr(traced)(*args, **kwargs)

    def result(self, outs: list[Any]) -> Any:
        """Put traced outputs and Python ones together as `fn` returned them."""
        tree, plan = self._out
        values = iter(outs)
        return tree.unflatten([next(values) if is_array else x for is_array, x in plan])
