"""The optimizers against PEFT's, live: the same factors after the same steps.

Where jlora means to give another answer than PEFT 0.21.2, each with both numbers:

| what | PEFT | jlora |
|---|---|---|
| LoRA+: what has one dimension (a bias, DoRA's m) | B's rate | A's rate, as in the paper |
| LoRA+: A and B of an embedding | a rate of their own, 1e-6 | as any other |
| LoRA+: `weight_decay` | ignored (`loraplus_weight_decay` is read) | the optimizer's |
| Riemannian: δ unless given | 1e-2 | 1e-6, as in its authors' code |
| Riemannian: embeddings, convolutions | left alone | preconditioned |
| LoRA-FA: the projection | in bfloat16, on any CPU too | in float32 |
| LoRA-FA: Adam's eps; its decay | beside the uncorrected root; of the new B | as in `tx` |
| LoRA-FA: DoRA of two layers | one's m is paired with the other's A: fails | works |
| LoRA-FA: a convolution | fails | works |
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft.optimizers as theirs
import pytest
import torch
from live import ALPHA, RANK, adapt, load, plain, quiet
from peft.optimizers import lorafa
from twins import Twin, conv, conv1d_hf, dense, embedding, flip, integers, linear, mlp, same

import jlora.peft
from jlora.optim import lora_fa, lora_plus, riemannian

S, LR, DECAY, STEPS = ALPHA / RANK, 1e-2, 0.05, 6
# optax has 1 - β₂ᵗ in float32, torch in float64: of the usual 0.999 that alone leaves 1e-5.
B2 = 0.99


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def wide():
    """Float64: a rounded gradient near zero is as large a step of Adam's as any, either way."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def exact(monkeypatch):
    """PEFT's LoRA-FA as on a machine without bfloat16."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)


def factors(params: Any) -> Any:
    """All that trains, by path."""
    return dict(jlora._paths.leaves_with_paths(jlora.partition(params)[0]))


class Race:
    """One layer trained in PyTorch + PEFT and here, from the same factors and on the same data."""

    def __init__(self, twin: Twin, folder: Any, double: bool = False, **config: Any) -> None:
        self.twin, self.folder, self.double = twin, folder, double
        self.model, base = adapt(twin, **config), plain(twin)
        self.x = twin.x(np.random.default_rng(0))
        if double:
            self.model, base, self.x = self.model.double(), base.double(), self.x.astype(float)
        self.target = torch.randn_like(self.model(torch.tensor(self.x)))
        self.base = twin.params(base)
        self.first = self.read("first")

    def read(self, name: str) -> Any:
        """Through PEFT's files; they hold float32, so float64 goes in two parts, to be summed."""
        single, parts = copy.deepcopy(self.model).float(), []
        for part in ("high", "low") if self.double else ("all",):
            folder = self.folder / name / part
            quiet(single.save_pretrained, folder)
            parts.append(load(folder, self.base, self.twin))
            for p, whole in zip(single.parameters(), self.model.parameters(), strict=True):
                p.data = (whole.data - p.data).float()
        if not self.double:
            return parts[0]
        high, low = (jlora.partition(params)[0] for params in parts)
        exact = jax.tree.map(lambda *xs: sum(x.astype(float) for x in xs), high, low)
        return jlora.combine(exact, jlora.partition(parts[0])[1])

    def there(self, optimizer: Any, steps: int = STEPS) -> Any:
        for _ in range(steps):
            optimizer.zero_grad()
            ((self.model(torch.tensor(self.x)) - self.target) ** 2).sum().backward()
            optimizer.step()
        return factors(self.read("last"))

    def here(self, tx: Any, steps: int = STEPS) -> Any:
        apply = jlora.lora(self.twin.fn, fallback="error")
        target = jnp.asarray(self.target.numpy())
        trainable, frozen = jlora.partition(self.first)

        def loss(trainable: Any) -> Any:
            return ((apply(jlora.combine(trainable, frozen), self.x) - target) ** 2).sum()

        @jax.jit
        def step(trainable: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
            return optax.apply_updates(trainable, updates), state

        state = tx.init(trainable)
        for _ in range(steps):
            trainable, state = step(trainable, state)
        return factors(trainable)

    def hold(self, compare: Any, optimizer: Any, tx: Any) -> None:
        """What was learned, the difference from the first values, is the same."""
        first, got, want = factors(self.first), self.here(tx), self.there(optimizer)
        assert set(got) == set(want)
        for path, start in first.items():
            moved = want[path] - start
            most = 1e-10 if self.double else 1e-5
            compare(got[path] - start, moved, path, most if np.any(moved) else 0.0)

    def apart(self, optimizer: Any, tx: Any, steps: int = STEPS) -> dict[str, tuple[float, float]]:
        """How far each went, there and here: both numbers."""
        first, got, want = factors(self.first), self.here(tx, steps), self.there(optimizer, steps)

        def far(x: Any, start: Any) -> float:
            return float(jnp.linalg.norm(x - start))

        return {path: (far(want[path], x), far(got[path], x)) for path, x in first.items()}


def adamw_hf(lr: float, decay: float, eps: float = 1e-6) -> optax.GradientTransformation:
    """AdamW of transformers as it was, PEFT's in LoRA-FA, as an optax transformation."""

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), jnp.int32), zeros, zeros

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        count, first, second = state[0] + 1, *state[1:]
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, updates)
        second = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, second, updates)
        size = lr * jnp.sqrt(1 - B2**count) / (1 - 0.9**count)

        def step(m: Any, v: Any, p: Any) -> Any:
            moved = p - size * m / (jnp.sqrt(v) + eps)
            return moved - lr * decay * moved - p

        return jax.tree.map(step, first, second, params), (count, first, second)

    return optax.GradientTransformation(init, update)


