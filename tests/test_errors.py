"""Every refusal: what was called, where, why, and the line to write instead; nothing changed."""

import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import LoraArray, LoraSpec

KEY = jax.random.key(0)


def says(*parts: str) -> str:
    """Make a pattern of parts that stand in a message in this order, whatever is between."""
    return "(?s)" + ".*".join(re.escape(p) for p in parts)


def model():
    return {
        "dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "heads": jnp.ones((4, 2, 3)),
        "steps": jnp.ones((3, 3), jnp.int32),
    }


def node(**changes):
    parts = {
        "base": jnp.ones((3, 4)),
        "lora_a": jnp.ones((3, 2)),
        "lora_b": jnp.ones((2, 4)),
        "scaling": jnp.float32(2),
        "layout": "io",
    }
    return LoraArray(**{**parts, **changes})


SPEC = LoraSpec(2)

REFUSED = {
    "matches_nothing": (
        {r".*/kernal": SPEC},
        {},
        ValueError,
        says("`jlora.attach(rules=...)`", '".*/kernal" matches no parameter', '"dense/kernel"'),
    ),
    "only_a_part_matches": ({"dense": SPEC}, {}, ValueError, says("must match the full path")),
    "shadowed": (
        {r".*kernel": SPEC, "dense/kernel": None},
        {},
        ValueError,
        says('"dense/kernel" never applies', "Move it up"),
    ),
    "value": (
        {".*kernel": "ful"},
        {},
        TypeError,
        says("\".*kernel\" has the value 'ful'", '"full"'),
    ),
    "no_regex": ({"*kernel": SPEC}, {}, ValueError, says('"*kernel" is not a regular', ".*")),
    "rank_above": (
        {".*kernel": LoraSpec(5, init=jlora.initializers.pissa)},
        {},
        ValueError,
        says(
            "rank 5 is above min(in, out) = min(4, 6)",
            '"dense/kernel" float32[4,6]',
            "the initializer computes A and B from the weight",
            "rank=4",
        ),
    ),
    "no_layout": (
        {"heads": SPEC},
        {},
        ValueError,
        says('"heads" float32[4,2,3]', "input and which output", "jlora.layouts(fn, params, x)"),
    ),
    "long_layout": (
        {".*kernel": LoraSpec(2, layout="iio")},
        {},
        ValueError,
        says("'iio' has 3 letters", '"dense/kernel" float32[4,6] has 2 dimensions'),
    ),
    "layout_letters": (
        {".*kernel": SPEC},
        {"layouts": {"dense/kernel": "ix"}},
        ValueError,
        says("layout 'ix' of 'dense/kernel'", "one letter per dimension"),
    ),
    "unknown_path": (
        {".*kernel": SPEC},
        {"layouts": {"dense/kern": "io"}},
        KeyError,
        says("`jlora.attach(layouts=...)`", "dense/kern", "dense/kernel"),
    ),
    "integers": ({"steps": SPEC}, {}, TypeError, says('"steps" int32[3,3] is not a floating')),
    "vector": ({".*bias": SPEC}, {}, ValueError, says('"dense/bias" float32[6]', 'rule "full"')),
}


@pytest.mark.parametrize(("rules", "kw", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_attach_refuses_and_changes_nothing(rules, kw, error, match):
    params = model()
    before = jax.tree.leaves(params)
    with pytest.raises(error, match=match):
        jlora.attach(params, rules, key=KEY, **kw)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), before, strict=True))
    assert jax.tree.structure(params) == jax.tree.structure(model())


def test_no_leaves_at_all():
    with pytest.raises(ValueError, match="There are no leaves at all"):
        jlora.attach({}, {"w": SPEC}, key=KEY)


