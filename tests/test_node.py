"""A node in a notebook and in a function that does not know it: a short repr, and one message."""

import copy
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored import pack

import jlora
from jlora import FullArray, LoraArray, LoraSpec

OPERATORS = ("matmul", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
OPERATORS += ("lt", "le", "gt", "ge", "eq", "ne")


def tree(**spec):
    """A weight, a stored one and a bias, all adapted."""
    params = {"b": jnp.ones(6), "q": pack(jnp.ones((4, 6))), "w": jnp.ones((4, 6))}
    rules = {"b": "full", ".*": LoraSpec(2, **spec)}
    return jlora.attach(params, rules, key=jax.random.key(0))


NODES = {"lora": tree()["w"], "full": tree()["b"]}


def test_the_repr_of_a_node_is_short():
    params = tree(dora=True)
    assert repr(params["w"]) == (
        "LoraArray(base=float32[4,6], lora_a=float32[4,2], lora_b=float32[2,6], scaling=float32[], "
        "layout='io', extra={'magnitude': float32[6]})"
    )
    assert repr(params["b"]) == "FullArray(base=float32[6], value=float32[6])"
    assert "(base=Rows(float32[4,6]), lora_a=" in repr(params["q"])
    moments = jlora.Moments(jnp.ones((4, 4)), jnp.ones(4), jnp.ones(()))
    assert repr(moments) == "Moments(second=float32[4,4], total=float32[4], count=float32[])"
    plain = tree()["w"]
    assert "extra" not in repr(plain) and "form" not in repr(plain)
    assert repr(jlora.detach(params)[1]["w"]).startswith("LoraArray(base=None, lora_a=")


@pytest.mark.sample(3)
@pytest.mark.parametrize("form", ["lora", "vera", "lora_xs", "adalora"])
def test_whatever_a_node_holds(form):
    """Shapes, tracers, labels, halves, ties, objects and arrays that were donated."""
    params = tree(form=form, dora=True)
    seen = [
        params,
        jax.eval_shape(lambda p: p, params),
        *jlora.partition(params),
        jlora.labels(params),
        jax.tree.map(lambda _: object(), params),
        jax.tree.map(lambda _: "long " * 400, params),
    ]
    jax.make_jaxpr(lambda p: seen.append(repr(p)))(params)
    given = jax.tree.map(jnp.copy, params)
    jax.tree.map(lambda x: x.delete(), given)
    for tree_of in (*seen, given):
        assert len(repr(tree_of)) < 2500 and "\n" not in repr(tree_of)
    wide = LoraArray(*[np.ones((300, 300))] * 3, 2.0, "io", ((0, 1),) * 500)
    assert len(repr(wide)) < 300


def test_sizes_are_values():
    node, full = NODES["lora"], NODES["full"]
    assert (node.ndim, node.size, node.nbytes) == (2, 24, 4 * (24 + 8 + 12 + 1))
    assert (full.ndim, full.size, full.nbytes) == (1, 6, 48)
    stored = tree()["q"]
    assert stored.size == 24 and stored.nbytes == 24 + 4 * 4 + 4 * (8 + 12 + 1)


@pytest.mark.parametrize("name", NODES)
def test_what_arrays_have_ends_in_the_message(name):
    node = NODES[name]
    asked = {n for n in dir(jnp.ones(1)) if n[0] != "_"} - set(dir(node))
    assert {"T", "astype", "at", "mean", "reshape", "sharding", "block_until_ready"} <= asked
    for attribute in asked & ({n for n in dir(jax.Array)} | {"block_until_ready"}):
        assert not hasattr(node, attribute)
        with pytest.raises(TypeError, match=rf"`\.{attribute}`, got a .*Wrap it, `jlora\.lora"):
            getattr(node, attribute)
    with pytest.raises(AttributeError, match=r"a `\w+Array` has no attribute 'lora_c'"):
        _ = node.lora_c


@pytest.mark.parametrize("other", [2, 2.0, np.ones((6, 6)), jnp.ones((6, 6))], ids=repr)
@pytest.mark.parametrize("name", NODES)
def test_operators_end_in_the_message(name, other):
    node = NODES[name]
    for operation in (getattr(operator, name) for name in OPERATORS):
        for pair in ((node, other), (other, node)):
            with pytest.raises(TypeError, match=r"Wrap it, `jlora\.lora\(fn\)"):
                operation(*pair)


@pytest.mark.parametrize(
    "use", [lambda w: w[0], lambda w: w[:, None], lambda w: -w, abs, list, jnp.sum, np.mean]
)
@pytest.mark.parametrize("name", NODES)
def test_other_uses_end_in_the_message(name, use):
    with pytest.raises(TypeError, match=r"Wrap it, `jlora\.lora\(fn\)"):
        use(NODES[name])


def test_nodes_are_compared_by_identity():
    one, other = tree()["w"], tree()["w"]
    assert one == one and one != other and one != "w" and one is not None
    assert len({one, other, one}) == 2
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert isinstance(again, LoraArray) and again.layout == "io"


def test_a_detached_node_has_no_shape():
    adapter = jlora.detach(tree())[1]["w"]
    assert getattr(adapter, "shape", None) is None
    with pytest.raises(AttributeError, match=r"`LoraArray.shape`: a part of the node is missing"):
        _ = adapter.shape
    with pytest.raises(AttributeError, match=r"`FullArray.dtype`: .*jlora\.combine"):
        _ = FullArray(jnp.ones(3), None).dtype
