"""Every public function, given the wrong kind of each argument: one message that says what to pass.

Under the hook of this suite beartype would refuse most of it first, so a plain Python is asked.
"""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
    import functools, pickle, warnings, equinox, haiku, jax, jax.numpy as jnp, jlora, optax
    import flax.linen as nn
    from flax import nnx
    from jlora import LoraSpec, bank, checkpoint, forms, initializers, optim, peft, transform
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
    w, node, ids = jnp.ones((4, 6)), params["dense"]["kernel"], jnp.zeros(3, int)
    moments = jlora.capture(fn, params, x)
    many = bank.stack([jlora.detach(params)[1]] * 2)
    attached = lambda spec: jlora.attach(base, {r".*/kernel": spec}, key=key)
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
    "optimizers": {
        "optim.adalora(1e-3, target_rank=1, total_steps=9)": "adalora(0.001)`: pass the optim",
        "optim.adalora(adam, target_rank=1.5, total_steps=9)": "`target_rank` is 1.5. Give an int",
        "optim.adalora(adam, target_rank=0, total_steps=9)": "`target_rank` is 0. Give an integer",
        "optim.adalora(adam, target_rank=1, total_steps='x')": "`total_steps` is 'x'. Give an int",
        "optim.adalora(adam, target_rank=1, total_steps=9, beta1='x')": "`beta1` is 'x'. Give a nu",
        "optim.lora_fa(adam, delta='x')": "TypeError: `jlora.optim.lora_fa(tx)`: `delta` is 'x'. G",
        "optim.lora_fa(adam, delta=-1.0)": "`delta` is -1.0. Give a number of at least 0, e.g.",
        "optim.lora_fa(adam, scaling='x')": "`scaling` is 'x'. Give s of the nodes, e.g. `scaling=",
        "optim.lora_fa(adam, scaling=0.0)": "ValueError: `jlora.optim.lora_fa(tx)`: `scaling` is 0",
        "optim.lora_plus('x')": "`ratio` is 'x'. Give a number above 0, e.g. 16.0",
        "optim.lora_plus(-1.0)": "`ratio` is -1.0. Give a number above 0",
        "optim.lora_plus(params)": "`jlora.optim.lora_plus(ratio)`: `ratio` is {'dense': {",
        "optim.lora_rite(adam)": "`learning_rate` is GradientTransf",
        "optim.lora_rite('x')": "`learning_rate` is 'x'. Give a number or a schedule, e.g. 1e-3",
        "optim.lora_rite(1e-3, b1=2.0)": "`b1` is 2.0. Give a number in [0, 1)",
        "optim.lora_rite(1e-3, eps='x')": "`eps` is 'x'. Give a number of at least 0",
        "optim.lora_rite(1e-3, weight_decay='x')": "`weight_decay` is 'x'. Give a number",
        "optim.riemannian('x')": "`delta` is 'x'. Give a number above 0, e.g. 1e-6",
        "bank.per_slot(1e-3)": "`jlora.bank.per_slot(tx)`: `tx` is not an optimizer but 0.001",
    },
    "initializers": {
        "initializers.eva(params, moments, rho='x')": "`rho` is 'x'. Give a number of at least 1",
        "initializers.eva(params, moments, rho=float('nan'))": "eva(rho=nan)`: ranks cannot all d",
        "initializers.eva(params, moments, rslora='yes')": "`rslora` is 'yes'. Give True or False",
        "initializers.lora_ga(params, base, gamma='x')": "`gamma` is 'x'. Give a number above 0",
        "initializers.lora_ga(params, base, gamma=0)": "ValueError: `jlora.initializers.lora_ga(p",
        "initializers.pissa()": "`jlora.initializers.pissa`: missing a required argument: 'key'. C",
        "initializers.pissa(key, w, 2, niter='x')": "`niter` is 'x'. Give an integer of at least",
        "initializers.pissa(key, w, 2, niter=-1)": "`niter` is -1. Give an integer of at least 0",
        "initializers.pissa(0, w, 2)": "`jlora.initializers.pissa`: the key is 0. Pass one PRNG k",
        "initializers.olora(w, key, 2)": "the key is float32[4,6]. Pass one PRNG key",
        "initializers.milora(key, base, 2)": "`weight` is {'dense': {'bias': float32[6], 'kernel'",
        "initializers.gaussian(key, jnp.ones(4), 2)": "`weight` is float32[4]. Pass one floating",
        "initializers.uniform(key, jnp.ones((2, 4, 6)), 2)": "for a stack use `jax.vmap`, and for",
        "initializers.orthogonal(key, w.astype(int), 2)": "`weight` is int32[4,6]. Pass one float",
        "initializers.kaiming(key, w, 'x')": "`rank` is 'x'. Give an integer of at least 1",
        "initializers.kaiming_rank(key, w, 0)": "`rank` is 0. Give an integer of at least 1",
        "initializers.a_zero(key, w, True)": "`rank` is True. Give an integer of at least 1",
        "initializers.vera(key, w, 2, scaling='x')": "`scaling` is 'x'. Give a number, s = alpha/",
        "initializers.adalora(key, w, 2, dtype='x')": "`dtype` is 'x'. A and B are trained, so th",
        "initializers.kaiming(key, w, 2, dtype=int)": "so their dtype must be floating; omit it",
        "initializers.pissa(key, w, 5)": "`jlora.initializers.pissa`: rank 5 is above min(in, out",
        "initializers.pissa(key, w, 5, niter=1)": "rank 5 is above min(in, out) = min(4, 6), and",
        "initializers.milora(key, w, 5)": "which has no more directions. Use 4 or less",
        "initializers.olora(key, w, 5)": "which has no more directions. Use 4 or less",
        "initializers.mica(key, w, 5)": "which has no more directions. Use 4 or less",
        "initializers.lora_xs(key, w, 5)": "which has no more directions. Use 4 or less",
        "attached(LoraSpec(5, init=initializers.pissa))": "`jlora.attach`: rank 5 is above min(in",
        "attached(LoraSpec(5, init=lambda key, weight, **_: (weight, weight)))": "has no more dire",
    },
    "init": {
        "LoraSpec(init=initializers.eva)": "then `params = jlora.initializers.eva(params, moments",
        "LoraSpec(init=initializers.loftq)": "jlora.initializers.loftq(params, base)`",
        "LoraSpec(init=lambda k: 1)": "it is called as `init(key, weight, rank=..., scaling=..., ",
        "LoraSpec(init=lambda k, w, r, s, d: 1)": "missing a required argument: 'r'. Name the las",
        "LoraSpec(init=3)": "`LoraSpec(init=3)`: pass a function, e.g. `init=jlora.initializers.ka",
        "LoraSpec(dtype=None)": "`dtype` is None. A and B are trained",
        "LoraSpec(dtype='x')": "`LoraSpec(dtype=...)`: `dtype` is 'x'",
        "LoraSpec(alpha=jnp.ones(3))": "`LoraSpec(alpha=float32[3])`: alpha must be a number",
        "LoraSpec(layout=3)": "`LoraSpec(layout=3)`: a layout has one letter per dimension",
        "LoraSpec(form={})": "`LoraSpec(form={})`: give one of 'lora', ",
        "attached(LoraSpec(2, init=lambda *_, **__: 1))": 'the initializer of "dense/kernel" float',
        "attached(LoraSpec(2, init=lambda _, w, **__: (w, w)))": "returned (float32[4,6], float32",
        "attached(LoraSpec(5, init=lambda *_, **__: 'x'))": "returned 'x'. For this weight and ra",
        "attached(LoraSpec(2, init=lambda _, w, **__: (w[:, :2], w[:2], 1.0)))": "the residual (4,",
    },
    "forms": {
        "forms.register('lora')": "`jlora.forms.register('lora')`: give a form: `jlora.forms.Form",
        "forms.Form(3, initializers.kaiming)": "`jlora.forms.Form(name=3)`: give the name in `Lora",
        "forms.Form('x', 3)": "`jlora.forms.Form(init=3)`: pass a function",
        "forms.Form('x', initializers.eva)": "attach first, then `params = jlora.initializers.eva(",
        "forms.Form('x', initializers.kaiming, frozen='lora_a')": "give a tuple of names, e.g. `(",
        "forms.Form('x', initializers.kaiming, frozen=('core',))": 'it takes "lora_a" and "lora_b"',
        "forms.Form('x', initializers.kaiming, extra={'core': 's r'})": "give a mapping from name",
        "forms.Form('x', initializers.kaiming, factors=3)": "Form(factors=3)`: give a function, or",
        "forms.Form('x', initializers.kaiming, refuses='slices')": 'give a mapping from "slices"',
        "forms.Part(3)": "`jlora.forms.Part(3)`: the axes begin with the stack",
        "forms.Part('s r', begin=3)": "`jlora.forms.Part(begin=3)`: give a function `(node, shape",
        "forms.Part('s r', frozen='yes')": "`jlora.forms.Part(frozen='yes')`: give True or False",
        "forms.named({})": "give one of 'lora', 'lora_fa', ",
        "forms.of(base)": "`jlora.forms.of(node)`: `node` is {'dense': {",
        "forms.has_gain(w)": "`jlora.forms.has_gain(node)`: `node` is float32[4,6]. Pass one `Lora",
        "forms.parts(w)": "`jlora.forms.parts(node)`: `node` is float32[4,6]",
        "forms.begun(w, True, jnp.float32)": "`jlora.forms.begun(node, ...)`: `node` is float32[4,",
        "forms.gain(w)": "`jlora.forms.gain(node)`: `node` is float32[4,6]",
        "forms.weight(w)": "`jlora.forms.weight(node)`: `node` is float32[4,6]",
        "forms.base_of(w, w)": "`jlora.forms.base_of(merged, node)`: `node` is float32[4,6]",
        "forms.check('w', w, 'call')": "`jlora.forms.check(path, node, call)`: `node` is float32[4",
        "forms.changed_b(w, None, fn)": "`jlora.forms.changed_b(node, ...)`: `node` is float32[4,6",
        "forms.factors(w)": "`jlora.forms.factors(node, shape)`: `node` is float32[4,6]",
        "forms.factors(node, 3)": "TypeError: `jlora.forms.factors(node, shape)`: `shape` is 3.",
        "forms.factors(node, (6, 4))": "is not that of a weight of shape (6, 4). Give the shape",
        "forms.as_lora(w)": "`jlora.forms.as_lora(node, shape)`: `node` is float32[4,6]",
        "forms.as_lora(node, 3)": "`jlora.forms.as_lora(node, shape)`: `shape` is 3. Give the sha",
        "forms.as_lora(node, 'io')": "`jlora.forms.as_lora(node, shape)`: `shape` is 'io'. Give t",
        "forms.delta(w, (4, 6), jnp.float32)": "delta(node, shape, dtype)`: `node` is float32[4,6]",
        "transform.product(3, 3, [x, w], (((1,), (0,)), ((), ())))": "got 3 and 3. Call it in a r",
        "jlora.arithmetic.dare([params], [1.0], density=0.5, key=key, elect='x')": "elect='x'; gi",
        "jlora.arithmetic.della([params], [1], density=1, epsilon=0, key=key, elect=1)": "elect=1",
        "jlora.arithmetic.breadcrumbs([params], [1.0], density=0.5, outliers=0.1, elect=None)": (
            "elect=None; give True or False"
        ),
        "forms.delta(node, (3, 6), jnp.float32)": "is not that of a weight of shape (3, 6). Give",
    },
    "banks": {
        "bank.stack(params)": "`adapters` is {'dense': {'bias': float32[6], 'kernel': LoraArray(f",
        "bank.stack(many)": "`adapters` is Bank(",
        "bank.stack([params], slots='x')": "`slots` is 'x'. Give an integer of at least 1",
        "bank.stack([params], rank=2.5)": "`rank` is 2.5. Give an integer of at least 1",
        "bank.put(params, 0, many)": "`jlora.bank.put(bank, slot, adapter)`: `bank` is {'dense': {",
        "bank.pick(params, 0)": "`jlora.bank.pick(bank, slot)`: `bank` is {'dense': {",
        "bank.bind(base, params)": "`jlora.bank.bind(base, bank)`: `bank` is {'dense': {",
        "bank.each(linen, base, many, ids, x)": "`fn` is a module, `Dense`. Pass `module.apply`",
        "bank.each(base, fn, many, ids, x)": "`fn` is not a function but {'dense': {",
        "bank.each(fn, many, base, ids, x)": "`bank` is {'dense': {'bias': float32[6], 'kernel': f",
        "bank.each(fn, base, many, ids, x, in_axes='x')": "`in_axes` has 'x'. Give an integer",
        "bank.each(fn, base, many, ids, x, in_axes=(True,))": "`in_axes` has True. Give an intege",
        "bank.each(fn, base, many, ids, x, out_axes='x')": "`out_axes` has 'x'. Give an integer,",
        "bank.each(fn, base, bank.Bank(3, 3, 3), ids, x)": "`bank` has the ranks 3 and the gains 3",
        "bank.each(fn, base, many, None, x)": "ids are integers, (batch,) or (batch, tokens); got",
        "bank.each(fn, base, many, None, x, weights='x')": "weights are floats, (batch, 2) or (bat",
        "bank.each(fn, base, many, None, x, weights=base)": "weights are floats, (batch, 2) or (ba",
        "bank.per_slot(adam).init(base)": "`jlora.bank.per_slot(tx).init(params)`: `params` is {'d",
        "bank.per_slot(adam).update(params, None, many)": "state, params)`: `updates` is {'dense'",
    },
    "rules of primitives": {
        "transform.rule(3, kind='product')": "`primitive` is 3. Pass its name, as printed in a jax",
        "transform.rule(jax.lax.dot_general_p, kind='product')": "`primitive` is dot_general. Pass",
        "transform.rule('mine', kind='x')": "`kind` is 'x'. Give one of rearrange, product, join",
        "transform.rule('mine', kind='product', kernel=3)": "`kernel` is 3. Give its name, or None",
        "transform.rule('mine', kind='product', replace=1)": "`replace` is 1. Give True or False",
        "transform.rule('mine', kind='product')(3)": "the rule is 3. Decorate a function `(walk, e",
    },
    "arithmetic and specs": {
        "jlora.arithmetic.add(params, [1.0])": "`adapters` is {'dense': {'bias': float32[6], 'ker",
        "jlora.arithmetic.add([params], {0: 1.0})": "weights={0: 1.0} for 1 adapters. Pass one num",
        "jlora.arithmetic.add([params], [key])": "Pass one number for each",
        "jlora.arithmetic.slerp(0.5, [params, params])": "`adapters` is 0.5. Pass a list of adapt",
        "jlora.arithmetic.inspect(params, top='x')": "`top` is 'x'. Give an integer of at least 1",
        "jlora.arithmetic.inspect(params, threshold='x')": "`threshold` is 'x'. Give a cosine, a",
        "jlora.arithmetic.extract(base, base, spec)": "pass a mapping from regular expressions to",
        "jlora.arithmetic.extract(base, base, rules, niter=-1)": "`niter` is -1. Give an integer o",
        "jlora.specs(base, params)": "`base_specs` has adapted weights. The parameters come first",
        "jlora.specs(params, base)": 'the spec of "dense/bias" float32[6] is float32[6]. Give a `P',
        "jlora.specs(fn, base)": "`jlora.specs(params, base_specs)`: `params` is not a tree of arr",
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
        "initializers.kaiming(jax.random.PRNGKey(0), weight=w, rank=jnp.int32(2))": "accepted",
        "initializers.orthogonal(key, w, 8), initializers.pissa(key, w, 2, niter=0)": "accepted",
        "jax.vmap(lambda k: initializers.vera(k, w, 2))(jax.random.split(key))": "accepted",
        "LoraSpec(init=functools.partial(initializers.pissa, niter=2))": "accepted",
        "optax.inject_hyperparams(optim.lora_plus)(ratio=16.0).init(params)": "accepted",
        "optim.lora_rite(optax.constant_schedule(0.1)), optim.lora_plus(16)": "accepted",
        "pickle.loads(pickle.dumps(LoraSpec(init=initializers.pissa))).s": "accepted",
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
