"""`each`: run a batch whose examples, or tokens, use different adapters of a bank.

Three forms of one product, chosen by shape (the figures are in benchmarks/README.md):

- gather: `A[ids]`, `B[ids]`, and `vmap` over the examples. The product with W is one, because W is
  not batched; only the narrow products are batched. It costs the same for any number of slots.
- mixed: x is multiplied by the A and B of all slots, and the ranks of the others are masked. With
  few tokens each, a gather reads more than that. It is exact, but a slot with a NaN shows.
- scaled: for mixing weights where an operation has no mixed form, such as a convolution: one B for
  each example, with the weights in it.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from jlora import _compat
from jlora._arrays import FullArray, is_adapted
from jlora._check import check_function
from jlora._paths import leaves_with_paths
from jlora.bank._batch import Batch, check_axes
from jlora.bank._joined import joined, of_weights
from jlora.bank._slots import Bank, bound, checked
from jlora.transform._lora import Options, call, options_of
from jlora.transform._mixed import Mix, Unmixed, settings_of
from jlora.transform._walk import Settings

# Up to this many slots, and below this many tokens an example, all slots are multiplied at once.
MOST_SLOTS, FEWEST_TOKENS = 16, 8
_CALL = "jlora.bank.each(fn, base, bank, ids, ...)"


def each(
    fn: Callable[..., Any],
    base: PyTree,
    bank: Bank,
    ids: ArrayLike | Sequence[int] | None,
    *args: PyTree,
    weights: ArrayLike | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    **kwargs: PyTree,
) -> PyTree:
    """Call a function on a batch in which every example has its own adapter.

    `y[k:k+1] = lora(fn)(bind(base, pick(bank, ids[k])), x[k:k+1])`, as one program: `fn` sees a
    batch of one example, and its results are concatenated. Changing `ids`, alphas or the adapter in
    a slot recompiles nothing. Gradients reach the bank and the arguments, not the base; a slot that
    no example uses has a gradient of 0.

    With `ids` of shape `(batch, tokens)`, or `weights` of `(batch, tokens, slots)`, every token of
    a packed batch has its own. `fn` is then called once on the batch; all adapted weights must be
    used in matrix products whose activation begins with the axes `(batch, tokens)`, and DoRA and
    parameters trained in full are not supported.

    Call it inside `jax.jit`: outside of it, inner jitted functions of `fn` may compile again.

    Args:
        fn: `fn(params, *args, **kwargs)` for a batch, such as a Flax `module.apply`. For dropout
            pass `jlora.lora(fn, dropout=..., key=step_key)`: each example draws from a key of its
            own.
        base: plain parameters.
        bank: adapters, from `stack`.
        ids: integers, `(batch,)`: the slot of each example, and -1 for the base alone. An id out of
            range is an error if its value is known, and the base alone if it is traced.
        *args: the other arguments of `fn`. Scalars and leaves that are no arrays are shared.
        weights: in place of `ids` (None), `(batch, slots)`: a mixture of all adapters, whose update
            is `Σ_n weights[k, n] · s[n] · A[n] B[n]`.
        in_axes: the axis of the examples in each of `args`, as in `jax.vmap`; None for what they
            share: masks, positions, the slot of a cache.
        out_axes: the axis along which results are concatenated, as in `jax.vmap`; None for a result
            that is the same for all. A scalar result gets an axis of examples.
        **kwargs: keyword arguments of `fn`, shared by the examples.

    Returns:
        What `fn` returns for the batch.

    Raises:
        TypeError: `fn` is not a function, `bank` not a bank, or an axis no integer.
        ValueError: `ids` or `weights` have a wrong shape or dtype, or an id is out of range; an
            argument has another number of examples; the bank has other paths or shapes than the
            base; with ids of tokens or with weights, something that they do not support.

    Example:
        >>> from jlora import LoraSpec, attach, detach
        >>> from jlora.bank import stack
        >>> params = attach({"w": jnp.ones((4, 6))}, {"w": LoraSpec(2)}, key=jax.random.key(0))
        >>> base, adapter = detach(params)
        >>> bank = stack([adapter, adapter], slots=8)
        >>> each(lambda p, x: x @ p["w"], base, bank, [0, 1, -1], jnp.ones((3, 5, 4))).shape
        (3, 5, 6)

    Reference: Punica's BGMV, Chen et al. 2023, arXiv:2310.18547. PEFT's `adapter_names=`.
    """
    check_function(fn, _CALL)
    checked(base, bank, _CALL)
    check_axes(out_axes, "out_axes", _CALL)
    program = _Program.of(fn, (bank, ids, args, kwargs))
    chosen = _ids(ids, bank) if weights is None else _weights(weights, ids, bank)
    mixing = chosen if weights is not None else _one_hot(chosen, bank.slots)
    if mixing.ndim == 3:
        return _by_token(program, base, bank, mixing, args, kwargs)
    batch = Batch.of(args, in_axes, chosen.shape[0], _CALL)

    def gathered(number: Array, slot: Array, args: Any) -> Any:
        return program(bound(base, _taken(bank, slot), _CALL), args, kwargs, number)

    if weights is None and not (program.freezes and _few(bank, chosen, batch)):
        return batch.map(gathered, chosen, out_axes)
    nodes = joined(base, bank, _CALL)

    def mixed(number: Array, m: Array, args: Any) -> Any:
        params = of_weights(nodes, base, bank, m)
        most = FEWEST_TOKENS - 1 if weights is None else None
        return program(params, args, kwargs, number, Mix(m, most))

    def scaled(number: Array, m: Array, args: Any) -> Any:
        return program(of_weights(nodes, base, bank, m, scale=True), args, kwargs, number)

    try:
        return batch.map(mixed, mixing, out_axes)
    except Unmixed:
        one, by = (gathered, chosen) if weights is None else (scaled, mixing)
        return batch.map(one, by, out_axes)


def _by_token(
    program: "_Program", base: PyTree, bank: Bank, mixing: Array, args: Any, kwargs: Any
) -> Any:
    """Call the function once, on all tokens."""
    full = [p for p, x in leaves_with_paths(bank.adapter, is_adapted) if isinstance(x, FullArray)]
    refused = [*full, *bank.gains]
    if refused:
        raise ValueError(
            f'`{_CALL}`: "{refused[0]}" is trained in full or has a magnitude (DoRA), and tokens '
            "of one example cannot have different ones. Give one id for each example."
        )
    try:
        return program(joined(base, bank, _CALL), args, kwargs, jnp.int32(0), Mix(mixing))
    except Unmixed as error:
        raise ValueError(
            f"`{_CALL}`: with one id for each token, adapted weights are used in products only, "
            f"with activations of the axes {list(mixing.shape[:2])} and others; there is {error}. "
            "Give one id for each example, or leave that weight out of the adapters."
        ) from None


def _one_hot(ids: Array, slots: int) -> Array:
    of_slots = jnp.arange(slots, dtype=ids.dtype).reshape(*(1,) * ids.ndim, slots)
    return (ids[..., None] == of_slots).astype(jnp.float32)


def _taken(bank: Bank, slot: Array) -> Bank:
    """Return one slot; zeros, which is the base alone, for -1 and out of range."""
    at = jnp.where((slot >= 0) & (slot < bank.slots), slot, bank.slots)
    return jax.tree.map(lambda x: x.at[at].get(mode="fill", fill_value=0), bank)


def _few(bank: Bank, ids: Array, batch: Batch) -> bool:
    """Whether to try the mixed form; a product with too many tokens then refuses it.

    Not outside of `jax.jit`, where a call would compile inner jitted functions again.
    """
    traced = any(map(_compat.is_traced, [ids, *jax.tree.leaves((bank, batch.leaves))]))
    small = bank.slots <= MOST_SLOTS and batch.tokens < FEWEST_TOKENS
    return traced and small and not bank.gains


class _Program(NamedTuple):
    """The function, and how `jlora.lora` was told to transform it."""

    fn: Callable[..., Any]
    options: Options | None  # None: `fn` takes adapted parameters, and wraps what `lora` returned

    @property
    def freezes(self) -> bool:
        """Whether what does not train is a constant, as the mixed form makes it."""
        return self.options is not None and self.options.freeze

    @classmethod
    def of(cls, fn: Callable[..., Any], arguments: PyTree) -> "_Program":
        found = options_of(fn)
        if found is not None:  # the key is taken once, however often the function is traced
            key = None if found.key is None else found.key.take(arguments)
            return cls(found.fn, found._replace(key=key))
        inner = _wrapped(fn)
        if inner is None:
            return cls(fn, Options(fn, fn, _settings(fn), None, True))
        if inner.key is not None:
            raise ValueError(
                f"`{_CALL}`: fn wraps a `jlora.lora(..., dropout=)`, whose key would be the same "
                "for all examples. Pass what `jlora.lora` returned, and wrap `each` instead."
            )
        return cls(fn, None)

    def __call__(
        self, params: PyTree, args: Any, kwargs: Any, number: Array, mix: Mix | None = None
    ) -> Any:
        if self.options is None:
            if mix is not None:
                mix.refuse("a function that wraps `jlora.lora`")
            return self.fn(params, *args, **kwargs)
        _, fn, settings, key, freeze = self.options
        key = None if key is None else jax.random.fold_in(key, number)
        settings = settings if mix is None else settings_of(settings, mix)
        return call(fn, settings, key, (params, *args), kwargs, freeze)


def _wrapped(fn: Any) -> Options | None:
    """Return the options of the `jlora.lora` that a `jax.jit` or `functools.partial` wraps."""
    while fn is not None:
        found = options_of(fn)
        if found is not None:
            return found
        fn = getattr(fn, "__wrapped__", getattr(fn, "func", None))
    return None


# Settings are kept between calls with one function: inner jitted functions are compiled in them.
_KEPT: weakref.WeakKeyDictionary[Any, Settings] = weakref.WeakKeyDictionary()


def _settings(fn: Any) -> Settings:
    try:
        return _KEPT.setdefault(getattr(fn, "__self__", fn), Settings())
    except TypeError:  # not hashable, or without weak references
        return Settings()


def _ids(ids: Any, bank: Bank) -> Any:
    """Return ids as an array; refuse a wrong shape or dtype, and known ids out of range."""
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim not in (1, 2):
        raise ValueError(
            f"`{_CALL}`: ids are integers, (batch,) or (batch, tokens); got "
            f"{ids.dtype}{list(ids.shape)}."
        )
    if _compat.is_traced(ids):
        return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    known = np.asarray(ids)
    wrong = known[(known < -1) | (known >= bank.slots)]
    if wrong.size:
        raise ValueError(
            f"`{_CALL}`: there is no slot {wrong[0]}; the bank has the slots 0 to "
            f"{bank.slots - 1}, and -1 is the base alone."
        )
    return jnp.asarray(known.astype(np.int32))


def _weights(weights: Any, ids: Any, bank: Bank) -> Array:
    """Return mixing weights; refuse a wrong shape, and a bank that has no mixture."""
    if not isinstance(weights, jax.Array):
        weights = np.asarray(weights)
    if ids is not None:
        raise ValueError(f"`{_CALL}`: with `weights=`, ids must be None.")
    if (
        weights.dtype == object
        or not jnp.issubdtype(weights.dtype, jnp.floating)
        or weights.ndim not in (2, 3)
        or weights.shape[-1] != bank.slots
    ):
        raise ValueError(
            f"`{_CALL}`: weights are floats, (batch, {bank.slots}) or (batch, tokens, "
            f"{bank.slots}), one for each slot; got {weights.dtype}{list(weights.shape)}."
        )
    if bank.gains:
        raise ValueError(
            f'`{_CALL}`: "{next(iter(bank.gains))}" has a magnitude (DoRA) in some slot, and a '
            "mixture of magnitudes is not defined. Use `ids`."
        )
    return jnp.asarray(weights)
