"""`freeze(tx)`: an optimizer that updates the adapter only."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jlora._check import check_optimizer, check_same
from jlora._nnx import renewed
from jlora._partition import has_adapted, labels, partition, zero


def freeze(
    tx: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it updates the adapter only: frozen leaves get zero updates.

    `optax.multi_transform({"adapter": tx, "frozen": optax.set_to_zero()}, jlora.labels)`, for trees
    of any leaves; the state is that of `tx` itself, with a `MaskedNode` at every frozen leaf.
    There is no state for frozen leaves. Not to be confused with `optax.transforms.freeze(mask)`,
    which wraps nothing and zeroes the updates of the masked leaves.

    Put everything inside, in optax's order, with `freeze` outermost:

        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.01))
        tx = optax.chain(tx, optax.ema(0.99))   # of the updates
        tx = optax.MultiSteps(tx, every_k_schedule=4)   # accumulate: clip the mean of 4 gradients
        tx = jlora.freeze(tx)

    Through `jlora.lora` the gradients of frozen leaves are zero, so gradient clipping gives the
    same numbers outside of `freeze`. Transformations that keep state for each parameter
    (`MultiSteps`, `ema`, Adam) give the same numbers outside as well, but their state then has the
    size of the model. Weight decay or noise applied after `freeze` would move the frozen weights.

    Compute gradient and update in one `jax.jit` and donate the parameters, so that XLA reuses
    their buffers.

    `nnx.Optimizer(model, jlora.freeze(tx), wrt=nnx.Param)` trains an adapted NNX module.

    Args:
        tx: an optax gradient transformation.

    Returns:
        A transformation over the complete tree of parameters, or over a detached adapter. Its
        `update` passes extra arguments on to `tx`: trees of parameters without what is frozen, and
        functions of the parameters (`value_fn` of a line search, `grad_fn` of SAM) so that they get
        complete parameters.

    Raises:
        ValueError: nothing in the tree trains (on `init`).

    Example:
        >>> from jlora import LoraArray
        >>> node = LoraArray(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, "io")
        >>> state = freeze(optax.adam(1e-3)).init({"w": node})
        >>> sum(x.size for x in jax.tree.leaves(state)) == 2 * (6 + 8) + 1
        True
    """
    check_optimizer(tx, "jlora.freeze")
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        trainable = _masked(labels(params), params)
        if not jax.tree.leaves(trainable):
            raise ValueError(
                "`jlora.freeze(tx).init(params)`: nothing in `params` trains, there is no "
                "`LoraArray` or `FullArray` in it. Attach the adapter first: `params = "
                "jlora.attach(params, rules, key=key)`."
            )
        return inner.init(trainable)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        call = "jlora.freeze(tx).update(updates, state, params)"
        like = updates if params is None else params
        check_same((updates, like), ("updates", "params"), call, "Pass the gradients of `params`.")
        words, frozen = labels(like), partition(like)[1]
        now = None if params is None else _masked(words, params)
        if params is not None:
            extra = {name: _seen(x, words, frozen) for name, x in extra.items()}
        masked = _masked(words, updates)
        state = renewed(state, lambda: jax.eval_shape(inner.init, masked))
        try:
            found, state = inner.update(masked, state, now, **extra)
        except Exception as error:
            _refuse_state(state, inner.init, _masked(words, like), call, error)
            raise
        return _unmasked(found, jax.tree.map(zero, frozen)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_state(
    state: Any, init: Callable[[PyTree], Any], params: PyTree, call: str, error: Exception
) -> None:
    """Raise if the state is that of another tree of parameters."""

    def shapes(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [jnp.shape(x) for x in leaves]

    if shapes(state) != shapes(jax.eval_shape(init, params)):
        raise ValueError(
            f"`{call}`: the state is of other parameters than `params`, or of another optimizer. "
            "Make it with `jlora.freeze(tx).init(params)`, of the tree that is passed to `update`."
        ) from error


def _masked(words: PyTree, tree: PyTree) -> PyTree:
    """Put a `MaskedNode` at every frozen leaf: not every optax transformation takes `None`."""
    return jax.tree.map(lambda word, x: x if word == "adapter" else optax.MaskedNode(), words, tree)


def _unmasked(tree: PyTree, frozen: PyTree) -> PyTree:
    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    return jax.tree.map(lambda t, f: f if is_masked(t) else t, tree, frozen, is_leaf=is_masked)


def _seen(x: Any, words: PyTree, frozen: PyTree) -> Any:
    """Return an extra argument of `update` as a transformation of the trainable leaves takes it."""
    if has_adapted(x):
        return _masked(words, x)
    if not callable(x):
        return x

    @functools.wraps(x)
    def completed(trainable: PyTree, *args: Any, **kwargs: Any) -> Any:
        out = x(_unmasked(trainable, frozen), *args, **kwargs)
        return _masked(words, out) if has_adapted(out) else out

    return completed
