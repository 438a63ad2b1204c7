"""A bank: adapters padded to one rank and stacked, with the rank of each slot."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora import _compat, forms
from jlora._adapt import detach, same_paths
from jlora._adapters import check_adapters, is_slot, nodes_of
from jlora._arrays import FullArray, is_adapted
from jlora._base import built, is_stored
from jlora._boxes import leaves_with_paths, map_with_paths, unboxed
from jlora._check_values import check_integer
from jlora._partition import has_adapted
from jlora._paths import brief, describe
from jlora.bank._fit import fitted, module, resized, template, without_gain
from jlora.forms.dora import MAGNITUDE


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("adapter", "ranks", "gains"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """Hold adapters in slots. The first axis of every leaf is the slots.

    All leaves are floating-point arrays, so that `jax.grad` accepts a bank. `jlora.labels` and
    `jlora.partition` tell which of them train.

    Attributes:
        adapter: an adapter whose leaves are stacked; `None` for weights that no slot adapts.
        ranks: by path, the rank of each slot before padding, `(slots,)`; 0 where a slot does not
            adapt the weight, and 1 for a parameter that it trains in full.
        gains: by path, 1 where a slot has DoRA's magnitude, `(slots,)`; only where some slot has.
    """

    adapter: PyTree
    ranks: Mapping[str, Any]
    gains: Mapping[str, Any]

    @property
    def slots(self) -> int:
        """The number of slots."""
        return next(iter(self.ranks.values())).shape[0]


def check_bank(bank: object, call: str, argument: str = "bank") -> None:
    """Refuse anything but a bank."""
    if not isinstance(bank, Bank):
        raise TypeError(
            f"`{call}`: `{argument}` is {brief(bank)}. Pass a bank: "
            "`jlora.bank.stack([adapter, ...])`."
        )
    if not (isinstance(bank.ranks, Mapping) and isinstance(bank.gains, Mapping)):
        raise TypeError(
            f"`{call}`: `{argument}` has the ranks {brief(bank.ranks)} and the gains "
            f"{brief(bank.gains)}. Let `jlora.bank.stack([adapter, ...])` build the bank."
        )


def stack(adapters: Sequence[PyTree], slots: int | None = None, rank: int | None = None) -> Bank:
    """Stack adapters of one base model in slots; smaller ranks are padded with zeros.

    Each slot keeps its own scaling. Adapters may differ in rank, alpha, DoRA and in the weights
    that they adapt; a weight must have one form and layout in all of them.

    Args:
        adapters: from `jlora.detach`; of adapted parameters the base is left out.
        slots: the number of slots; those without an adapter change nothing. By default the number
            of adapters.
        rank: the rank of every slot; by default the largest rank of each weight.

    Returns:
        A bank.

    Raises:
        TypeError: `adapters` is not a sequence, or `slots` or `rank` not an integer.
        ValueError: there are no adapters or too few slots; a rank is above `rank`; adapters have
            different paths, shapes, forms or layouts; a node is tied, incomplete or over a
            residual.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> adapter = detach(params)[1]
        >>> bank = stack([adapter, adapter], slots=8, rank=3)
        >>> bank.slots, bank.adapter["w"].lora_a.shape
        (8, (8, 4, 3))

    Reference: vLLM's `max_loras` and `max_lora_rank`.
    """
    call = "jlora.bank.stack(adapters, slots, rank)"
    check_adapters(adapters, call)
    if slots is not None:
        check_integer(slots, call, "slots", 1)
    if rank is not None:
        check_integer(rank, call, "rank", 1)
    slots = len(adapters) if slots is None else slots
    if slots < len(adapters):
        raise ValueError(f"`{call}`: {len(adapters)} adapters do not fit in {slots} slots.")
    detached = [_detached(adapter) for adapter in adapters]
    for n, adapter in enumerate(detached):
        same_paths(detached[0], adapter, f"{call}, adapters[0] and adapters[{n}]")
    found = [nodes_of(adapter, f"{call}, adapters[{n}]") for n, adapter in enumerate(detached)]
    paths = [p for p, _ in leaves_with_paths(detached[0], is_slot)]
    of_path = {p: [nodes[p] for nodes in found if p in nodes] for p in paths}
    like = {p: template(nodes, rank) for p, nodes in of_path.items() if nodes}
    ones = [fitted(nodes, like, f"{call}, adapters[{n}]") for n, nodes in enumerate(found)]
    ones += [fitted({}, like, call)] * (slots - len(ones))
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(module(*leaves).stack(leaves)), *ones)
    return _bank(stacked, detached[0])


def put(bank: Bank, slot: ArrayLike, adapter: PyTree) -> Bank:
    """Return a bank with another adapter in a slot: the same shapes, so nothing recompiles.

    Args:
        bank: from `stack`; it is not changed.
        slot: the slot. If it is traced and out of range, nothing is written.
        adapter: from `jlora.detach`; of adapted parameters the base is left out.

    Returns:
        The new bank.

    Raises:
        TypeError: `bank` is not a bank.
        ValueError: the slot is out of range; the adapter has a rank above the bank's, adapts a
            weight that the bank does not, or is of another base, form or layout.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> adapter = detach(params)[1]
        >>> bank = put(stack([adapter], slots=2), 1, adapter)
        >>> bool((bank.adapter["w"].lora_a[1] == adapter["w"].lora_a).all())
        True
    """
    call = "jlora.bank.put(bank, slot, adapter)"
    check_bank(bank, call)
    at = _slot(bank, slot, call)
    detached = _detached(adapter)
    same_paths(bank.adapter, detached, call)
    like: dict[str, Any] = {
        path: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), node)
        for path, node in leaves_with_paths(bank.adapter, is_adapted)
    }
    new = _write(bank, at, _bank(fitted(nodes_of(detached, call), like, call), bank.adapter))
    return jax.tree.map(_placed, new, bank)


def pick(bank: Bank, slot: ArrayLike) -> PyTree:
    """Return the adapter in a slot, without the padding: the inverse of `put`.

    Args:
        bank: from `stack`. It must not be traced, because shapes depend on its ranks.
        slot: the slot.

    Returns:
        An adapter, as from `jlora.detach`. For an empty slot all of its leaves are `None`.

    Raises:
        TypeError: `bank` is not a bank.
        ValueError: the slot is out of range; the bank or the slot is traced.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> pick(stack([detach(params)[1]], rank=3), 0)["w"].lora_a.shape
        (4, 2)
    """
    call = "jlora.bank.pick(bank, slot)"
    check_bank(bank, call)
    if any(map(_compat.is_traced, [slot, *jax.tree.leaves(bank)])):
        raise ValueError(
            f"`{call}`: the bank or the slot is traced, and the adapter's shapes depend on the "
            "ranks in the slot. Call it outside of `jax.jit`; inside, use "
            "`jlora.bank.each(fn, base, bank, ids, ...)`."
        )
    at = int(_slot(bank, slot, call))

    def picked(path: str, node: Any) -> Any:
        rank = 0 if node is None else int(bank.ranks[path][at])
        if not rank:
            return None
        node = jax.tree.map(lambda x: x[at], node)
        if isinstance(node, FullArray):
            return node
        if path in bank.gains and not bank.gains[path][at]:
            node = without_gain(node)
        return node.with_parts({k: resized(node, k, x, rank) for k, x in node.parts.items()})

    return map_with_paths(picked, bank.adapter, is_slot)


def bind(base: PyTree, bank: Bank) -> PyTree:
    """Combine base weights and one slot of a bank, as `jlora.bind` does with an adapter.

    Args:
        base: plain parameters.
        bank: one slot: a bank whose leaves have no axis of slots, such as `jax.vmap` and
            `jax.lax.map` over a bank pass, or `jax.tree.map(lambda x: x[n], bank)`.

    Returns:
        Adapted parameters for `jlora.lora`. What the slot does not adapt equals the base.

    Raises:
        TypeError: `bank` is not a bank.
        ValueError: `base` has adapters, or other paths or shapes than the bank.

    Example:
        >>> from jlora import LoraSpec, attach, detach, lora
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> base, adapter = detach(params)
        >>> run = lambda one: lora(lambda p, x: x @ p["w"])(bind(base, one), jnp.ones((3, 4)))
        >>> jax.lax.map(run, stack([adapter, adapter])).shape
        (2, 3, 6)
    """
    return bound(base, bank, "jlora.bank.bind(base, bank)")


def bound(base: PyTree, bank: Bank, call: str) -> PyTree:
    """Return `bind(base, bank)`, whose errors name another call."""
    checked(base, bank, call)
    nodes = dict(leaves_with_paths(bank.adapter, is_adapted))

    def one(path: str, weight: Any) -> Any:
        node = nodes.get(path)
        if isinstance(node, FullArray):
            original = lax.stop_gradient(built(weight)).astype(node.dtype)
            return FullArray(weight, jnp.where(bank.ranks[path] > 0, node.value, original))
        if node is None:
            return weight
        node = dataclasses.replace(node, base=weight)
        forms.check(path, node, call)
        if path not in bank.gains:
            return node
        # The gain of a magnitude that equals the norm is 1, and the norm has no gradient.
        norm = forms.parts(node)[MAGNITUDE].begin(node, node.extra[MAGNITUDE].shape, jnp.float32)
        m = node.extra[MAGNITUDE].astype(jnp.float32)
        return node.with_parts({MAGNITUDE: jnp.where(bank.gains[path] > 0, m, norm)})

    return map_with_paths(one, base, is_weight)


def checked(base: PyTree, bank: Bank, call: str) -> None:
    """Refuse base weights with adapters, or of another model than the bank."""
    check_bank(bank, call)
    if has_adapted(base):
        raise ValueError(
            f"`{call}`: `base` has adapters of its own. Pass plain weights: "
            "`base, adapter = jlora.detach(params)`."
        )
    same_paths(base, bank.adapter, call)
    weights = dict(leaves_with_paths(base, is_weight))
    for path, node in leaves_with_paths(bank.adapter, is_adapted):
        lead = bank.ranks[path].ndim if isinstance(node, FullArray) else 0
        if isinstance(node, FullArray) and node.shape[lead:] != weights[path].shape:
            raise ValueError(
                f"`{call}`: {describe(path, weights[path])} is trained in full in the bank, with "
                f"values of shape {node.shape[lead:]}. The bank belongs to another base."
            )


def is_weight(x: object) -> bool:
    """Whether `x` is one leaf of a base: a stored weight too, or None (for `is_leaf=`)."""
    return x is None or is_stored(x)


def _detached(adapter: PyTree) -> PyTree:
    """Return an adapter without its base and Flax's boxes, whose names have no axis of slots."""
    return unboxed(detach(adapter)[1])