def plus(model: Any, **more: Any) -> Any:
    create = theirs.create_loraplus_optimizer
    return create(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16.0, **more)


def fa(model: Any, weight_decay: float = DECAY) -> Any:
    optimizer = quiet(theirs.create_lorafa_optimizer, model, RANK, ALPHA, LR, weight_decay)
    optimizer.param_groups[0]["betas"] = (0.9, B2)
    return optimizer


@pytest.mark.sample(3)
@pytest.mark.parametrize("twin", [linear, conv1d_hf, conv(2, 2, 1), mlp], ids=repr)
def test_lora_plus(twin, tmp_path, compare):
    race = Race(twin, tmp_path)
    tx = optax.chain(optax.adamw(LR, b2=B2, weight_decay=DECAY), lora_plus(16.0))
    there = plus(race.model, betas=(0.9, B2), loraplus_weight_decay=DECAY)
    race.hold(compare, there, tx)


@pytest.mark.sample(8)
@pytest.mark.parametrize("reg", [1e-2, 1e-6])
@pytest.mark.parametrize("twin", [linear, conv1d_hf, mlp], ids=repr)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_riemannian(name, twin, reg, tmp_path, compare, wide):
    race = Race(twin, tmp_path, double=True)
    make = theirs.create_riemannian_optimizer
    if name == "sgd":
        there = make(race.model, torch.optim.SGD, lr=1e-3, reg=reg)
        here = optax.sgd(1e-3)
    else:
        more = dict(betas=(0.9, B2), weight_decay=DECAY)
        there = make(race.model, torch.optim.AdamW, lr=LR, reg=reg, **more)
        here = optax.adamw(LR, b2=B2, weight_decay=DECAY)
    race.hold(compare, there, optax.chain(riemannian(reg), here))


@pytest.mark.sample(4)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("twin", [linear, conv1d_hf, embedding, mlp], ids=repr)
def test_lora_fa(twin, more, tmp_path, compare, exact):
    race = Race(twin, tmp_path, **more)
    scaling = ALPHA / RANK**0.5 if more else S
    race.hold(compare, fa(race.model), lora_fa(adamw_hf(LR, DECAY), scaling=scaling))


# The differences, in the table's order.


def test_plus_and_what_has_one_dimension(tmp_path):
    race = Race(linear, tmp_path, bias="lora_only", use_dora=True)
    tx = optax.chain(optax.adamw(LR, weight_decay=0.0), lora_plus(16.0))
    far = race.apart(plus(race.model), tx, 1)
    one = [path for path in far if "/lora_" not in path]
    assert sorted(one) == ["layer/bias/value", "layer/kernel/extra/magnitude"]
    ratios = {path: there / here for path, (there, here) in far.items()}
    assert ratios == pytest.approx({path: 16.0 if path in one else 1.0 for path in far}, rel=1e-3)


def test_plus_and_an_embedding(tmp_path):
    race = Race(embedding, tmp_path)
    tx = optax.chain(optax.adamw(LR, weight_decay=0.0), lora_plus(16.0))
    for path, (there, here) in race.apart(plus(race.model), tx, 1).items():
        rate = LR if path.endswith("lora_a") else 16 * LR
        assert here / there == pytest.approx(rate / 1e-6, rel=0.2), (there, here)


def test_plus_and_the_optimizers_weight_decay(tmp_path, compare):
    race = Race(linear, tmp_path)
    there = race.there(plus(race.model, weight_decay=DECAY), 1)
    without, decayed = (
        race.here(optax.chain(optax.adamw(LR, weight_decay=decay), lora_plus(16.0)), 1)
        for decay in (0.0, DECAY)
    )
    first = factors(race.first)
    for path, rate in {"layer/kernel/lora_a": LR, "layer/kernel/lora_b": 16 * LR}.items():
        compare(there[path], without[path], "PEFT's is not decayed")
        lost = without[path] - decayed[path]
        compare(lost, rate * DECAY * first[path], "what the decay takes", 1e-3)


