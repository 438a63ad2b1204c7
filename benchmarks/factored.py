"""Which programs does each library adapt without building W + A B? The cases of tests/cases.py.

    python benchmarks/factored.py [--only CASE ...] [--json FILE]

Every library gets the same programs, weights and random A and B. A case is *right* if the outputs
and the gradients of A and B equal those of the program on W + A B, which this script builds itself.
It is *factored* if, besides, no intermediate array as large as a weight matrix depends on both A
and B and on no floating-point input: such an array is A B, W + A B or a part of them. What a
library cannot run, or leaves unadapted without a word, is neither, and the reason is recorded.

jlora and quax take any function of a pytree. qwix takes Flax modules: Linen and NNX models as they
are, and plain functions inside an NNX module that holds their parameters; its `disable_jit` is
tried both ways, and the better result counts. quax may materialize (`allow_materialise=True`), so
that what it can do right is not refused.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Each program runs once, so most of the time would be spent on optimizing it.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal
from measure import cores, surroundings, write_json

import jlora

sys.path.append(str(Path(__file__).parents[1] / "tests"))
if TYPE_CHECKING:
    from cases import Case

RANK = 2
FLOAT32, BFLOAT16 = 1e-4, 2e-2  # relative to the largest value: sums in another order


class Adapted(NamedTuple):
    """A case under one library: `fn(factors, *args)`, where factors are {"a": [...], "b": [...]}.

    `paths` names the weights, in the order of the factors; `product` multiplies the A and the B of
    one weight into its update.
    """

    fn: Callable[..., Any]
    factors: dict[str, list[jax.Array]]
    paths: list[str]
    product: Callable[[str, jax.Array, jax.Array], jax.Array]


def named(tree: Any) -> dict[str, jax.Array]:
    """The leaves by path; the `value` of an `nnx.Param` is the parameter itself."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {n.removesuffix("/value"): x for n, (_, x) in zip(names, leaves, strict=True)}


def replaced(tree: Any, values: dict[str, Any]) -> Any:
    """The tree with other leaves at some paths."""
    leaves = named(tree) | values
    return jax.tree.structure(tree).unflatten(list(leaves.values()))


def targets(case: "Case") -> list[str]:
    return [path for path in named(case.params) if re.fullmatch(case.rules, path)]


def table() -> "dict[str, Case]":
    """The cases by name; importing them builds every model, which takes half a minute."""
    from cases import CASES

    return {case.name: case for case in CASES}


@functools.cache
def layouts(case_name: str) -> dict[str, str]:
    """Which axes of each weight are inputs and outputs; of a row that is cut out, (in, out)."""
    case = table()[case_name]
    found = case.layouts(case.params)
    return {path: found.get(path, "io") for path in targets(case)}


