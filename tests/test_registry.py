"""The records of the rules: what each says of itself, and what a refusal costs."""

import ast
import inspect
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora import LoraSpec, _compat
from jlora.transform import _registry

MASK = jnp.arange(35).reshape(5, 7) % 3
ROWS = jnp.array([0, 9])
FOUR = jnp.ones((1, 1, 4, 4))
IMAGE = ("NCHW", "OIHW", "NCHW")


def adapted(shape, layout, key=0, **kw):
    tree = {"w": jax.random.normal(jax.random.key(key), shape)}
    spec = {"w": LoraSpec(1, layout=layout, **kw)}
    tree = jlora.attach(tree, spec, key=jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1, tree)["w"]


# Of each rule that may refuse: parameters and a program that it refuses.
W, V = adapted((5, 7), "io"), adapted((5, 7), "io", 1)
STACK, SIDES = adapted((2, 5, 7), "io"), adapted((2, 5, 7), "ioo")
GAIN, HEADS = adapted((5, 7), "io", dora=True), adapted((5, 2, 3), "ioo", dora=True)
EXPERTS = adapted((2, 7, 3), "io")
KERNEL = adapted((3, 1, 2, 2), "oiii")
REFUSED = {
    "_concatenate": [lambda: ((STACK, SIDES), lambda a, b: lax.concatenate([a, b], 0))],
    # In some releases `jnp.stack` is a primitive, in others a concatenation.
    "_stack": [lambda: ((STACK, SIDES), lambda a, b: jnp.stack([a, b]))],
    "_add": [lambda: ((STACK, SIDES), lax.add), lambda: ((STACK, SIDES), lax.sub)],
    "_select": [lambda: ((W, V), lambda a, b: lax.select_n(MASK > 0, a, b))],
    "_scale": [
        lambda: ((W,), lambda a: a * MASK.astype(a.dtype)),
        lambda: ((W,), lambda a: 1.0 / a),
        lambda: ((W, V), lax.mul),
    ],
    "_reshape": [
        lambda: ((W,), lambda a: lax.reshape(a, (35,))),
        lambda: ((W,), lambda a: lax.reshape(a, (35,), (1, 0))),
    ],
    "_cast": [lambda: ((W,), lambda a: a.astype(jnp.int32))],
    "_pad": [lambda: ((W,), lambda a: lax.pad(jnp.ones(3), a[0, 0], [(1, 1, 0)]))],
    "_sum": [lambda: ((GAIN,), lambda a: a.sum(1))],
    "_gather": [lambda: ((GAIN,), lambda a: jnp.take(a, ROWS, 0, mode="fill", fill_value=0.0))],
    "_ragged_dot": [
        lambda: (
            (W, adapted((2, 7, 3), "io")),
            lambda a, b: lax.ragged_dot(a, b, jnp.array([2, 3])),
        )
    ],
    "_conv": [
        lambda: (
            (KERNEL,),
            lambda k: lax.conv_general_dilated(k, FOUR, (1, 1), "SAME", dimension_numbers=IMAGE),
        )
    ],
    "_dot_general": [
        lambda: ((W, V), lambda a, b: jnp.einsum("ij,ij->i", a, b)),
        lambda: ((HEADS,), lambda a: jnp.einsum("ihd,xd->xih", a, jnp.ones((4, 3)))),
    ],
}
# It refuses what no program can hold: starting indices are integers, and no weight is.
NEVER = {"_dynamic_slice"}


def rules():
    """Return the package's own rules: the examples in its docstrings register some more."""
    every = [r for r in _registry._RULES.values() if r.fn.__module__.startswith("jlora.")]
    own = [r for r in every if hasattr(sys.modules[r.fn.__module__], r.fn.__name__)]
    return {r.fn.__name__: r for r in own}


def test_every_rule_that_may_refuse_is_in_the_table():
    refusing = set()
    for name, rule in rules().items():
        tree = ast.parse(inspect.getsource(rule.fn))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        if names & {"NotImplemented", "product"}:
            refusing.add(name)
    assert refusing == {*REFUSED, *NEVER}


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "make", [m for makes in REFUSED.values() for m in makes], ids=lambda m: str(m.__code__.co_names)
)
def test_a_refusal_binds_the_primitive_once(make, monkeypatch):
    args, fn = make()
    bound, alive = Counter(), []
    bind = _compat.bind

    def counting(eqn, *operands):
        alive.append(eqn)
        if [np.shape(x) for x in operands] == [v.aval.shape for v in eqn.invars]:
            bound[id(eqn), eqn.primitive.name] += 1
        return bind(eqn, *operands)

    if make not in REFUSED["_pad"]:  # a scalar is no weight any more, so nothing is told
        with pytest.raises(ValueError, match="no factored form"):
            jlora.lora(fn, fallback="error")(*args)
    monkeypatch.setattr(_compat, "bind", counting)
    got = jlora.lora(fn, fallback="materialize")(*args)
    monkeypatch.undo()
    assert bound and set(bound.values()) == {1}, bound
    np.testing.assert_allclose(got, fn(*map(jlora.merge, args)), rtol=1e-5, atol=1e-6)


def test_what_a_record_says_of_a_gain_is_what_its_kind_says():
    kinds = {name: rule.kind for name, rule in rules().items()}
    assert {n for n, k in kinds.items() if k == "product"} == {
        *("_dot_general", "_conv", "_ragged_dot")
    }
    assert {n for n, r in rules().items() if not r.takes_gain} == {
        *("_concatenate", "_stack", "_add", "_select", "_pad"),
        *("_custom_vjp", "_custom_jvp", "_custom_vmap"),
    }
