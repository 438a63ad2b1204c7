"""Several active adapters of PEFT's on a twin, and the same here."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import peft
import torch
from live import adapt, compare_slopes, load, plain, quiet, randomize, save, slopes_of
from twins import Params, Twin

import jlora.peft


def together(adapters: list[Any]) -> Any:
    """One adapter that is the sum of several: A and B side by side, the scalings folded into B."""

    def join(*nodes: Any) -> Any:
        if not isinstance(nodes[0], jlora.LoraArray):
            return nodes[0]
        nodes = [n if n.slices is None else jlora.forms.as_lora(n) for n in nodes]
        first = nodes[0]
        rank_axis = first.lora_b.ndim - first.layout.count("o") - 1
        b = [
            n.lora_b
            * jnp.asarray(n.scaling).reshape(
                *n.scaling.shape, *(1,) * (n.lora_b.ndim - n.scaling.ndim)
            )
            for n in nodes
        ]
        return dataclasses.replace(
            first,
            lora_a=jnp.concatenate([n.lora_a for n in nodes], -1),
            lora_b=jnp.concatenate(b, rank_axis),
            scaling=jnp.ones_like(first.scaling),
        )

    return jax.tree.map(join, *adapters, is_leaf=jlora._arrays.is_adapted)


def slopes_of_several(
    twin: Twin,
    model: Any,
    adapters: list[Any],
    fn: Callable[[list[Any], Any], Any],
    folder: Path,
    compare: Any,
) -> None:
    """`fn(adapters, x)` as PEFT's: forward, the gradients of x and of every trainable tensor.

    The second adapter is of rsLoRA.
    """
    _, _, slopes = slopes_of(twin, functools.partial(quiet, model), adapters, fn, compare)
    frozen = jlora.partition(adapters)[1]
    theirs = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, tree in zip(("default", "other"), jlora.combine(slopes, frozen), strict=True):
        rslora = {"use_rslora": name == "other"}
        ours = save(folder / f"gradients of {name}", tree, twin, **rslora)
        find = peft.get_peft_model_state_dict
        want = quiet(find, model, state_dict=theirs, adapter_name=name)
        assert set(ours) == set(want)
        # PEFT gives none to the first of a MultiheadAttention's (test_peft_differences_of_layers).
        lost = {key for key, grad in want.items() if grad is None}
        assert lost == (set(want) if twin.slopes and name == "default" else set())
        found = {key: grad for key, grad in want.items() if key not in lost}
        compare_slopes(twin, ours, found, compare, f"{name}: ")


NAMES = ("default", "other")


class Kept(torch.nn.Module):
    """A dropout that drops nothing, which PEFT does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def two(twin: Twin, folder: Any, **more: Any) -> tuple[Any, list[Any]]:
    """PEFT's model with two active DoRA adapters of other ranks and scalings, and both here."""
    model = adapt(twin, use_dora=True, **more)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=True,
        use_dora=True,
        target_modules=list(twin.targets),
        init_lora_weights=False,
        **twin.config,
        **more,
    )
    quiet(model.add_adapter, "other", config)
    quiet(model.base_model.set_adapter, list(NAMES))
    randomize(model)
    with torch.no_grad():  # a division by a gain near 0 would be all that is measured
        for key, p in model.named_parameters():
            if "magnitude" in key:
                p.add_(p.sign() / 2)
    quiet(model.save_pretrained, folder)
    base = twin.params(plain(twin))
    return model.eval(), [load(folder / ("" if n == "default" else n), base, twin) for n in NAMES]


def norm(node: Any) -> Any:
    """‖W + s · A B‖, as a magnitude begins."""

    def init(key: Any, weight: Any, rank: int, scaling: Any = 1.0, dtype: Any = None) -> Any:
        return node.lora_a.reshape(-1, rank), node.lora_b.reshape(rank, -1)

    rank = node.rank
    spec = jlora.LoraSpec(
        rank, float(node.scaling) * rank, init=init, layout=node.layout, dora=True
    )
    return jlora.attach(node.base, {"": spec}, key=jax.random.key(0)).extra["magnitude"]


def in_turn(adapters: list[Params]) -> Any:
    """Return a function that makes one adapter of two; its norms are constants, as DoRA's are."""
    (key,) = (k for k, x in adapters[0]["layer"].items() if isinstance(x, jlora.LoraArray))
    nodes = [tree["layer"][key] for tree in adapters]
    norms = [norm(node) for node in nodes]

    def factors(one: Any, other: Any) -> Any:
        narrower = other.lora_b * (norms[0] / one.extra["magnitude"])[None]
        return together([one, dataclasses.replace(other, lora_b=narrower)])

    whole = norm(factors(*nodes))

    def joined(trees: list[Params]) -> Params:
        one, other = (tree["layer"][key] for tree in trees)
        m = one.extra["magnitude"] / norms[0] * (other.extra["magnitude"] / norms[1]) * whole
        node = factors(one, other).with_parts({"magnitude": m})
        return {"layer": {**trees[0]["layer"], key: node}}

    return joined


def at_once(twin: Twin, adapters: list[Any], x: Any) -> Any:
    """The base's output and what each adapter adds to it."""
    base = jlora.detach(adapters[0])[0]
    y = twin.fn(base, x)
    apply = jlora.lora(twin.fn, fallback="error")
    return y + sum(apply(tree, x) - y for tree in adapters)