def by_layout(case: "Case", path: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A B in the weight's shape; A and B are flattened to matrices, per layer or expert."""
    shape, layout = named(case.params)[path].shape, layouts(case.name)[path]
    stack = len(shape) - len(layout)
    ins = [stack + k for k, side in enumerate(layout) if side == "i"]
    outs = [stack + k for k, side in enumerate(layout) if side == "o"]
    order = [*range(stack), *ins, *outs]
    sizes = [math.prod(shape[k] for k in axes) for axes in (ins, outs)]
    if a.size != math.prod(shape[:stack]) * sizes[0] * RANK:
        raise ValueError(f"A has shape {a.shape} for a weight of shape {shape} and layout {layout}")
    a = a.reshape(*shape[:stack], sizes[0], RANK)
    # qwix's einsum gives all experts one B.
    b = b.reshape(*(shape[:stack] if b.size > RANK * sizes[1] else ()), RANK, sizes[1])
    delta = jnp.matmul(a, b).reshape([shape[k] for k in order])
    return delta.transpose(np.argsort(order))


# ----------------------------------------------------------------------------------- the libraries


def with_jlora(case: "Case") -> Adapted:
    rules = {case.rules: jlora.LoraSpec(RANK, alpha=RANK)}
    attach = functools.partial(jlora.attach, rules=rules, layouts=layouts(case.name))
    params = jax.jit(lambda params: attach(params, key=jax.random.key(0)))(case.params)
    nodes, tree = jax.tree.flatten(params, is_leaf=is_adapted)
    found = [node for node in nodes if is_adapted(node)]

    def fn(factors: Any, *args: Any) -> Any:
        pairs = iter(zip(factors["a"], factors["b"], strict=True))
        new = [put(node, *next(pairs)) if is_adapted(node) else node for node in nodes]
        return jlora.lora(case.fn, fallback="materialize")(tree.unflatten(new), *args)

    def put(node: Any, a: jax.Array, b: jax.Array) -> Any:
        return dataclasses.replace(node, lora_a=a, lora_b=b)

    factors = {"a": [n.lora_a for n in found], "b": [n.lora_b for n in found]}
    return Adapted(fn, factors, targets(case), functools.partial(by_layout, case))


def is_adapted(x: Any) -> bool:
    return isinstance(x, jlora.LoraArray)


def with_quax(case: "Case") -> Adapted:
    import equinox as eqx
    import quax
    from quax.examples.lora import LoraArray

    base = named(case.params)
    make = functools.partial(LoraArray, rank=RANK, allow_materialise=True, key=jax.random.key(0))
    nodes = {path: make(base[path]) for path in targets(case)}

    def fn(factors: Any, *args: Any) -> Any:
        pairs = zip(factors["a"], factors["b"], strict=True)
        new = {
            path: eqx.tree_at(lambda n: (n.a, n.b), node, pair)
            for (path, node), pair in zip(nodes.items(), pairs, strict=True)
        }
        return quax.quaxify(case.fn)(replaced(case.params, new), *args)

    factors = {side: [getattr(node, side) for node in nodes.values()] for side in "ab"}
    return Adapted(fn, factors, [*nodes], lambda path, a, b: jnp.matmul(a, b))


class Wrapped(nnx.Module):
    """A plain function and its parameters as an NNX module, for qwix."""

    def __init__(self, case: "Case") -> None:
        self.case = nnx.static(case)
        for path, leaf in named(case.params).items():
            setattr(self, attribute(path), nnx.Param(leaf))

    def __call__(self, *args: Any) -> Any:
        params = self.case.params
        values = {path: getattr(self, attribute(path))[...] for path in named(params)}
        return self.case.fn(replaced(params, values), *args)


def attribute(path: str) -> str:
    return path.replace("/", "_of_")


def with_qwix(case: "Case", disable_jit: bool) -> Adapted:
    import qwix

    rule = {"module_path": ".*", "rank": RANK, "alpha": RANK}
    provider = qwix.LoraProvider(**rule, disable_jit=disable_jit)
    module = getattr(case.fn, "__self__", None)
    base = named(case.params)
    if isinstance(module, nn.Module):
        model = qwix.apply_lora_to_model(module, provider)
        variables = model.init(jax.random.key(0), *case.args)
        found = named(variables)
        where = {path: path for path in targets(case)}

        def run(leaves: dict[str, Any], *args: Any) -> Any:
            return model.apply(replaced(variables, leaves), *args)
    else:
        captured = inspect.isfunction(case.fn) and inspect.getclosurevars(case.fn).nonlocals
        graph = captured.get("graph") if captured else None  # of a case that is an NNX model
        plain = Wrapped(case) if graph is None else nnx.merge(graph, case.params)
        model = qwix.apply_lora_to_model(plain, provider, *case.args, rngs=nnx.Rngs(0))
        graph_of, state = nnx.split(model)
        found = named(state)
        where = {path: attribute(path) if graph is None else path for path in targets(case)}

        def run(leaves: dict[str, Any], *args: Any) -> Any:
            return nnx.merge(graph_of, replaced(state, leaves))(*args)

    missed = [path for path in where if f"{where[path]}_lora_a" not in found]
    if missed:
        raise LookupError(f"left without an adapter, silently: {', '.join(missed)}")
    same = {where.get(path, attribute(path)): value for path, value in base.items()}
    same = {name: value for name, value in same.items() if name in found} | {
        path: value for path, value in base.items() if path in found
    }
    factors = {s: [found[f"{name}_lora_{s}"] for name in where.values()] for s in "ab"}

    def fn(factors: Any, *args: Any) -> Any:
        leaves = dict(same)
        for side, values in factors.items():
            for name, value in zip(where.values(), values, strict=True):
                leaves[f"{name}_lora_{side}"] = value
        return run(leaves, *args)

    return Adapted(fn, factors, [*where], functools.partial(by_layout, case))


LIBRARIES: dict[str, list[Callable[["Case"], Adapted]]] = {
    "jlora": [with_jlora],
    "qwix": [functools.partial(with_qwix, disable_jit=off) for off in (False, True)],
    "quax": [with_quax],
}


# --------------------------------------------------------------------------------------- the tests


def judge(case: "Case", adapt: Callable[["Case"], Adapted]) -> dict[str, Any]:
    """Whether a case is right and factored under one library, how far off it is, and why not."""
    try:
        adapted = adapt(case)
        random = np.random.default_rng(8)
        draw = lambda x: (0.3 * random.standard_normal(x.shape)).astype(x.dtype)
        factors = jax.tree.map(draw, adapted.factors)
        error = distance(case, adapted, factors)
        dense = builds_dense(case, adapted, factors)
    except ModuleNotFoundError:
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        return {"right": False, "factored": False, "error": None, "reason": reason[:200]}
    narrow = "bf16" in str(jax.make_jaxpr(case.fn)(case.params, *case.args))
    right = error <= (BFLOAT16 if narrow else FLOAT32)
    reason = "" if right else f"differs from the merged model by {error:.1e}"
    if right and dense:
        reason = f"builds {dense}"
    found = {"right": right, "factored": right and not dense, "error": error, "reason": reason}
    return found | {"dtype": "bfloat16" if narrow else "float32"}


def distance(case: "Case", adapted: Adapted, factors: Any) -> float:
    """The largest error of an output or a gradient, relative to the largest value of its array."""

    def merged(factors: Any, *args: Any) -> Any:
        base, new = named(case.params), {}
        for path, a, b in zip(adapted.paths, factors["a"], factors["b"], strict=True):
            wide = base[path].astype(jnp.float32)
            delta = adapted.product(path, a.astype(jnp.float32), b.astype(jnp.float32))
            new[path] = (wide + delta).astype(base[path].dtype)
        return case.fn(replaced(case.params, new), *args)

    def with_gradient(fn: Callable[..., Any]) -> Any:
        def loss(factors: Any) -> Any:
            outs = fn(factors, *case.args)
            return weighed(outs), outs

        return jax.jit(jax.grad(loss, has_aux=True))(factors)

    got, want = with_gradient(adapted.fn), with_gradient(merged)
    worst = 0.0
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for g, x in pairs:
        if g.dtype != x.dtype or g.shape != x.shape:
            raise TypeError(f"gives {g.dtype}{list(g.shape)} for {x.dtype}{list(x.shape)}")
        g, x = np.asarray(g, np.float64), np.asarray(x, np.float64)
        worst = max(worst, float(np.abs(g - x).max() / max(np.abs(x).max(), 1e-3)))
    if not math.isfinite(worst):
        raise ArithmeticError("a value is not finite")
    return worst


def weighed(outs: Any) -> jax.Array:
    """One number: every output times fixed random numbers, so that no gradient cancels."""
    total = jnp.zeros(())
    for k, x in enumerate(jax.tree.leaves(outs)):
        weights = np.random.default_rng(k).standard_normal(x.shape).astype(np.float32)
        total += (x.astype(jnp.float32) * weights).sum()
    return total


A, B, DATA = 1, 2, 4  # what an array depends on, as bits


def builds_dense(case: "Case", adapted: Adapted, factors: Any) -> str:
    """The first intermediate array that is A B or a part of it as large as a weight, or nothing."""
    base = named(case.params)
    sizes = []
    for path in adapted.paths:
        matrix = len(layouts(case.name)[path])
        sizes.append(math.prod(base[path].shape[base[path].ndim - matrix :]))
    jaxpr = jax.make_jaxpr(adapted.fn)(factors, *case.args).jaxpr
    args = jax.tree.leaves(case.args)
    marks = [A] * len(factors["a"]) + [B] * len(factors["b"])
    marks += [DATA if jnp.issubdtype(jnp.result_type(x), jnp.floating) else 0 for x in args]
    return next(walk(jaxpr, marks, min(sizes), outs=[]), "")


def walk(jaxpr: Any, marks: list[int], size: int, outs: list[int]) -> Iterator[str]:
    """Follow what depends on what through a program; `outs` gets the marks of its results.

    A loop's carry is taken as it is at the start.
    """
    env = dict(zip(jaxpr.invars, marks, strict=True))

    def read(operands: Any) -> list[int]:
        return [0 if isinstance(v, Literal) else env.get(v, 0) for v in operands]

    for eqn in jaxpr.eqns:
        ins = read(eqn.invars)
        found = functools.reduce(int.__or__, ins, 0)
        results = [found] * len(eqn.outvars)
        if eqn.primitive.name == "optimization_barrier":  # each result is its own operand
            results = ins
        inner = [*inner_jaxprs(eqn)]
        for body in inner:
            # Aligned at the end: `cond` has its index first, `while` its condition's constants.
            given, body_outs = ins[len(ins) - len(body.invars) :], []
            yield from walk(body, given, size, body_outs)
            if len(body_outs) == len(results):
                results = body_outs
        for var, mark in zip(eqn.outvars, results, strict=True):
            env[var] = mark
            aval = var.aval
            if not inner and mark == A | B and getattr(aval, "size", 0) >= size:
                yield f"{aval.str_short()} by {eqn.primitive.name}"
    outs += read(jaxpr.outvars)


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The programs inside an equation, but for a loop's condition."""
    for name, value in eqn.params.items():
        if name == "cond_jaxpr":
            continue
        for inner in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and len(inner.invars) <= len(eqn.invars):
                yield inner


def best(case: "Case", ways: list[Callable[["Case"], Adapted]]) -> dict[str, Any]:
    """The best of the ways to use a library."""
    rows = []
    for way in ways:
        rows.append(judge(case, way))
        if rows[-1]["factored"]:
            break
    return max(rows, key=lambda row: (row["factored"], row["right"]))


def judge_library(library: str, names: list[str] | None) -> dict[str, dict[str, Any]] | str:
    """Every case under one library, or why there is none."""
    rows = {}
    for name, case in table().items():
        if names is not None and name not in names:
            continue
        try:
            row = rows[name] = best(case, LIBRARIES[library])
        except ModuleNotFoundError as error:
            return f"left out: {library} ({error})"
        word = "factored" if row["factored"] else "right" if row["right"] else "fails"
        print(f"{library:6} {name:24} {word:9} {row['reason']}", flush=True)
    return rows


def summary(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, int]]:
    """How many cases each library has right and factored."""
    return {
        library: {"cases": len(rows)}
        | {k: sum(row[k] for row in rows.values()) for k in ("right", "factored")}
        for library, rows in found.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CASE", help="default: all cases")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = {}
    # A process for each: qwix replaces functions of JAX while it runs.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores(), spawn, max_tasks_per_child=1) as pool:
        runs = {name: pool.submit(judge_library, name, args.only) for name in LIBRARIES}
        for library, run in runs.items():
            rows = run.result()
            if isinstance(rows, str):
                print(rows)
            else:
                found[library] = rows
    counts = summary(found)
    for library, row in counts.items():
        print(f"{library}: {row['right']} of {row['cases']} right, {row['factored']} factored")
    if args.json:
        write_json(args.json, {**surroundings(), "summary": counts, "cases": found})


if __name__ == "__main__":
    main()