def _bank(stacked: tuple[Any, Any, Any], like: PyTree) -> Bank:
    nodes, ranks, gains = stacked
    return Bank(map_with_paths(lambda path, _: nodes.get(path), like, is_slot), ranks, gains)


def _slot(bank: Bank, slot: Any, call: str) -> Any:
    """Return a slot's number as an array, so that no number is compiled in."""
    if _compat.is_traced(slot):
        inside = (slot >= 0) & (slot < bank.slots)
        return jnp.where(inside, slot, bank.slots).astype(jnp.int32)
    try:
        at = operator.index(np.asarray(slot).item() if isinstance(slot, jax.Array) else slot)
    except TypeError:
        raise ValueError(f"`{call}`: slot={slot!r} is not an integer.") from None
    if isinstance(slot, bool) or not 0 <= at < bank.slots:
        raise ValueError(
            f"`{call}`: there is no slot {slot}; the bank has the slots 0 to {bank.slots - 1}. "
            "For more, stack the adapters again with `slots=`."
        )
    return np.int32(at)


@jax.jit
def _write(bank: Bank, slot: Array, one: Bank) -> Bank:
    return jax.tree.map(lambda x, new: x.at[slot].set(new, mode="drop"), bank, one)


def _placed(new: Array, old: Array) -> Array:
    """Keep the old array's sharding, for which a step was compiled."""
    if _compat.is_traced(new) or _compat.is_traced(old) or new.sharding == old.sharding:
        return new
    return jax.device_put(new, old.sharding)