@pytest.mark.parametrize("rule", [SPEC, "full"])
def test_already_adapted(rule):
    params = jlora.attach({"w": jnp.ones((4, 6))}, {"w": SPEC}, key=KEY)
    with pytest.raises(ValueError, match=says('"w" float32[4,6] is already adapted', "detach")):
        jlora.attach(params, {"w": rule}, key=KEY)
    whole = jlora.attach({"w": jnp.ones((4, 6))}, {"w": "full"}, key=KEY)
    with pytest.raises(ValueError, match="already adapted"):
        jlora.attach(whole, {"w": rule}, key=KEY)


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        ({"rank": 0}, says("`LoraSpec(rank=0)`", "at least 1")),
        ({"rank": -3}, says("`LoraSpec(rank=-3)`", "map its path to None")),
        ({"alpha": float("inf")}, says("`LoraSpec(alpha=inf)`", "finite")),
        ({"alpha": float("nan")}, says("`LoraSpec(alpha=nan)`", "finite")),
        ({"layout": "xy"}, says("LoraSpec(layout='xy')", "one letter per dimension")),
        ({"layout": "ii"}, says("LoraSpec(layout='ii')", "at least one of each")),
        ({"layout": ""}, says("LoraSpec(layout='')", "at least one of each")),
    ],
)
def test_spec(kw, match):
    with pytest.raises(ValueError, match=match):
        LoraSpec(**kw)


# What beartype would refuse first under this suite's import hook is asked of a plain Python.
PLAIN = {
    "rank": (
        "jlora.LoraSpec(rank=2.0)",
        "TypeError: `LoraSpec(rank=2.0)`: the rank must be an int",
    ),
    "alpha": (
        "jlora.LoraSpec(alpha='16')",
        "TypeError: `LoraSpec(alpha='16')`: alpha must be a number",
    ),
    "slices": ("jlora.LoraSpec(slices=(0, 3))", "ValueError: `LoraSpec(slices=(0, 3))`: give (st"),
    "a half": ("jlora.LoraSpec(slices=((0, 2.5),))", "ValueError: `LoraSpec(slices=((0, 2.5),))`"),
    "others' numbers": (
        "hash(jlora.LoraSpec(np.int64(4), jnp.float32(16), slices=[[0, 3]]))",
        "accepted",
    ),
    "rules": (
        "jlora.attach({}, jlora.LoraSpec(2), key=None)",
        "TypeError: `jlora.attach(rules=...)`: pass a mapping",
    ),
    "bool": ("jlora.LoraSpec(rank=True)", "TypeError: `LoraSpec(rank=True)`: the rank must be an"),
    "init": ("jlora.LoraSpec(init='kaiming')", "TypeError: `LoraSpec(init='kaiming')`: pass a fun"),
    "dora": ("jlora.LoraSpec(dora=1)", "TypeError: `LoraSpec(dora=1)`: give True or False."),
    "dtype": (
        "jlora.LoraSpec(dtype='int32')",
        "TypeError: `LoraSpec(dtype=...)`: `dtype` is int32. A and B",
    ),
    "scaling": (
        "jlora.LoraSpec(scaling='x')",
        "ValueError: `LoraSpec(scaling='x')`: give \"lora\"",
    ),
    "form": (
        "jlora.LoraSpec(form='loha')",
        "ValueError: `LoraSpec(form='loha')`: give one of 'lora', 'lora_fa', 'lora_xs', ",
    ),
    "fallback": (
        "jlora.lora(abs, fallback='x')",
        "ValueError: `jlora.lora(fallback='x')`: give one",
    ),
}


@pytest.fixture(scope="module")
def plain():
    """Run every expression of `PLAIN` in one Python without the hook."""
    code = "import jlora, jax.numpy as jnp, numpy as np\n" + "".join(
        f"try: {expression}\n"
        f"except Exception as e: print({name!r}, type(e).__name__, e, sep=': ')\n"
        f"else: print({name!r} + ': accepted')\n"
        for name, (expression, _) in PLAIN.items()
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.mark.parametrize("name", PLAIN)
def test_without_type_checks(plain, name):
    assert plain[name].startswith(PLAIN[name][1]), plain[name]


@pytest.mark.parametrize(
    "leaf", ["relu", jnp.tanh, jnp.arange(3), KEY], ids=lambda x: type(x).__name__
)
def test_what_cannot_be_trained(leaf):
    with pytest.raises(
        TypeError, match=says("`jlora.attach`", '"act"', "cannot be trained", "None")
    ):
        jlora.attach({"act": leaf}, {"act": "full"}, key=KEY)


def test_two_leaves_of_one_path():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((6, 5))}}
    with pytest.raises(ValueError, match=says("`jlora.attach`", 'two leaves have the path "a/b"')):
        jlora.attach(params, {".*": SPEC}, key=KEY)


