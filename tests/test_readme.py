"""The README's programs run as they stand, and print what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora
from jlora import peft

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    first, files, trainable, stacked = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam promotes
        exec(first, names)
    assert capsys.readouterr().out.strip() in first.replace("# ", "")
    x, merged, model = names["x"], names["merged"], names["model"]
    assert jnp.allclose(names["apply"](names["params"], x), model.apply(merged, x), atol=1e-5)

    kernel = "layers/attn/q_proj/kernel"
    base = {"layers": {"attn": {"q_proj": {"kernel": jnp.ones((2, 8, 6))}}}}
    spec = jlora.LoraSpec(2, layout="io")
    params = jlora.attach(base, {kernel: spec}, key=jax.random.key(0))
    torch = {kernel: "model.layers.{}.self_attn.q_proj.weight"}
    peft.save("adapter", params, names=torch)
    others = {"base": base}
    exec(files, others)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, others["params"], params))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "exported"]

    exec(trainable, names)
    grads, trained = names["grads"], names["trainable"]
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    exec(stacked, names)
    for y in names["ys"]:
        assert jnp.allclose(y, names["apply"](names["params"], x), atol=1e-5)
