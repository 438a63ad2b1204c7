"""NNX modules in trees: replace them by their states, in which a shared Variable is one leaf.

To `jax.tree` a module is a tree, in which a layer that is used twice is two layers. NNX is never
imported: as long as it is not loaded, there are no modules.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import KeyPath, keystr
from jaxtyping import PyTree

from jlora._arrays import FullArray, LoraArray, is_leaf

_FIELDS = {f.name for kind in (LoraArray, FullArray) for f in dataclasses.fields(kind)}


def nnx() -> Any:
    """Return NNX; None if it is not loaded, or not completely."""
    module = sys.modules.get("flax.nnx")
    return module if hasattr(module, "Pytree") and hasattr(module, "to_flat_state") else None


def _is_module(x: object) -> bool:
    return isinstance(x, nnx().Pytree)


def is_variable(x: object) -> bool:
    """Whether `x` is a Variable of NNX (for `is_leaf=`)."""
    loaded = nnx()
    return loaded is not None and isinstance(x, loaded.Variable)


class Opened:
    """A tree whose modules are replaced by their states.

    Attributes:
        tree: the tree with states, of the same paths.
        modules: the modules of the tree.
    """

    def __init__(self, tree: PyTree) -> None:
        self.tree, self.modules, self._at = tree, [], []
        if nnx() is None:
            return
        leaves, self._structure = jax.tree.flatten(
            tree, is_leaf=lambda x: x is None or is_leaf(x) or _is_module(x)
        )
        self._at = [k for k, x in enumerate(leaves) if _is_module(x)]
        self.modules = [leaves[k] for k in self._at]
        if self.modules:
            self._graph, state = nnx().split(self.modules)
            for n, k in enumerate(self._at):
                leaves[k] = state[n] if n in state else nnx().State({})
            self.tree = self._structure.unflatten(leaves)

    def states(self, tree: PyTree) -> Any:
        """Return the states in a tree like `tree`, as one."""
        leaves = self._structure.flatten_up_to(tree)
        return nnx().State({n: leaves[k] for n, k in enumerate(self._at)})

    def closed(self, tree: PyTree) -> PyTree:
        """Make modules of the states in a tree like `tree`; they share its Variables."""
        if not self.modules:
            return tree
        leaves = self._structure.flatten_up_to(tree)
        modules = nnx().merge(self._graph, self.states(tree))
        for n, k in enumerate(self._at):
            leaves[k] = modules[n]
        return self._structure.unflatten(leaves)


def renewed(state: PyTree, like: Callable[[], PyTree]) -> PyTree:
    """Return an optimizer's state in the structure of `like()`.

    `nnx.Optimizer` keeps the arrays of its state in the order of their paths, and gives back an
    `nnx.State` where a node was.
    """
    loaded = nnx()
    if loaded is None:
        return state

    def was_node(x: object) -> bool:
        return isinstance(x, loaded.State) and 0 < len(x) and set(x) <= _FIELDS

    if not any(map(was_node, jax.tree.leaves(state, is_leaf=was_node))):
        return state
    found = {_keys(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    pairs, structure = jax.tree_util.tree_flatten_with_path(like())
    if {_keys(path) for path, _ in pairs} != set(found):
        return state
    return structure.unflatten([found[_keys(path)] for path, _ in pairs])


def _keys(path: KeyPath) -> tuple[str, ...]:
    return tuple(keystr((key,), simple=True) for key in path)


def of_states(fn: Callable[..., Any], arguments: PyTree) -> tuple[Callable[..., Any], PyTree]:
    """Return a function of `(args, kwargs)` with states in place of modules, and those."""
    opened = Opened(arguments)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = opened.closed((args, kwargs))
        return fn(*args, **kwargs)

    return run, opened.tree
