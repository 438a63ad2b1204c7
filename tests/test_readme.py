"""The programs in README.md and examples/README.md run as printed, and print what they say."""

import importlib
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jlora

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "examples" / "README.md").read_text()
FRAMEWORKS = RECIPES.split("## Your framework\n")[1].split("\n## ")[0]


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(autouse=True)
def where(tmp_path, monkeypatch):
    """Programs write here, and Optax's Adam promotes."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_readme(tmp_path, capsys):
    linen, in_nnx, files = programs(README)
    names: dict[str, Any] = {}
    exec(linen, names)
    assert capsys.readouterr().out.strip() in linen.replace("# ", "")
    x, merged, model = names["x"], names["merged"], names["model"]
    assert jnp.allclose(names["apply"](names["params"], x), model.apply(merged, x), atol=1e-5)

    first = float(names["loss"])
    exec(in_nnx, names)
    params, net = names["params"], names["net"]
    assert isinstance(net, nnx.Module) and float(names["loss"]) != first
    assert "trainable params: 12,288 " in jlora.summary(params)  # as in Linen
    assert jnp.allclose(names["apply"](params, x), net(x), atol=1e-5)

    kernel = "layers/attn/q_proj/kernel"
    base = {"layers": {"attn": {"q_proj": {"kernel": jnp.ones((2, 8, 6))}}}}
    spec = jlora.LoraSpec(2, layout="io")
    params = jlora.attach(base, {kernel: spec}, key=jax.random.key(0))
    others = {"base": base, "params": params, "jlora": jlora}
    exec(files, others)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, others["params"], params))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "run"]


def test_readme_is_short():
    assert len(README.splitlines()) <= 130 and len(README.split()) <= 1000


@pytest.mark.nightly
def test_recipes(capsys):
    names: dict[str, Any] = {}
    for program in programs(RECIPES.replace(FRAMEWORKS, "")):
        exec(program, names)
    assert "factored: 2, materialized: 0, unused: 0" in capsys.readouterr().out
    x, apply = names["x"], names["apply"]
    assert names["layouts"]["params/query/kernel"] == "ioo"
    assert jlora.merge(names["adapted"])["params"]["query"]["kernel"].shape == (32, 2, 4)
    assert not jnp.array_equal(*names["masks"])
    trainable, frozen = names["trainable"], names["frozen"]
    assert all(leaf.any() for leaf in jax.tree.leaves(trainable)), "B starts at zero"
    combined = jlora.combine(trainable, frozen)
    assert jnp.allclose(names["ys"], apply(combined, x), atol=1e-5)
    # EVA starts at the model without an adapter: B is zero.
    assert jnp.allclose(
        apply(names["params"], x), names["model"].apply(names["base"], x), atol=1e-5
    )


@pytest.mark.sample(2)
@pytest.mark.usefixtures("usual_promotion")  # Keras and Tunix broadcast
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Tunix's
@pytest.mark.parametrize("n", range(6), ids=["linen", "nnx", "equinox", "keras", "haiku", "tunix"])
def test_frameworks(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program runs, in few lines, and its gradient reaches the adapter and nothing else."""
    first, *others = programs(FRAMEWORKS)
    assert len(others) == 6 and len(re.findall(r"\n+", others[n])) <= 10
    if n == 3:
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        monkeypatch.setenv("KERAS_HOME", os.devnull)
    if n == 5:
        importlib.import_module("models.tunix_models")  # `import tunix` alone needs its trainers
    names: dict[str, Any] = {}
    exec(first, names)
    exec(others[n], names)
    if n == 5:
        # The kernels of Tunix's MLP begin at zero, for a checkpoint to fill.
        some = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
        with nnx.use_eager_sharding(False):
            step = jax.jit(lambda params: jax.grad(names["loss"])(jax.tree.map(some, params)))
            moved = step(names["params"])
    elif n == 1:
        moved = nnx.as_pure(nnx.state(names["net"], nnx.Param))
    else:
        moved = names["state"].params if n == 0 else names["params"]
    nodes = [x for x in jax.tree.leaves(moved, is_leaf=is_lora) if is_lora(x)]
    assert len(nodes) == (7 if n == 5 else 2)
    assert all(bool(node.lora_b.any()) for node in nodes), "B starts at zero"


def is_lora(x: Any) -> bool:
    return isinstance(x, jlora.LoraArray)