def test_riemannian_and_its_delta(tmp_path):
    make = theirs.create_riemannian_optimizer
    race = Race(linear, tmp_path)
    for p in race.model.parameters():
        if p.requires_grad:
            p.data *= 0.1
    race.first = race.read("small")
    there = make(race.model, torch.optim.SGD, lr=1e-4)
    far = race.apart(there, optax.chain(riemannian(), optax.sgd(1e-4)), 1)
    assert all(1.05 * t < h for t, h in far.values()), far


class Words(torch.nn.Module):
    """An embedding and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = torch.nn.Embedding(17, 6), torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(x))


words = Twin(
    "words",
    Words,
    lambda p, x: dense(p["head"], jnp.take(p["tokens"], x, axis=0)),
    integers(17, 3, 5),
    {
        "tokens": ("tokens.weight", same),
        "head/kernel": ("head.weight", flip),
        "head/bias": ("head.bias", same),
    },
    ("tokens", "head"),
)


def test_riemannian_and_an_embedding(tmp_path, compare):
    race = Race(words, tmp_path)
    first = factors(race.first)
    preconditioned = optax.chain(riemannian(1e-2), optax.sgd(1e-3))
    ours, sgd = race.here(preconditioned, 1), race.here(optax.sgd(1e-3), 1)
    make = theirs.create_riemannian_optimizer
    there = race.there(make(race.model, torch.optim.SGD, lr=1e-3, reg=1e-2), 1)
    for path, start in first.items():
        want = sgd if path.startswith("tokens") else ours
        compare(there[path] - start, want[path] - start, path, 1e-4)
        off = jnp.linalg.norm(ours[path] - sgd[path]) / jnp.linalg.norm(sgd[path] - start)
        assert off > 0.1, (path, off)


def test_riemannian_and_a_convolution(tmp_path):
    race = Race(conv(2, 2, 1), tmp_path)
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B parameter"):
        theirs.create_riemannian_optimizer(race.model, torch.optim.SGD, lr=1e-3)
    first, ours = factors(race.first), race.here(optax.chain(riemannian(), optax.sgd(1e-3)))
    assert all(jnp.linalg.norm(ours[path] - x) > 1e-3 for path, x in first.items())


def test_fa_projects_in_bfloat16(tmp_path, monkeypatch, compare):
    path, projected = "layer/kernel/lora_b", {}
    for name, available in (("bfloat16", True), ("float32", False)):
        monkeypatch.setattr(lorafa, "is_bf16_available", lambda available=available: available)
        race = Race(linear, tmp_path / name)
        optimizer = fa(race.model)
        race.there(optimizer, 1)
        (state,) = optimizer.state.values()
        projected[name] = 10 * state["exp_avg_B"].numpy().T
    ours = factors(race.first)[path] - race.here(lora_fa(optax.sgd(1.0), scaling=S), 1)[path]
    compare(ours, projected["float32"], "the projected gradient")
    off = np.linalg.norm(ours - projected["bfloat16"]) / np.linalg.norm(ours)
    assert 1e-3 < off < 2e-2, off


def test_fa_has_an_adam_of_its_own(tmp_path, compare, exact):
    """An eps and a decay so large that where they stand is seen; `adamw_hf` has PEFT's places."""
    race = Race(linear, tmp_path)
    optimizer = fa(race.model, 20.0)
    optimizer.param_groups[0]["eps"] = 1.0
    first = factors(race.first)["layer/kernel/lora_b"]
    there = race.there(optimizer, 1)["layer/kernel/lora_b"]
    off = []
    for tx in (adamw_hf(LR, 20.0, 1.0), optax.adamw(LR, eps=1.0, weight_decay=20.0)):
        ours = race.here(lora_fa(tx, scaling=S), 1)["layer/kernel/lora_b"]
        decayed = first * (1 - LR * 20.0)
        off.append(float(jnp.linalg.norm(ours - there) / jnp.linalg.norm(there - decayed)))
    assert off[0] < 1e-4 and off[1] > 1.0, off


def test_fa_and_dora(tmp_path):
    race = Race(mlp, tmp_path, use_dora=True)
    with pytest.raises(TypeError, match="NoneType"):
        quiet(race.there, fa(race.model))
    first, ours = factors(race.first), race.here(lora_fa(optax.adam(LR), scaling=S))
    stay = {path for path, x in first.items() if np.array_equal(ours[path], x)}
    assert stay == {"up/kernel/lora_a", "down/kernel/lora_a"} and len(first) == 6


def test_fa_and_a_convolution(tmp_path):
    race = Race(conv(2, 2, 1), tmp_path)
    with pytest.raises(RuntimeError, match="size of tensor"):
        quiet(race.there, fa(race.model))
    first, ours = factors(race.first), race.here(lora_fa(optax.adam(LR), scaling=S))
    stay = {path for path, x in first.items() if np.array_equal(ours[path], x)}
    assert stay == {"layer/kernel/lora_a"} and len(first) == 2
