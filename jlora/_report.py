"""What is adapted, in numbers and in words: summary, explain."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from jlora._arrays import LoraArray, is_leaf
from jlora._base import is_stored
from jlora._partition import partition
from jlora.transform._lora import argument_paths, call
from jlora.transform._walk import Settings, Use


def summary(params: PyTree) -> str:
    """Count what trains, in the words of PEFT's `print_trainable_parameters`.

    Args:
        params: a tree with `LoraArray` and `FullArray` nodes; of arrays or their shapes.

    Returns:
        One line. "all params" counts base weights and adapters, scalings left out.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> print(summary({"w": node}))
        trainable params: 14 || all params: 26 || trainable%: 53.8462
    """

    def unscaled(x: Any) -> Any:
        return dataclasses.replace(x, scaling=None) if isinstance(x, LoraArray) else x

    trainable, _ = partition(params)
    counted = jax.tree.map(unscaled, params, is_leaf=is_leaf)
    trained, total = (
        # An Equinox module's leaves are functions and numbers as well.
        sum(
            math.prod(x.shape)
            for x in jax.tree.leaves(tree, is_leaf=is_stored)
            if hasattr(x, "shape")
        )
        for tree in (trainable, counted)
    )
    percent = 100 * trained / total if total else 0.0
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {percent:.4f}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, it is a table.

    Attributes:
        uses: one entry per parameter and place of use.
        unused: paths of adapted parameters that the function never reads.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]

    @property
    def materialized(self) -> int:
        """How many uses build W + s·A·B."""
        return sum(not use.factored for use in self.uses)

    def __str__(self) -> str:
        head = ("parameter", "primitive", "form", "extra FLOPs", "line")
        rows = [
            (
                use.name,
                use.primitive,
                "factored" if use.factored else f"materialized: {use.why}",
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


def explain(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Explanation:
    """Say where each adapted parameter is used, and whether that use is factored.

    `lora(fn)(params, *args, **kwargs)` is traced, not run, and nothing is warned of.

    Args:
        fn: the plain function.
        params: its first argument, adapted parameters as a rule.
        *args: its other arguments, which may be adapted as well.
        **kwargs: its keyword arguments.

    Returns:
        An `Explanation`; `print` it for the table: per parameter and place the primitive, the form,
        why it is materialized where it is, the FLOPs that the adapter adds, and the line.

    Example:
        >>> import jax.numpy as jnp
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> report = explain(lambda p, x: x @ p["w"], {"w": node}, jnp.ones((5, 3)))
        >>> report.materialized, report.uses[0].primitive, report.uses[0].flops
        (0, 'dot_general', 140)
    """
    sites: dict[tuple[int, str], Use] = collections.OrderedDict()
    alive = []  # an equation's identity is its address, so none may be freed meanwhile

    def observe(eqn: Any, use: Use) -> None:
        alive.append(eqn)
        sites.setdefault((id(eqn), use.name), use)

    settings = Settings(observe=observe)
    leaves, tree = jax.tree.flatten(((params, *args), kwargs))
    dynamic = [k for k, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def run(*arrays: Any) -> None:
        filled = list(leaves)
        for k, x in zip(dynamic, arrays, strict=True):
            filled[k] = x
        call(fn, settings, None, *tree.unflatten(filled))

    jax.eval_shape(run, *(leaves[k] for k in dynamic))
    given = ((params, *args), kwargs)
    pairs = jax.tree_util.tree_leaves_with_path(given, is_leaf=is_leaf)
    names = argument_paths(pairs, given)
    adapted = [p for p, (_, x) in zip(names, pairs, strict=True) if isinstance(x, LoraArray)]
    order = {name: k for k, name in enumerate(adapted)}
    uses = sorted(sites.values(), key=lambda use: order[use.name])
    seen = {use.name for use in uses}
    return Explanation(tuple(uses), tuple(p for p in adapted if p not in seen))
