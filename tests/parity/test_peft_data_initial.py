"""PEFT live: first values from data, EVA, CorDA and LoRA-GA, on one batch and from one gradient.

Where PEFT 0.21.2 differs from the paper, or from itself, both numbers stand here:

| what | PEFT | paper, and jlora |
|---|---|---|
| LoRA-GA, scale "stable" | A is not scaled, B by `c S` | both by c; `scale="peft"` is PEFT's |
| LoRA-GA, `Conv1D`, scale "stable" | `c = in^¼ / √γ` | `c = out^¼ / √γ` |
| CorDA, several batches | each divided by its largest element first | every input counts alike |
"""

import dataclasses
import importlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import decaying, nodes, quiet
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from twins import Twin, conv1d_hf, linear, mlp

import jlora
from jlora import LoraSpec
from jlora.initializers import corda, eva, lora_ga

# PEFT's file takes `dataclass` from attrs, which PEFT does not ask for.
sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # type: ignore
preprocess_corda = importlib.import_module("peft.tuners.lora.corda").preprocess_corda

RANK, ALPHA = 2, 3.0
twins = pytest.mark.parametrize("twin", [linear, conv1d_hf, mlp], ids=repr)


def inputs(twin: Twin, rows: int = 60) -> np.ndarray:
    """Inputs whose spectrum falls, off the origin; where there are sequences, of one."""
    *lead, wide = twin.x(np.random.default_rng(0)).shape
    x = (
        np.random.default_rng(1).normal(size=(*[1] * (len(lead) - 1), rows, wide))
        * 0.8 ** np.arange(wide)
        + 0.2
    )
    return x.astype(np.float32)


def ours(twin: Twin, **spec: Any) -> tuple[Any, Any]:
    base = twin.params(decaying(twin))
    rules = {rf".*({'|'.join(twin.targets)})/kernel": LoraSpec(RANK, alpha=ALPHA, **spec)}
    return base, jlora.attach(base, rules, key=jax.random.key(0))


def config(twin: Twin, init: str, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(twin.targets),
        init_lora_weights=init,
        **twin.config,
        **more,
    )


def matched(twin: Twin, params: Any, model: Any) -> Any:
    """Each node beside PEFT's layer: the path, the node, A, B and the base of the layer."""
    layers = dict(model.base_model.model.named_modules())
    for path, node in nodes(params).items():
        name, turn = twin.moves[path]
        layer = layers[name.removesuffix(".weight")]
        a, b = (x["default"].weight.detach().numpy().T for x in (layer.lora_A, layer.lora_B))
        yield path, node, a, b, turn(layer.base_layer.weight.detach().numpy())


def the_same(twin: Twin, params: Any, model: Any, compare: Any, most: float = 1e-5) -> None:
    for path, node, a, b, base in matched(twin, params, model):
        compare(node.lora_a @ node.lora_b, a @ b, f"A · B of {path}", most)
        compare(node.base, base, f"residual of {path}", most)


@pytest.mark.sample(8)
@twins
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda(twin, method, compare):
    module, x = decaying(twin), inputs(twin)
    theirs = config(twin, "corda", corda_config=CordaConfig(corda_method=method))
    quiet(preprocess_corda, module, theirs, run_model=lambda: module(torch.tensor(x)))
    model = quiet(peft.get_peft_model, module, theirs)
    _, params = ours(twin)
    begun = corda(params, jlora.capture(twin.fn, params, x), method=method)
    # The inputs of the second layer are nearly dependent, and its residual is a small rest of W:
    # C⁻¹, the SVD and the difference lose a digit in float32, here and there.
    the_same(twin, begun, model, compare, 1e-4 if twin is mlp else 1e-5)


def test_corda_of_several_batches(compare):
    """The second batch, ten times the first, weighs as much as that in PEFT."""
    x = inputs(linear)
    batches = [x, 10.0 * x[:, ::-1, ::-1].copy()]
    module, theirs = decaying(linear), config(linear, "corda", corda_config=CordaConfig())

    def run() -> None:
        for batch in batches:
            module(torch.tensor(batch))

    quiet(preprocess_corda, module, theirs, run_model=run)
    model = quiet(peft.get_peft_model, module, theirs)
    _, params = ours(linear)

    def begun(*batches: Any) -> Any:
        seen = [jlora.capture(linear.fn, params, batch) for batch in batches]
        return corda(params, jax.tree.map(lambda *xs: sum(xs), *seen))

    the_same(linear, begun(*(b / abs(b.max()) for b in batches)), model, compare)
    ((_, node, a, b, _),) = matched(linear, begun(*batches), model)
    apart = np.linalg.norm(node.lora_a @ node.lora_b - a @ b) / np.linalg.norm(a @ b)
    print(f"A · B of two batches, PEFT's weights and equal ones: {apart:.2f} apart")
    assert apart > 0.1


def gradient_of(twin: Twin, module: Any, x: np.ndarray) -> Any:
    """The gradient of a loss by both, which hold each other."""
    base = twin.params(module)
    return jax.grad(lambda p: jnp.square(twin.fn(p, x)).mean())(base)


def begun_in_peft(twin: Twin, x: np.ndarray, **more: Any) -> Any:
    module = decaying(twin)
    theirs = config(twin, "lora_ga", lora_ga_config=peft.LoraGAConfig(**more))
    step = lambda: module(torch.tensor(x)).square().mean().backward()
    quiet(preprocess_loraga, module, theirs, step)
    return quiet(peft.get_peft_model, module, theirs)


