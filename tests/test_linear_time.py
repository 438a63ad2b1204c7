"""What is done once a leaf takes a number of steps that grows as the leaves do, not faster.

Steps are counted, not timed: the lines that run in this package (a turn of a loop is one) and the
functions that they call.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import LoraSpec, _compat, checkpoint, peft

ROOT = str(Path(jlora.__file__).parent)


def steps(fn: Callable[[], Any]) -> int:
    """Count the lines of jlora that run, and the calls from them."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        inside = frame.f_code.co_filename.startswith(ROOT)
        count += inside
        return trace if inside else None

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "c_call" and frame.f_code.co_filename.startswith(ROOT)

    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        fn()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return count


def calls_of(fn: Callable[[], Any]) -> int:
    """Count all calls of functions, those of JAX too."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return count


def model(layers: int) -> dict[str, Any]:
    block = {
        **{f"{x}_proj": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)} for x in "qk"},
        "norm": {"scale": jnp.ones(4)},
    }
    return {f"layers_{k}": block for k in range(100, 100 + layers)}


def names(path: str) -> str:
    path = path.replace("layers_", "layers.").replace("/", ".")
    return "model." + path.replace("kernel", "weight").replace("scale", "weight")


def entries(layers: int, **changed: Any) -> dict[str, Any]:
    """A configuration that has an entry for every module, as files written by programs have."""
    found = [f"model.layers.{k}" for k in range(100, 100 + layers)]
    projections = [f"{layer}.{x}_proj" for layer in found for x in "qk"]
    return {
        "peft_type": "LORA",
        "target_modules": projections,
        "rank_pattern": {name: 1 + k % 2 for k, name in enumerate(projections)},
        "alpha_pattern": {"^" + name: 3 + k % 2 for k, name in enumerate(projections)},
        "modules_to_save": [f"{layer}.norm" for layer in found],
        "bias": "all",
        **changed,
    }


def adapted(layers: int) -> Any:
    rules = peft.rules(entries(layers), model(layers), names=names)
    return jlora.attach(model(layers), rules, key=jax.random.key(0))


def calls(layers: int, folder: str) -> dict[str, Callable[[], Any]]:
    base, config = model(layers), entries(layers)
    table = {path: names(path) for path in peft_paths(base)}
    known = dict.fromkeys((path for path in table if path.endswith("kernel")), "io")
    rules, params = peft.rules(config, base, names=names), adapted(layers)
    where = {k: f"{folder}/{k}" for k in ("peft", "peft_2", "orbax")}
    peft.save(where["peft"], params, names=names)
    checkpoint.save(where["orbax"], params)
    one, adapter = jlora.detach(params)
    alike = jlora.attach(base, {r".*/kernel": LoraSpec(2)}, key=jax.random.key(0))
    tied = jlora.tie(alike, {".*": ("lora_a",)})
    return {
        "rules": lambda: peft.rules(config, base, names=table, layouts=known),
        "attach": lambda: jlora.attach(base, rules, key=jax.random.key(0), layouts=known),
        "save": lambda: peft.save(where["peft_2"], params, names=table),
        "load": lambda: peft.load(where["peft"], base, names=table, layouts=known),
        "detach": lambda: jlora.detach(params),
        "bind": lambda: jlora.bind(one, adapter),
        "merge": lambda: jlora.merge(params),
        "unmerge": lambda: jlora.unmerge(one, params),
        "partition": lambda: jlora.combine(*jlora.partition(params)),
        "summary": lambda: jlora.summary(params),
        "tie": lambda: jlora.tie(alike, {".*": ("lora_a",)}),
        "untie": lambda: jlora.untie(tied),
        "checkpoint.save": lambda: checkpoint.save(f"{folder}/orbax_2", params),
        "checkpoint.restore": lambda: checkpoint.restore(where["orbax"], base),
    }


def peft_paths(tree: Any) -> list[str]:
    return [f"{a}/{b}/{c}" for a, inside in tree.items() for b in inside for c in inside[b]]


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[int, int]]:
    found = []
    for layers in (4, 8):
        with tempfile.TemporaryDirectory() as folder:
            for fn in calls(layers, folder).values():
                fn()  # whatever is compiled or cached once is there now
            found.append({name: steps(fn) for name, fn in calls(layers, folder).items()})
    return {name: (found[0][name], found[1][name]) for name in found[0]}


@pytest.mark.nightly
def test_twice_the_leaves_take_twice_the_steps(counted):
    grown = {name: many / few for name, (few, many) in counted.items()}
    assert len(grown) == 14 and min(few for few, _ in counted.values()) > 100
    assert {name: x for name, x in grown.items() if not 1.5 < x < 2.2} == {}


@pytest.mark.parametrize("equations", [10, 1000])
def test_whether_a_weight_is_traced_is_found_without_a_look_at_the_trace(equations):
    """It is asked once a weight, so a look at the trace would make tracing quadratic."""
    counts = []

    def program(x):
        for _ in range(equations):
            x = jnp.sin(x)
        counts.append(calls_of(lambda: _compat.is_traced(x)))
        assert _compat.is_traced(x)

    jax.make_jaxpr(program)(1.0)
    assert counts[0] < 100


def test_what_is_traced():
    """In every transformation, keys too; arrays with values, NumPy's and numbers are not."""
    key, seen = jax.random.key(0), []

    def program(x):
        seen.append(_compat.is_traced(x))
        return x

    jax.make_jaxpr(program)(key)
    jax.vmap(program)(jnp.ones(2))
    jax.grad(program)(1.0)
    jax.jvp(program, (1.0,), (1.0,))
    assert seen == [True] * 4
    assert not any(map(_compat.is_traced, (key, jnp.ones(2), np.ones(2), 1.0, None)))


def test_many_rules_are_looked_up_and_the_first_still_wins():
    base = {f"w_{k}.x": jnp.ones((4, 6)) for k in range(4)}
    rules = {
        r"w_0\.x": LoraSpec(1),
        r"w_[01]\.x": LoraSpec(2),
        r"w_1\.x|w_2\.x": LoraSpec(3),
        r"w_2.x": None,
        r"w_3\.x": "full",
        r".*": None,
    }
    with pytest.raises(ValueError, match=r'rule "w_2.x" never applies'):
        jlora.attach(base, rules, key=jax.random.key(0))
    del rules["w_2.x"], rules[".*"]
    params = jlora.attach(base, rules, key=jax.random.key(0))
    ranks = [getattr(x, "rank", None) for x in params.values()]
    assert ranks == [1, 2, 3, None] and isinstance(params["w_3.x"], jlora.FullArray)


def test_patterns_that_are_names_are_matched_as_expressions():
    params = {f"m{k}/w": jnp.ones((8, 6)) for k in range(5)}
    torch = {"m0/w": "a.b.weight", "m1/w": "x.a.b.weight", "m2/w": "a_b.weight"}
    torch |= {"m3/w": "aab.weight", "m4/w": "z.b.weight"}
    config = {"peft_type": "LORA", "target_modules": ["b", "a_b", "aab"], "r": 8}

    for pattern, want in (
        ({"a.b": 2, "b": 3}, [2, 2, 2, 2, 3]),  # the dot is any character
        ({"^a.b": 2, ".*b": 3}, [2, 3, 2, 2, 3]),
        ({"b": 3, "a.b": 2}, [3, 3, 2, 2, 3]),
        ({r"a\.b": 1, "(a.)b": 2, "a.b": 4}, [1, 1, 2, 2, 8]),
    ):
        found = peft.rules({**config, "rank_pattern": pattern}, params, names=torch)
        assert [found[path].rank for path in params] == want
