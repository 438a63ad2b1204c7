"""Every public function, given the wrong kind of each argument: one message that says what to pass.

Under the hook of this suite beartype would refuse most of it first, so a plain Python is asked.
"""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
    import warnings, equinox, haiku, jax, jax.numpy as jnp, jlora, optax
    import flax.linen as nn
    from flax import nnx
    from jlora import LoraSpec, checkpoint, peft
    warnings.simplefilter("ignore")
    key, x, spec, adam = jax.random.key(0), jnp.ones((3, 4)), LoraSpec(2), optax.adam(1e-3)
    base = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    rules = {r".*/kernel": spec}
    params = jlora.attach(base, rules, key=key)
    other = jlora.attach({"w": jnp.ones((4, 6))}, {"w": spec}, key=key)
    fn = lambda p, x: x @ p["dense"]["kernel"]
    tx, trained = jlora.freeze(adam), jlora.partition(params)[0]
    linen, net = nn.Dense(6), nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    module, transformed = equinox.nn.Linear(4, 6, key=key), haiku.transform(lambda x: x)
    names = {"dense/kernel": "m.dense.weight"}
    config = {"peft_type": "LORA", "target_modules": ["dense"]}
"""

# By what is asked: the expressions, and what is said of each of them.
TABLE = {
    "`fn` is a module": {
        "jlora.lora(linen)": "TypeError: `jlora.lora(fn)`: `fn` is a module, `Dense`. Pass `mod",
        "jlora.lora(net)": "`Linear`. Pass `lambda state, x: nnx.merge(graph, state)(x)`",
        "jlora.lora(module)": "`Linear`. Pass `lambda module, x: module(x)`",
        "jlora.layouts(linen, base, x)": "`jlora.layouts(fn, params, ...)`: `fn` is a module",
        "jlora.explain(linen, params, x)": "`jlora.explain(fn, params, ...)`: `fn` is a module",
        "jlora.capture(linen, params, x)": "`jlora.capture(fn, params, ...)`: `fn` is a module",
        "jlora.value_and_grad(linen)": "`jlora.value_and_grad(fn)`: `fn` is a module",
    },
    "`fn` is no function": {
        "jlora.lora(params)(fn)": "The function comes first: `jlora.lora(fn)(params, ...)`",
        "jlora.lora(transformed)": "`fn` is not a function but Transformed(",
        "jlora.lora(None)": "`fn` is not a function but None. Pass a function of the parameters",
        "jlora.layouts(base, fn)": "The function comes first",
        "jlora.explain(params, fn, x)": "The function comes first",
        "jlora.capture(params, fn, x)": "The function comes first",
        "jlora.value_and_grad(1.0)": "`fn` is not a function but 1.0",
    },
    "`params` has no arrays": {
        "jlora.attach(linen, rules, key=key)": "`params` is not a tree of arrays but Dense(",
        "jlora.attach(transformed, rules, key=key)": "`params` is not a tree of arrays but Transf",
        "jlora.attach('model', rules, key=key)": "not a tree of arrays but 'model'. Pass the param",
        "jlora.attach(fn, rules, key=key)": "not a tree of arrays but <function <lambda>",
        "jlora.merge('adapter')": "`jlora.merge(params)`: `params` is not a tree of arrays but 'ad",
        "jlora.detach(3)": "`jlora.detach(params)`: `params` is not a tree of arrays but 3",
        "jlora.partition(adam)": "`jlora.partition(params)`: `params` is not a tree of arrays but",
        "jlora.summary(linen)": "`jlora.summary(params)`: `params` is not a tree of arrays but Den",
        "jlora.tie(fn, {})": "`jlora.tie(params, groups)`: `params` is not a tree of arrays",
        "jlora.untie(fn)": "`jlora.untie(params)`: `params` is not a tree of arrays",
        "jlora.bind(linen, params)": "`jlora.bind(base, adapter)`: `base` is not a tree of arrays",
        "jlora.unmerge(linen, params)": "`merged` is not a tree of arrays but Dense(",
        "jlora.quantize(fn, {})": "`jlora.quantize(params, rules)`: `params` is not a tree of arr",
        "jlora.dequantize(fn)": "`jlora.dequantize(params)`: `params` is not a tree of arrays",
        "jlora.quant.errors(fn, params)": "`base` is not a tree of arrays",
        "peft.load('folder', fn, names=names)": "`params` is not a tree of arrays",
        "peft.save('folder', fn, names=names)": "`params` is not a tree of arrays",
        "peft.rules(config, fn, names=names)": "`params` is not a tree of arrays",
        "checkpoint.save('folder', fn)": "`params` is not a tree of arrays",
        "checkpoint.restore('folder', fn)": "`params` is not a tree of arrays",
    },
    "swapped": {
        "jlora.attach(rules, base, key=key)": "these are the rules. The parameters come first",
        "jlora.merge(rules)": "TypeError: `jlora.merge(params)`: `params` contains a `LoraSpec`",
        "jlora.detach(rules)": "these are the rules",
        "jlora.bind(*jlora.detach(params)[::-1])": "float32[6] in `adapter` is not adapted. Pass",
        "jlora.unmerge(params, jlora.merge(params))": "in `merged` is adapted. Pass the plain weig",
        "jlora.apply_updates(trained, base)": "`jlora.apply_updates(params, updates)`: ",
        "checkpoint.save(params, 'folder')": "`directory` is {'dense': {",
        "checkpoint.restore(base, 'folder')": "Pass a path first, a string or a `pathlib.Path`",
        "peft.load(base, 'folder', names=names)": "Pass a path first",
        "peft.save(params, 'folder', names=names)": "Pass a path first",
        "peft.rules(base, config, names=names)": "The configuration comes first, then the",
    },
    "others": {
        "jlora.attach(base, spec, key=key)": "pass a mapping from regular expressions to specs",
        "jlora.attach(base, base, key=key)": "has the value {'bias': float32[6], 'kernel",
        "jlora.attach(base, rules, key=0)": "the key is 0. Pass one PRNG key, `key=jax.random.key(",
        "jlora.arithmetic.dare([params], [1.0], density=0.5, key=0)": "the key is 0. Pass one PRNG",
        "jlora.attach(base, rules, key=jax.random.split(key))": "the key is key<fry>[2]. Pass one",
        "jlora.attach(base, rules, key=key, layouts='io')": "got 'io'. Pass a mapping, such as `jl",
        "jlora.quantize(base, 'nf4')": "pass a mapping from regular expressions to formats, e.g. `",
        "jlora.quantize(base, rules)": "has the value LoraSpec(rank=2",
        "jlora.quantize(base, {'.*kernel': jlora.quant.NF4})": "give a format, such as `jlor",
        "jlora.quantize(base, {'.*': 'int8'}, layouts='io')": "got 'io'. Pass a mapping, such as `",
        "jlora.quant.NF4(block=64.0)": "`NF4(block=64.0, double=True)`: two codes share a byte",
        "jlora.lora(fn, fallback=base)": "(fallback={'dense': {'bias': float32[6], ",
        "jlora.lora(fn, freeze=params)": "`jlora.lora(freeze={'dense': {",
        "jlora.freeze(1e-3)": "`tx` is not an optimizer but 0.001. Pass an optax transformation",
        "jlora.tie(params, ['lora_a'])": "got ['lora_a']. Pass a mapping, such as `",
        "jlora.tie(params, {'.*': 'lora_a'})": "has 'lora_a'. Give the names of parts in a tuple",
        "jlora.value_and_grad(fn, argnums='p')": "`argnums` is 'p'. Pass the position of the",
        "jlora.value_and_grad(fn, argnums=2)(params, x)": "`argnums` is 2, and there are 2 posit",
        "peft.rules(config, base, names='q')": "`names` is 'q'. Give a mapping from path to name",
        "peft.rules(config, base, names=names, layouts='io')": "`layouts` is 'io'. Give a mapp",
        "peft.save('folder', params, names=None)": "`names` is None. Give a mapping from path to",
        "LoraSpec(r=8)": "TypeError: `LoraSpec(r=...)`: there is no `r`. It is `rank=` here.",
        "LoraSpec(8, lora_alpha=16)": "It is `alpha=` here.",
        "LoraSpec(lora_dropout=0.1)": "It is `jlora.lora(fn, dropout=..., key=...)` here.",
        "LoraSpec(target_modules=['q'])": "It is the keys of the rules",
        "LoraSpec(scale='rslora')": 'there is no `scale`. Closest: "scaling".',
    },
    "of another tree": {
        "jlora.combine(trained, jlora.partition(other)[1])": "is in `trainable` only. Pass the two",
        "jlora.combine(3, jlora.partition(params)[1])": '"" (3) is in `trainable` only',
        "jlora.apply_updates(params, other)": '"dense/bias" (float32[6]) is in `params` only. Pass',
        "tx.update(other, tx.init(params), params)": "`jlora.freeze(tx).update(updates, state, par",
        "tx.update(params, tx.init(other), params)": "the state is of other parameters than `par",
        "tx.update(params, tx.init(jlora.detach(params)[1]), params)": "the state is of other",
        "tx.update(params, adam.init(params), params)": "the state is of other parameters",
        "tx.update(params, base, params)": "or of another optimizer. Make it with `jlora",
    },
    "accepted": {
        "jlora.lora(jax.jit(fn))": "accepted",
        "jlora.lora(linen.apply)": "accepted",
        "jlora.lora(equinox.filter_jit(lambda m, x: m(x)))(module, x[0])": "accepted",
        "jlora.lora(lambda m, x: m(x))(net, x)": "accepted",
        "jlora.attach(net, {'kernel': spec}, key=key)": "accepted",
        "jlora.attach(base, {'.*bias': 'full'}, key=None)": "accepted",
        "jlora.merge({}), jlora.detach(None), jlora.partition({'n': 3})": "accepted",
        "jlora.bind(base, jlora.detach(base)[1])": "accepted",
    },
}
CASES = {expression: said for table in TABLE.values() for expression, said in table.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Run every expression in one Python without the hook."""
    code = textwrap.dedent(PRELUDE) + "".join(
        f"try: {expression}\n"
        f"except Exception as e: print({expression!r}, type(e).__name__, e, sep=': ', flush=True)\n"
        f"else: print({expression!r} + ': accepted')\n"
        for expression in CASES
    )
    folder = tmp_path_factory.mktemp("plain")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert not list(folder.iterdir())
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), "a message of several lines"
    return {e: line.removeprefix(f"{e}: ") for e, line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("expression", CASES)
def test_what_is_said(plain, expression):
    assert CASES[expression] in plain[expression], plain[expression]
    assert len(plain[expression]) < 600
