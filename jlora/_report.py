"""Reports: `summary` counts parameters, `explain` lists where they are used."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jlora._arrays import LoraArray, is_leaf
from jlora._base import is_stored
from jlora._check import check_function, check_tree
from jlora._nnx import of_states
from jlora._partition import partition
from jlora.transform._lora import argument_paths, call
from jlora.transform._walk import Settings, Use


def summary(params: PyTree) -> str:
    """Count the trainable parameters, in the format of PEFT's `print_trainable_parameters`.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes, of arrays or `ShapeDtypeStruct`s.

    Returns:
        One line. "all params" counts base weights and adapters, without scalings; a stored weight
        counts as the weight that it stands for, and its bytes follow.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> print(summary({"w": node}))
        trainable params: 14 || all params: 26 || trainable%: 53.8462
    """

    check_tree(params, "jlora.summary(params)")

    def unscaled(x: PyTree) -> PyTree:
        return dataclasses.replace(x, scaling=None) if isinstance(x, LoraArray) else x

    trainable, _ = partition(params)
    counted = jax.tree.map(unscaled, params, is_leaf=is_leaf)
    trained, total = (
        # The leaves of an Equinox module include functions and numbers.
        sum(
            math.prod(x.shape)
            for x in jax.tree.leaves(tree, is_leaf=is_stored)
            if hasattr(x, "shape")
        )
        for tree in (trainable, counted)
    )
    percent = 100 * trained / total if total else 0.0
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {percent:.4f}"
    return line + _of_stored(params)


def _of_stored(params: PyTree) -> str:
    """Count the bytes of the stored weights; nothing if there are none."""
    stored = [x for x in jax.tree.leaves(params, is_leaf=is_stored) if is_stored(x)]
    if not stored:
        return ""

    def size(x: PyTree) -> int:
        return math.prod(x.shape) * np.dtype(x.dtype).itemsize

    held = sum(size(leaf) for x in stored for leaf in jax.tree.leaves(x))
    return f" || stored weights: {held:,} bytes, {sum(map(size, stored)):,} as arrays"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Hold the result of `explain`; its string is a table.

    Attributes:
        uses: one entry per parameter and equation that uses it.
        unused: the paths of adapted parameters that the function never reads.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]

    @property
    def materialized(self) -> int:
        """The number of uses that materialize W + s·A·B."""
        return sum(not use.factored for use in self.uses)

    def __str__(self) -> str:
        head = ("parameter", "primitive", "form", "extra FLOPs", "line")
        rows = [
            (
                use.name,
                use.primitive,
                ("factored" if use.factored else f"materialized: {use.why}")
                + (f" ({use.base})" if use.base else ""),
                f"{use.flops:,}",
                use.line,
            )
            for use in self.uses
        ] + [(name, "-", "never used", "0", "-") for name in self.unused]
        widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        factored = len(self.uses) - self.materialized
        return "\n".join(
            [
                *lines,
                f"factored: {factored}, materialized: {self.materialized}, "
                f"unused: {len(self.unused)}",
            ]
        )


def explain(fn: Callable[..., Any], params: PyTree, *args: PyTree, **kwargs: PyTree) -> Explanation:
    """List where each adapted parameter is used, and whether that use is factored.

    `lora(fn)(params, *args, **kwargs)` is traced, not run, and no warning is issued.

    Args:
        fn: the plain function.
        params: its first argument, usually adapted parameters.
        *args: its other arguments, which may contain adapted parameters.
        **kwargs: its keyword arguments.

    Returns:
        An `Explanation`; `print` it for the table. For each parameter and use it has the primitive,
        whether the use is factored or why it is materialized, the extra FLOPs of the adapter, and
        the source line; for a stored weight also its format, and whether it is built there.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> report = explain(lambda p, x: x @ p["w"], {"w": node}, jnp.ones((5, 3)))
        >>> report.materialized, report.uses[0].primitive, report.uses[0].flops
        (0, 'dot_general', 140)
    """
    check_function(fn, "jlora.explain(fn, params, ...)")
    sites: dict[tuple[int, str], Use] = collections.OrderedDict()
    alive = []  # equations are identified by address, so none may be freed until the end

    def observe(eqn: JaxprEqn, use: Use) -> None:
        alive.append(eqn)
        sites.setdefault((id(eqn), use.name), use)

    settings = Settings(observe=observe)
    fn, arguments = of_states(fn, ((params, *args), kwargs))
    leaves, tree = jax.tree.flatten(arguments)
    dynamic = [k for k, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def run(*arrays: ArrayLike) -> None:
        filled = list(leaves)
        for k, x in zip(dynamic, arrays, strict=True):
            filled[k] = x
        call(fn, settings, None, *tree.unflatten(filled))

    jax.eval_shape(run, *(leaves[k] for k in dynamic))
    pairs = jax.tree_util.tree_leaves_with_path(arguments, is_leaf=is_leaf)
    names = argument_paths(pairs, arguments)
    adapted = [p for p, (_, x) in zip(names, pairs, strict=True) if isinstance(x, LoraArray)]
    order = {name: k for k, name in enumerate(adapted)}
    uses = sorted(sites.values(), key=lambda use: order[use.name])
    seen = {use.name for use in uses}
    return Explanation(tuple(uses), tuple(p for p in adapted if p not in seen))