def test_bind_of_another_structure():
    base, adapter = jlora.detach({"w": node(), "b": jnp.ones(4)})
    with pytest.raises(
        ValueError, match=says("`jlora.bind(base, adapter)`", '"b" is in the first')
    ):
        jlora.bind(base, {"w": adapter["w"]})
    with pytest.raises(ValueError, match=says("differ in 1 place", '"w" is in the second only')):
        jlora.bind({"b": base["b"]}, adapter)


def test_unmerge_of_another_structure():
    params = {"w": node()}
    with pytest.raises(ValueError, match=says("`jlora.unmerge(merged, params)`", '"v"', "first")):
        jlora.unmerge({**jlora.merge(params), "v": jnp.ones(3)}, params)


def product(p, x):
    return x @ p["w"]


HOLES = [{"base": None}, {"lora_a": None, "lora_b": None}, {"lora_b": None}, {"scaling": None}]


@pytest.mark.parametrize("hole", HOLES, ids=lambda h: "-".join(h))
def test_parts_taken_out(hole):
    params = {"w": node(**hole)}
    with pytest.raises(ValueError, match=says("`jlora.merge`", '"w" is a part', "jlora.bind(base")):
        jlora.merge(params)
    with pytest.raises(ValueError, match=says("`jlora.lora`", '"w" is a part', "jlora.combine(")):
        jlora.lora(product)(params, jnp.ones((5, 3)))


SHAPES = [
    ({"lora_a": jnp.ones((4, 2))}, says('"w" float32[3,4]', "needs lora_a (3, 2)", "(4, 2)")),
    ({"lora_b": jnp.ones((3, 4))}, says('"w" float32[3,4]', "lora_b (2, 4)", "another model")),
    ({"lora_a": jnp.ones((7, 3, 2))}, says("needs lora_a (3, 2)", "got (7, 3, 2)")),
    ({"scaling": jnp.ones(3)}, says('"w" float32[3,4] needs a scaling of shape ()', "(3,)")),
]


@pytest.mark.parametrize(("changes", "match"), SHAPES)
def test_parts_that_do_not_fit(changes, match):
    params = {"w": node(**changes)}
    for call in (
        lambda: jlora.merge(params),
        lambda: jlora.lora(product)(params, jnp.ones((5, 3))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5, float("nan")])
def test_dropout_rate(rate):
    with pytest.raises(ValueError, match=says(f"`jlora.lora(dropout={rate})`", "[0, 1)")):
        jlora.lora(product, dropout=rate, key=KEY)


def test_dropout_without_a_key():
    with pytest.raises(
        ValueError, match=says("`jlora.lora(dropout=0.1)` needs a key", "key=step_k")
    ):
        jlora.lora(product, dropout=0.1)


def sorted_weight(p, x):
    return x @ jnp.sort(p["block"]["w"], axis=0)  # the line that the message names


def used_whole():
    return {"block": {"w": node()}}, jnp.ones((5, 3))


def test_fallback_error_names_everything():
    match = says(
        '"block/w" float32[3,4] must be materialized for primitive "sort"',
        "test_errors.py",
        "(sorted_weight)",
        "48 bytes",
        "Ways out",
        "product with the weight",
        "the rule None",
        'fallback="materialize"',
    )
    with pytest.raises(ValueError, match=match) as caught:
        jlora.lora(sorted_weight, fallback="error")(*used_whole())
    first = sorted_weight.__code__.co_firstlineno
    assert f"test_errors.py:{first + 1}" in str(caught.value)


