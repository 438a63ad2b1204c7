"""Flax's boxes, `nn.Partitioned` and its kind, which name the axes of a parameter for sharding.

In an adapted tree every part of a node has a box of its own, whose names are those of the base's
axes that the part has; the rank has none. So `nn.get_partition_spec`, `nn.meta.unbox` and the like
give what is right for each part. Functions of nodes read them without: the box is around the node.

    Partitioned(W, ("embed", "mlp"))  ->  LoraArray(base=Partitioned(W, ("embed", "mlp")),
                                                    lora_a=Partitioned(A, ("embed", None)), ...)

Flax is never imported: as long as it is not loaded, there are no boxes.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from jlora import _paths, forms
from jlora._arrays import AXES, Adapted, LoraArray, Tied, along, is_adapted, is_leaf
from jlora._base import is_stored


def _kind() -> Any:
    """Return the class of boxes; None if Flax is not loaded."""
    return getattr(sys.modules.get("flax.core.meta"), "Partitioned", None)


def is_box(x: object) -> bool:
    """Whether `x` is a box with names of axes (for `is_leaf=`)."""
    kind = _kind()
    return kind is not None and isinstance(x, kind)


def inside(tree: PyTree) -> PyTree:
    """Replace every box around a node by a box around each of its parts."""
    if _kind() is None:
        return tree
    return jax.tree.map(
        lambda x: boxed(x, x.value) if is_box(x) and is_adapted(x.value) else x,
        tree,
        is_leaf=lambda x: x is None or is_box(x) or is_leaf(x),
    )


def outside(tree: PyTree) -> PyTree:
    """Undo `inside`: put each node, without boxes in it, in one box."""
    if _kind() is None:
        return tree

    def around(x: Any) -> Any:
        box = _box(x)
        return x if box is None else dataclasses.replace(box, value=bare(x))

    return jax.tree.map(around, tree, is_leaf=lambda x: x is None or is_leaf(x))


def unboxed(tree: PyTree) -> PyTree:
    """Return a tree without boxes."""
    kind = _kind()
    if kind is None:
        return tree
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def leaves_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return `(path, leaf)` for every leaf; nodes, if they are leaves, without boxes in them."""
    pairs = _paths.leaves_with_paths(tree, is_leaf)
    return pairs if _kind() is None else [(path, bare(x)) for path, x in pairs]


def map_with_paths(
    fn: Callable[[str, Any], Any], tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> PyTree:
    """Return the tree of `fn(path, leaf)`, which takes and returns nodes without boxes in them."""
    if _kind() is None:
        return _paths.map_with_paths(fn, tree, is_leaf)

    def run(path: str, leaf: Any) -> Any:
        return like(fn(path, bare(leaf)), leaf)

    return inside(_paths.map_with_paths(run, tree, is_leaf))


def boxed(box: Any, node: Adapted) -> Adapted:
    """Put the parts of a node in boxes like `box`, which is that of the base."""

    def put(part: Any, names: tuple[Any, ...]) -> Any:
        if part is None or isinstance(part, Tied):
            return part
        return dataclasses.replace(box, value=part, names=names)

    node = bare(node)
    if not isinstance(node, LoraArray):
        return dataclasses.replace(
            node, base=put(node.base, box.names), value=put(node.value, box.names)
        )
    missing = len(getattr(node.base, "shape", ())) - len(box.names)
    names = of_parts(node, (*box.names, *(None,) * missing))
    parts = {name: put(part, names[name]) for name, part in node.parts.items()}
    return dataclasses.replace(node, base=put(node.base, box.names)).with_parts(parts)


def of_parts(node: LoraArray, names: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Derive the names of the axes of each part from those of the base; the rank has none."""
    roles = "s" * (len(names) - len(node.layout)) + node.layout
    cut = list(names)
    cut[roles.find("o")] = None  # slices of the outputs need not divide as all outputs do
    return {
        name: along(
            part.axes, roles, tuple(cut) if node.slices and name == "lora_b" else tuple(names)
        )
        for name, part in forms.parts(node).items()
    }


def with_base(node: Adapted, weight: PyTree) -> Adapted:
    """Return a node with a base; it has boxes if and only if the base has one."""
    if is_box(weight):
        return boxed(weight, dataclasses.replace(bare(node), base=weight.value))
    return dataclasses.replace(bare(node), base=weight)


def like(new: Any, old: Any) -> Any:
    """Put `new`, a node or a weight, in boxes like those that the node `old` has, if any.

    What is missing in `new` keeps the empty box that it has in `old`.
    """
    box = _box(old)
    if box is None:
        return new
    if not is_adapted(new):
        return dataclasses.replace(box, value=new)

    def holes(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        return {k: x for k, x in old.items() if is_box(x) and k in new and new[k] is None}

    made = dataclasses.replace(boxed(box, new), **holes(vars(new), vars(old)))
    if isinstance(made, LoraArray) and isinstance(old, LoraArray):
        return made.with_parts(holes(made.extra, old.extra))
    return made


def bare(x: Any) -> Any:
    """Return a node without boxes in it, and anything else as it is."""
    if not is_adapted(x):
        return x
    return jax.tree.map(
        lambda part: part.value if is_box(part) else part,
        x,
        is_leaf=lambda part: part is None or is_box(part) or is_stored(part),
    )


def _box(node: Any) -> Any:
    """Return the box of a node that has boxes in it, empty; None for anything else."""
    if not is_adapted(node):
        return None
    found: dict[str, Any] = {k: x for k, x in vars(node).items() if is_box(x)}
    if not found:
        return None
    own: Any = found.get("base", found.get("value"))
    if own is None:  # an adapter: A and B together have the names of the base
        sides: list[Any] = [found.get(name) for name in AXES]
        a, b = sides  # one of them may be tied
        own = b if a is None else a
        stack = len(own.names) - 1 - node.layout.count("o" if a is None else "i")
        rest = {
            "i": () if a is None else a.names[stack:-1],
            "o": () if b is None else b.names[stack + 1 :],
        }
        of_role = {role: iter(names) for role, names in rest.items()}
        names = (*own.names[:stack], *(next(of_role[role], None) for role in node.layout))
        own = dataclasses.replace(own, names=names)
    return dataclasses.replace(own, value=None)
