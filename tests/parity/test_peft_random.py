"""PEFT live: what is random is not bit for bit the same, but of the same distribution."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from live import adapt, plain, quiet
from scipy import stats
from twins import Holder, Twin, conv, conv1d_hf, embedding, grouped, linear

import jlora.peft

RATE, DRAWS = 0.3, 4000
LAYERS = [linear, conv1d_hf, conv(1, 2, 1), conv(2, 2, 1), conv(3, 2, 1), grouped(1, 2)]
every = pytest.mark.parametrize("twin", LAYERS, ids=repr)


def one_input(twin: Twin) -> np.ndarray:
    """One row for a layer, few positions for a convolution."""
    shape = twin.x(np.random.default_rng(0)).shape[1:]
    small = (shape[-1],) if twin in (linear, conv1d_hf) else (shape[0], *(3 for _ in shape[1:]))
    return np.random.default_rng(0).normal(size=small).astype(np.float32)


def draws_of_dropout(
    twin: Twin, x: np.ndarray, tmp_path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The delta of a layer under dropout, many times, by PEFT and by jlora; and without."""
    model = adapt(twin, lora_dropout=RATE)
    quiet(model.save_pretrained, tmp_path)
    base = twin.params(plain(twin))
    read = dict(names=twin.names, layouts=twin.layouts, kinds=twin.kinds)
    params = jlora.peft.load(tmp_path, base, **read)
    torch.manual_seed(0)
    rows = torch.tensor(np.repeat(x[None], DRAWS, 0))
    with torch.no_grad():
        whole = model.eval()(rows[:1]).numpy()
        theirs = model.train()(rows).numpy()
    without = np.asarray(twin.fn(base, x[None]))

    def ours(key: jax.Array) -> jax.Array:
        return jlora.lora(twin.fn, dropout=RATE, key=key, fallback="error")(params, x[None])[0]

    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = np.asarray(jax.jit(jax.vmap(ours))(keys))
    return tuple((y - without).reshape(len(y), -1) for y in (theirs, drawn, whole))


@pytest.mark.sample(4)
@every
def test_dropout_has_the_same_mean_and_variance(twin, tmp_path, compare):
    theirs, ours, whole = draws_of_dropout(twin, one_input(twin), tmp_path)
    error = np.sqrt(theirs.var(0) / DRAWS)
    assert (np.abs(theirs.mean(0) - whole[0]) < 5 * error).all()
    assert (np.abs(ours.mean(0) - whole[0]) < 5 * error).all()
    compare(ours.var(0), theirs.var(0), "variance under dropout", 0.1)
    for k in range(ours.shape[1]):
        assert stats.ks_2samp(ours[:, k], theirs[:, k]).pvalue > 1e-3


@pytest.mark.sample(3)
@every
def test_dropout_falls_on_the_input_of_a(twin, tmp_path):
    """With one number that is not zero, all of the delta goes at once, or is 1/(1-p) of itself."""
    x = np.zeros_like(one_input(twin))
    x.flat[4] = 1
    theirs, ours, whole = draws_of_dropout(twin, x, tmp_path)
    for some in (theirs, ours):
        gone = np.abs(some).max(1) < 1e-6
        np.testing.assert_allclose(
            some[~gone], np.repeat(whole, (~gone).sum(), 0) / (1 - RATE), 1e-4, 1e-5
        )
        assert abs(gone.mean() - RATE) < 5 * (RATE * (1 - RATE) / DRAWS) ** 0.5


def test_an_embedding_has_no_dropout(tmp_path, compare):
    model = adapt(embedding, lora_dropout=0.5)
    quiet(model.save_pretrained, tmp_path)
    params = jlora.peft.load(tmp_path, embedding.params(plain(embedding)), names=embedding.names)
    x = embedding.x(np.random.default_rng(0))
    theirs = model.train()(torch.tensor(x)).detach().numpy()
    apply = jlora.lora(embedding.fn, dropout=0.5, key=jax.random.key(0))
    compare(apply(params, x), theirs, "an embedding under dropout")


# Enough numbers for their moments to be told apart.
wide = dataclasses.replace(linear, make=lambda: Holder(torch.nn.Linear(130, 70)))
wide_embedding = dataclasses.replace(embedding, make=lambda: Holder(torch.nn.Embedding(170, 60)))


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("twin", "init"),
    [
        *itertools.product((wide, wide_embedding, conv(2, 1, 0)), (True, False, "gaussian")),
        (wide, "orthogonal"),  # PEFT has it for linear layers alone
    ],
    ids=repr,
)
def test_initializers(twin, init):
    """Bounds, moments and a Kolmogorov-Smirnov test of many first values of A and B."""
    config = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=init)
    theirs = {"lora_a": [], "lora_b": []}
    for seed in range(150):
        torch.manual_seed(seed)
        layer = quiet(peft.get_peft_model, twin.make(), config).base_model.model.layer
        is_embedding = hasattr(layer, "lora_embedding_A") and len(layer.lora_embedding_A) > 0
        a, b = (
            (layer.lora_embedding_A, layer.lora_embedding_B)
            if is_embedding
            else (
                {"default": layer.lora_A["default"].weight},
                {"default": layer.lora_B["default"].weight},
            )
        )
        theirs["lora_a"].append(a["default"].detach().numpy().ravel())
        theirs["lora_b"].append(b["default"].detach().numpy().ravel())

    base = twin.params(plain(twin))
    rules = jlora.peft.rules(config.to_dict(), base, names=twin.names)
    keys = jax.random.split(jax.random.key(0), 150)
    leaf = next(iter(rules))

    def first(key):
        node = jlora.attach(base, rules, key=key, layouts=twin.layouts)["layer"]
        node = node[leaf.rpartition("/")[2]]
        return node.lora_a, node.lora_b

    for name, ours in zip(("lora_a", "lora_b"), jax.vmap(first)(keys), strict=True):
        got, want = np.float64(ours).ravel(), np.float64(theirs[name]).ravel()
        assert got.size == want.size
        if not want.any():
            assert not got.any()
            continue
        assert got.mean() == pytest.approx(want.mean(), abs=5 * want.std() / want.size**0.5)
        assert got.std() == pytest.approx(want.std(), rel=0.02)
        assert stats.kurtosis(got) == pytest.approx(stats.kurtosis(want), abs=0.15)
        assert stats.ks_2samp(got, want).pvalue > 1e-3
        if isinstance(init, bool) and twin is not wide_embedding:
            fan_in = np.prod(jnp.shape(base["layer"]["kernel"])[:-1])
            bound = 1 / (fan_in if name == "lora_a" else 4) ** 0.5
            assert 0.99 * bound < np.abs(got).max() <= bound * (1 + 1e-6)
            assert 0.99 * bound < np.abs(want).max() <= bound * (1 + 1e-6)