def test_fallback_warns_once_per_site():
    def two_sites(p, x):
        one = x @ jnp.sort(p["block"]["w"], axis=0)
        return one + x @ jnp.sort(p["block"]["w"], axis=1)

    fn = jlora.lora(two_sites)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [fn(*used_whole()) for _ in range(2)]
    assert len(caught) == 2
    assert all(w.category is UserWarning and '"block/w"' in str(w.message) for w in caught)
    assert len({str(w.message).split("test_errors.py:")[1].split()[0] for w in caught}) == 2
    params, x = used_whole()
    want = two_sites(jlora.merge(params), x)
    for y in got:
        np.testing.assert_allclose(y, want, rtol=1e-6)


def test_fallback_materialize_is_silent():
    params, x = used_whole()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = jlora.lora(sorted_weight, fallback="materialize")(params, x)
    np.testing.assert_allclose(y, sorted_weight(jlora.merge(params), x), rtol=1e-6)


def deep():
    """A larger tree, whose first leaves are unlike most."""
    layer = {"attn": {"q_proj": {"kernel": jnp.ones((4, 4))}, "out": {"kernel": jnp.ones((4, 4))}}}
    return {"embed": {"embedding": jnp.ones((9, 4))}, **{f"layers_{k}": layer for k in range(20)}}


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (r".*/kernal", says('Closest: "kernel", as in "layers_0/attn/out/kernel".')),
        (r".*/q_porj/kernel", says('"q_proj", as in "layers_0/attn/q_proj/kernel"')),
        (r".*/(q|v)_porj/.*", says('"q_proj", as in')),
        (r"layer_\d+/.*/kernel", says('Closest: "layers_', ', as in "layers_')),
        (r"layers_1/attn/q_proj/kernels", says('Closest: "layers_1/attn/q_proj/kernel"')),
        (r".*(query|value)", says("Closest: ")),
        (r"kern[al", says("is not a regular expression")),
    ],
)
def test_near_misses_of_a_pattern(rule, match):
    with pytest.raises(ValueError, match=match):
        jlora.attach(deep(), {rule: SPEC}, key=KEY)


@pytest.mark.parametrize("name", ["bias", "rel_bias"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_a_bias_of_several_dimensions(name, shape):
    params = {"query": {name: jnp.ones(shape), "kernel": jnp.ones((4, 6))}}
    match = says(f'"query/{name}" float32[', "is a bias by its name", 'the rule "full"', "layout=")
    with pytest.raises(ValueError, match=match):
        jlora.attach(params, {".*": SPEC}, key=KEY)
    rules = {r".*bias": LoraSpec(2, layout="io"), ".*": "full"}
    assert isinstance(jlora.attach(params, rules, key=KEY)["query"][name], LoraArray)
    found = jlora.attach(params, {".*": SPEC}, key=KEY, layouts={f"query/{name}": "io"})
    assert isinstance(found["query"][name], LoraArray)


def test_a_traced_argument_is_named_as_the_function_names_it():
    def choose(params, batch, *, train):
        return batch["x"] @ params["block"]["w"] if batch["on"] else train

    params, x = used_whole()
    batch = {"x": x, "on": jnp.array(True)}
    for call in (
        lambda: jlora.lora(choose)(params, batch, train=x),
        lambda: jlora.layouts(choose, jlora.merge(params), batch, train=x),
        lambda: jlora.explain(choose, params, batch, train=x),
    ):
        with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
            call()
        text = str(caught.value)
        assert "batch['on']" in text and "the function choose at" in text and "values" not in text


LONG = "x" * 30_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: jlora.attach(model(), {LONG: SPEC}, key=KEY),
        lambda: jlora.attach(model(), {".*kernel": LONG}, key=KEY),
        lambda: jlora.attach(model(), {".*kernel": [SPEC] * 3000}, key=KEY),
        lambda: jlora.attach({LONG: jnp.ones(3)}, {"w": SPEC}, key=KEY),
        lambda: LoraSpec(2, form=LONG),
        lambda: LoraSpec(2, layout=LONG),
        lambda: LoraSpec(2, slices=((3, 2),) * 9000),
        lambda: jlora.tie({"w": node()}, {"w": (LONG,)}),
    ],
)
def test_long_values_are_cut(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert len(str(caught.value)) < 1000
