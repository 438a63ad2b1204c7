"""Functions of a node of any form: its parts, gain and weight, and validation."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora._arrays import Geometry, LoraArray, Tied
from jlora._base import built
from jlora._paths import describe
from jlora.forms import dora
from jlora.forms._factors import delta, shapes
from jlora.forms._form import Form, Part, check_node, named


def of(node: LoraArray) -> Form:
    """Return a node's form.

    Args:
        node: a node of a registered form.

    Returns:
        The form.

    Raises:
        ValueError: the form is not registered.

    Example:
        >>> of(LoraArray(None, None, None, None, "io")).name
        'lora'
    """
    check_node(node, "jlora.forms.of(node)")
    return named(node.form, f"LoraArray(..., form={node.form!r})")


def has_gain(node: LoraArray) -> bool:
    """Whether the weight is the sum times a gain per output, as in DoRA.

    Args:
        node: a node of any form.

    Returns:
        A bool.

    Example:
        >>> has_gain(LoraArray(None, None, None, None, "io"))
        False
    """
    check_node(node, "jlora.forms.has_gain(node)")
    return dora.MAGNITUDE in node.extra


def parts(node: LoraArray) -> dict[str, Part]:
    """Return the descriptions of all parts of a node's update, by name.

    Args:
        node: a node of any form.

    Returns:
        A mapping with "lora_a", "lora_b" and the names in `extra`.

    Example:
        >>> node = LoraArray(None, None, None, None, "io")
        >>> {name: part.axes for name, part in parts(node).items()}
        {'lora_a': 'si r', 'lora_b': 's r o'}
    """
    check_node(node, "jlora.forms.parts(node)")
    return {**of(node).parts, **(dora.PARTS if has_gain(node) else {})}


def begun(node: LoraArray, with_dora: bool, dtype: DTypeLike) -> LoraArray:
    """Add the other parts of the form to a node that has A and B, with their initial values.

    Args:
        node: a node with base, A and B.
        with_dora: whether to add DoRA's magnitude.
        dtype: the dtype of the parts.

    Returns:
        A node with all its parts.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io")
        >>> begun(node, True, jnp.float32).extra["magnitude"].shape
        (4,)
    """
    check_node(node, "jlora.forms.begun(node, ...)")
    more = {**of(node).extra, **(dora.PARTS if with_dora else {})}
    want = shapes(more, Geometry.of(node.shape, node.layout), node.rank)
    for name, part in more.items():
        node = node.with_parts({name: part.begin(node, want[name], dtype)})
    return node


def gain(node: LoraArray) -> Float[Array, "..."] | None:
    """Return the factor of each output; None for a node without gain.

    Args:
        node: a node of any form, with its base.

    Returns:
        `(*stack, *out_dims)`, in float32 or wider.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io")
        >>> gain(node) is None, gain(begun(node, True, jnp.float32)).round(4).tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """
    check_node(node, "jlora.forms.gain(node)")
    return dora.gain(node) if has_gain(node) else None


def weight(node: LoraArray) -> Float[Array, "..."]:
    """Build the weight: base plus update, times the gain.

    Args:
        node: a node of any form, with its base.

    Returns:
        An array of the base's shape, in float32 or wider.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io")
        >>> weight(node)[0, 0].item()
        2.0
    """
    check_node(node, "jlora.forms.weight(node)")
    update = delta(node, node.shape, node.dtype)
    summed = built(node.base).astype(update.dtype) + update
    by = gain(node)
    return summed if by is None else summed * Geometry.of(node.shape, node.layout).across(by)


def base_of(merged: Array, node: LoraArray) -> Float[Array, "..."]:
    """Return the base whose merged weight is `merged`, in float32 or wider.

    `W' / g - s · A B`, with the gain of `node`. An output with gain 0 gets the base of `node`.

    Args:
        merged: the merged weight.
        node: the update; its base is read only if it has a gain.

    Returns:
        An array of the weight's shape.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io")
        >>> base_of(weight(node), node)[0, 0].item()
        1.0
    """
    check_node(node, "jlora.forms.base_of(merged, node)")
    update = delta(node, merged.shape, merged.dtype)
    wide = merged.astype(update.dtype)
    by = gain(node)
    if by is None:
        return wide - update
    by = Geometry.of(node.shape, node.layout).across(by).astype(update.dtype)
    lost = by == 0
    return jnp.where(
        lost, built(node.base).astype(update.dtype), wide / jnp.where(lost, 1.0, by) - update
    )


def check(path: str, node: LoraArray, call: str) -> None:
    """Refuse a `LoraArray` whose parts are missing or have wrong shapes.

    Args:
        path: the node's path, for the error.
        node: a node of any form.
        call: the call that error messages name.

    Returns:
        None.

    Raises:
        ValueError: a part is tied, missing, of a wrong shape, or not a part of the form.

    Example:
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5, "io")
        >>> check("w", node, "jlora.merge")
    """
    check_node(node, "jlora.forms.check(path, node, call)")
    if any(isinstance(x, Tied) for x in node.parts.values()):
        raise ValueError(
            f'`{call}`: "{path}" is tied: a part of it is another node\'s. Pass '
            "`jlora.untie(params)`, inside the function that is differentiated."
        )
    if any(x is None for x in (node.base, node.scaling, *node.parts.values())):
        raise ValueError(
            f'`{call}`: "{path}" is a part of a LoraArray (its base or its factors are missing). '
            "Combine the parts first: `jlora.bind(base, adapter)` or "
            "`jlora.combine(trainable, frozen)`."
        )
    known = parts(node)
    if set(node.parts) != set(known):
        raise ValueError(
            f"`{call}`: {describe(path, node.base)} of the form {node.form!r} has the parts "
            f"{sorted(known)}; got {sorted(node.parts)}. Pass what `jlora.attach` returned."
        )
    geometry = Geometry.of(node.shape, node.layout)
    want = shapes(known, geometry, node.rank, node.slices)
    a, b = want["lora_a"], want["lora_b"]
    if node.lora_a.shape != a or node.lora_b.shape != b:
        raise ValueError(
            f"`{call}`: {describe(path, node.base)} with layout {node.layout!r} needs lora_a {a} "
            f"and lora_b {b}; got {node.lora_a.shape} and {node.lora_b.shape}. "
            "The adapter belongs to another model, or was stacked along another axis than its base."
        )
    if jnp.shape(node.scaling) not in ((), geometry.stack):
        raise ValueError(
            f"`{call}`: {describe(path, node.base)} needs a scaling of shape () or "
            f"{geometry.stack}; got {jnp.shape(node.scaling)}."
        )
    for name, value in node.extra.items():
        if jnp.shape(value) != want[name]:
            each = ", one per output" if known[name].axes == "so" else ""
            raise ValueError(
                f"`{call}`: {describe(path, node.base)} with layout {node.layout!r} and rank "
                f"{node.rank} needs a {name} of shape {want[name]}{each}; got {jnp.shape(value)}."
            )
