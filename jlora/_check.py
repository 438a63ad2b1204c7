"""Check arguments that are easily mistaken: functions, trees of parameters, paths, mappings."""

import os
from collections.abc import Mapping, Sequence

import jax
from jaxtyping import PyTree

from jlora._arrays import is_adapted, is_leaf
from jlora._paths import brief, leaves_with_paths
from jlora._spec import LoraSpec

# By the package of their base class, `Module` or `Layer`: how to write a module as a function.
_FUNCTIONS = {
    "flax.linen": "`module.apply`, a function of `module.init(key, x)`",
    "flax.nnx": "`lambda state, x: nnx.merge(graph, state)(x)`, a function of the state in "
    "`graph, state = nnx.split(module)`",
    "equinox": "`lambda module, x: module(x)`, a function of the module",
    "haiku": "`transformed.apply`, a function of `transformed.init(key, x)`",
    "keras": "`module.stateless_call`, a function of the values of its variables",
    "torch": "a JAX function of JAX arrays",
}


def _of_module(x: object) -> str | None:
    """Return how a module is written as a function; None for anything else."""
    for kind in type(x).__mro__:
        for package, function in _FUNCTIONS.items():
            if kind.__name__ in ("Module", "Layer") and kind.__module__.startswith(package):
                # Equinox's wrappers of functions, such as `filter_jit`, are modules too.
                wrapper = type(x).__module__.startswith("equinox._")
                if package != "equinox" or (has_arrays(x) and not wrapper):
                    return function
    return None


def check_function(fn: object, call: str) -> None:
    """Refuse a module, parameters or anything else in place of a function of parameters."""
    function, kind = _of_module(fn), type(fn).__name__
    if function is not None:
        raise TypeError(f"`{call}`: `fn` is a module, `{kind}`. Pass {function}.")
    if not callable(fn):
        hint = "Pass a function of the parameters, such as `module.apply`."
        if callable(getattr(fn, "apply", None)):
            hint = "Pass its `apply`."
        elif has_arrays(fn):
            hint = "The function comes first: `jlora.lora(fn)(params, ...)`."
        raise TypeError(f"`{call}`: `fn` is not a function but {brief(fn)}. {hint}")


def check_optimizer(tx: object, name: str) -> None:
    """Refuse anything but an optimizer."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"`{name}(tx)`: `tx` is not an optimizer but {brief(tx)}. Pass an optax "
            f"transformation: `{name}(optax.adamw(1e-4))`."
        )


def check_tree(params: PyTree, call: str, argument: str = "params") -> None:
    """Refuse what is certainly no tree of parameters: rules, a module without arrays, a path."""
    leaves = jax.tree.leaves(params, is_leaf=is_leaf)
    if any(isinstance(x, LoraSpec) for x in leaves):
        raise TypeError(
            f"`{call}`: `{argument}` contains a `LoraSpec`: these are the rules. The parameters "
            "come first: `jlora.attach(params, rules, key=key)`."
        )
    alone = bool(leaves) and (leaves[0] is params or callable(getattr(params, "init", None)))
    if alone and not has_arrays(params):
        raise TypeError(
            f"`{call}`: `{argument}` is not a tree of arrays but {brief(params)}. Pass the "
            "parameters themselves, such as `module.init(key, x)`."
        )


def has_arrays(tree: PyTree) -> bool:
    """Whether a tree has at least one array, shape or node."""
    return any(
        is_adapted(x) or (hasattr(x, "shape") and hasattr(x, "dtype"))
        for x in jax.tree.leaves(tree, is_leaf=is_leaf)
    )


def check_directory(directory: object, call: str) -> None:
    """Refuse anything but a path."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"`{call}`: `directory` is {brief(directory)}. Pass a path first, a string or a "
            "`pathlib.Path`, and the parameters second."
        )


def check_mapping(value: object, call: str, example: str) -> None:
    """Refuse anything but a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{call}`: got {brief(value)}. Pass a mapping, such as `{example}`.")


def _one_is_adapted(one: object, other: object) -> bool:
    return one is not None and other is not None and is_adapted(one) != is_adapted(other)


def check_same(trees: Sequence[PyTree], names: Sequence[str], call: str, hint: str) -> None:
    """Refuse trees of different structures and name the first path where they differ."""
    stop = lambda x: x is None or is_leaf(x)
    (leaves, one_way), (others, other_way) = (jax.tree.flatten(tree, stop) for tree in trees)
    if one_way == other_way and not any(map(_one_is_adapted, leaves, others)):
        return
    one, other = ({p: x for p, x in leaves_with_paths(tree, stop)} for tree in trees)
    for first, second, name in ((one, other, names[0]), (other, one, names[1])):
        for path, x in first.items():
            if path not in second:
                raise ValueError(
                    f'`{call}`: the trees differ: "{path}" ({brief(x)}) is in `{name}` only. {hint}'
                )
    for path, x in one.items():
        if _one_is_adapted(x, other[path]):
            raise ValueError(
                f'`{call}`: "{path}" is {brief(x)} in `{names[0]}` and {brief(other[path])} in '
                f"`{names[1]}`. {hint}"
            )