@pytest.mark.nightly
@pytest.mark.parametrize("twin", [linear, mlp], ids=repr)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(twin, direction, compare):
    x = inputs(twin)
    model = begun_in_peft(twin, x, direction=direction)
    _, params = ours(twin)
    slopes = gradient_of(twin, decaying(twin), x)
    begun = lora_ga(params, slopes, direction=direction, scale="peft")
    most = 5e-5 if twin is mlp else 1e-5  # PEFT's decomposition is a randomized one
    for path, node, a, b, rest in matched(twin, begun, model):
        # A and B have the vectors of different singular values, whose signs are free of each other.
        compare(node.lora_a * signs(node.lora_a, a), a, f"A of {path}", most)
        compare(node.lora_b * signs(node.lora_b.T, b.T).T, b, f"B of {path}", most)
        s = float(node.scaling)
        compare(node.base + s * node.lora_a @ node.lora_b, rest + s * a @ b, f"{path} as it was")


def signs(got: Any, want: Any) -> np.ndarray:
    """How the columns of one are turned to the other's, `(1, columns)`."""
    return np.sign((np.asarray(got) * want).sum(0, keepdims=True))


def test_lora_ga_of_the_paper():
    """c = out^¼/√γ on both sides; PEFT leaves A as it is and has the gradient's size in B."""
    x = inputs(linear)
    _, params = ours(linear)
    node = lora_ga(params, gradient_of(linear, decaying(linear), x))["layer"]["kernel"]
    ((_, _, a, b, _),) = matched(linear, params, begun_in_peft(linear, x))
    c = 7**0.25 / 4
    sizes = [np.linalg.norm(x) / RANK**0.5 for x in (node.lora_a, node.lora_b.T, a, b.T)]
    print("sizes of A and B: paper {:.3f} {:.3f}, PEFT {:.3f} {:.6f}".format(*sizes))
    assert sizes[:3] == pytest.approx([c, c, 1.0], rel=1e-4) and sizes[3] < c / 2


def test_lora_ga_of_a_conv1d(compare):
    """PEFT reads `weight.shape[0]` for the outputs, which a Conv1D has last."""
    x = inputs(conv1d_hf)
    model = begun_in_peft(conv1d_hf, x)
    _, params = ours(conv1d_hf)
    slopes = gradient_of(conv1d_hf, decaying(conv1d_hf), x)
    node = lora_ga(params, slopes, scale="peft")["layer"]["kernel"]
    ((path, _, a, b, _),) = matched(conv1d_hf, params, model)
    compare(node.lora_a * signs(node.lora_a, a), a, f"A of {path}")
    turned = node.lora_b * signs(node.lora_b.T, b.T).T
    compare((13 / 7) ** 0.25 * turned, b, f"B of {path}")


class Trunk(torch.nn.Module):
    """Layers of unlike inputs, one pair of them sharing theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = (torch.nn.Linear(24, 24) for _ in range(2))
        self.up, self.down = torch.nn.Linear(24, 32), torch.nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + torch.tanh(self.q(x)) * self.k(x)
        return self.down(torch.relu(self.up(h)))


def trunk(p: Any, x: Any) -> Any:
    def layer(name: str, x: Any) -> Any:
        return x @ p[name]["kernel"] + p[name]["bias"][None]

    h = x + jnp.tanh(layer("q", x)) * layer("k", x)
    return layer("down", jax.nn.relu(layer("up", h)))


def tree(module: Trunk) -> Any:
    return {
        name: {
            "kernel": jnp.asarray(m.weight.detach().numpy().T),
            "bias": jnp.asarray(m.bias.detach().numpy()),
        }
        for name, m in module.named_children()
    }


@pytest.mark.nightly
@pytest.mark.parametrize("rho", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("adjust", [True, False], ids=["adjusted", "alpha"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_eva(rho, adjust, rslora, compare):
    """The same ranks and scalings, and A spans the same; signs of its columns are free."""
    rank, module = 4, Trunk()
    x = np.random.default_rng(0).normal(size=(256, 24)) * 0.6 ** np.arange(24) + 0.3
    x = x.astype(np.float32)
    theirs = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        use_rslora=rslora,
        target_modules=["q", "k", "up", "down"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, adjust_scaling_factors=adjust, tau=0.9999),
    )
    model = quiet(peft.get_peft_model, module, theirs)
    found = quiet(
        get_eva_state_dict,
        model,
        [torch.tensor(x)] * 2,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    quiet(initialize_lora_eva_weights, model, eva_state_dict=dict(found))
    base = tree(Trunk())
    spec = LoraSpec(rank, alpha=ALPHA, scaling="rslora" if rslora else "lora")
    order = ["q", "k", "up", "down"]  # equal shares go to the first; PEFT's is the modules' order
    params = jlora.attach(base, {r".*kernel": spec}, key=jax.random.key(0))
    moments = jlora.capture(trunk, params, x)
    begun = eva(params, moments, rho=rho, adjust_scaling=adjust, rslora=rslora)
    layers = dict(model.base_model.model.named_modules())
    ranks = {name: begun[name]["kernel"].rank for name in order}
    print(ranks)
    assert sum(ranks.values()) == 4 * rank and (rho == 1.0 or len(set(ranks.values())) > 1)
    theirs_by_name = {name: layers[name].r["default"] for name in order}
    assert sorted((ranks["q"], ranks["k"])) == sorted((theirs_by_name["q"], theirs_by_name["k"]))
    for name in order:
        node, layer = begun[name]["kernel"], layers[name]
        if name in ("up", "down") or ranks["q"] == ranks["k"]:
            assert node.rank == theirs_by_name[name]
            assert float(node.scaling) == pytest.approx(layer.scaling["default"])
            a = layer.lora_A["default"].weight.detach().numpy().T
            compare(node.lora_a @ node.lora_a.T, a @ a.T, f"the span of A of {name}", 1e-4)
        assert not node.lora_b.any() and not node.residual
