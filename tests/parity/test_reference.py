"""The reference pair, live: a 768→768 linear layer, and the same plus the textbook `LoRALayer`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jlora

WIDTH, RANK, ALPHA, BATCH = 768, 8, 1, 32


class LoRALayer(torch.nn.Module):
    def __init__(self, d_in: int, d_out: int, rank: int = 4, alpha: float = 1) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.empty(d_in, rank))
        self.lora_B = torch.nn.Parameter(torch.zeros(rank, d_out))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.lora_A @ self.lora_B) * self.scaling


class LinearWithLoRA(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.lora(x)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def linear(params, x):
    return x @ params["kernel"] + params["bias"][None]


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def pair(b_is_zero: bool):
    """The torch module, and jlora's parameters with the same values."""
    torch.manual_seed(0)
    module = LinearWithLoRA(torch.nn.Linear(WIDTH, WIDTH), RANK, ALPHA)
    if not b_is_zero:
        torch.nn.init.normal_(module.lora.lora_B, std=0.1)
    base = {
        "kernel": jnp.asarray(numpy(module.linear.weight).T),
        "bias": jnp.asarray(numpy(module.linear.bias)),
    }
    spec = jlora.LoraSpec(RANK, ALPHA, init=jlora.initializers.kaiming_rank)
    params = jlora.attach(base, {"kernel": spec}, key=jax.random.key(0))
    node = params["kernel"]
    a, b = jnp.asarray(numpy(module.lora.lora_A)), jnp.asarray(numpy(module.lora.lora_B))
    assert node.lora_a.shape == a.shape and node.lora_b.shape == b.shape
    node = jlora.LoraArray(node.base, a, b, node.scaling, node.layout)
    return module, {**params, "kernel": node}


def batches(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (
            rng.normal(size=(BATCH, WIDTH)).astype(np.float32),
            rng.normal(size=(BATCH, WIDTH)).astype(np.float32),
        )
        for _ in range(n)
    ]


def test_outputs_and_gradients(compare):
    module, params = pair(b_is_zero=False)
    (x, y), apply = batches(1)[0], jlora.lora(linear, fallback="error")
    tx = torch.tensor(x, requires_grad=True)
    out = module(tx)
    ((out - torch.tensor(y)) ** 2).mean().backward()
    trainable, frozen = jlora.partition(params)

    def loss(t, x):
        out = apply(jlora.combine(t, frozen), x)
        return ((out - y) ** 2).mean(), out

    (_, got), (g, gx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trainable, x)
    compare(got, numpy(out), "forward")
    compare(g["kernel"].lora_a, numpy(module.lora.lora_A.grad), "gradient of A")
    compare(g["kernel"].lora_b, numpy(module.lora.lora_B.grad), "gradient of B")
    compare(gx, numpy(tx.grad), "gradient of the input")


@pytest.mark.sample(2)
@pytest.mark.parametrize("way", ["freeze", "partition"])
def test_two_hundred_steps_of_adam(way, compare):
    module, params = pair(b_is_zero=True)
    weight = np.asarray(params["kernel"].base)
    data = batches(200)
    optimizer = torch.optim.Adam(module.lora.parameters(), lr=1e-3)
    for x, y in data:
        optimizer.zero_grad()
        ((module(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()
        optimizer.step()

    apply = jlora.lora(linear, fallback="error")
    frozen = jlora.partition(params)[1]
    tx = jlora.freeze(optax.adam(1e-3)) if way == "freeze" else optax.adam(1e-3)
    tree = params if way == "freeze" else jlora.partition(params)[0]

    def loss(tree, x, y):
        whole = tree if way == "freeze" else jlora.combine(tree, frozen)
        return ((apply(whole, x) - y) ** 2).mean()

    @jax.jit
    def step(tree, state, x, y):
        updates, state = tx.update(jax.grad(loss)(tree, x, y), state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(tree)
    for x, y in data:
        tree, state = step(tree, state, x, y)
    params = tree if way == "freeze" else jlora.combine(tree, frozen)
    compare(params["kernel"].lora_a, numpy(module.lora.lora_A), "A")
    compare(params["kernel"].lora_b, numpy(module.lora.lora_B), "B")
    assert np.array_equal(weight, np.asarray(params["kernel"].base))
    assert np.array_equal(weight, numpy(module.linear.weight).T)
    x = data[0][0]
    compare(apply(params, x), numpy(module(torch.tensor(x))), "forward after training")


@pytest.mark.parametrize(
    ("init", "shape"),
    [
        (jlora.initializers.kaiming_rank, (WIDTH, RANK)),  # as the reference layer stores A
        (jlora.initializers.kaiming, (RANK, WIDTH)),  # as PEFT stores A
    ],
    ids=["reference", "peft"],
)
def test_the_initializers_are_pytorchs(init, shape):
    theirs = torch.empty(64, *shape)
    for piece in theirs:
        torch.nn.init.kaiming_uniform_(piece, a=math.sqrt(5))
    keys = jax.random.split(jax.random.key(0), 64)
    weight = jnp.zeros((WIDTH, WIDTH))
    ours, b = jax.vmap(lambda key: init(key, weight, RANK))(keys)
    assert not b.any()
    bound = 1 / math.sqrt(shape[1])
    assert bound * 0.999 < float(jnp.abs(ours).max()) <= bound
    assert bound * 0.999 < float(theirs.abs().max()) <= bound * (1 + 1e-6)
    assert float(ours.var()) == pytest.approx(float(theirs.var()), rel=0.01)
    assert float(ours.mean()) == pytest.approx(0, abs=bound * 0.01)
