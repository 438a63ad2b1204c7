"""The house of the design: what may import what, what is exported, what is documented."""

import ast
import functools
import importlib.util
import inspect
import pydoc
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

import jlora
from jlora import (
    _foreign,
    arithmetic,
    bank,
    bitsandbytes,
    checkpoint,
    diffusers,
    forms,
    gguf,
    initializers,
    keras,
    kohya,
    mlx,
    optim,
    peft,
    quant,
    qwix,
    transform,
)

ROOT = Path(jlora.__file__).parent
FLOORS = [
    {"_paths", "_compat", "_disk", "_foreign", "_check_values", "_mesh", "_processes"},
    {"_base", "_node", "_arrays", "_moments", "_serialization", "_nnx", "_stacks"},
    {"forms"},
    {"_spec", "_check", "_partition", "_freeze", "_tie", "_boxes", "initializers", "quant"},
    {"_adapt", "_adapters", "_attach", "_begin", "_diffusion", "_merge", "_modules", "_placed"}
    | {"_reading", "_report", "_sharding", "arithmetic", "bank", "optim", "transform"},
    {"_plot", "_tensor_file", "bitsandbytes", "checkpoint", "diffusers", "gguf", "keras", "kohya"}
    | {"mlx", "peft", "qwix"},
    {"cli", "__main__"},
    {"__init__"},
]
OPTIONAL = {"torch", "peft", "safetensors", "orbax", "gguf", "tokenizers", "tqdm", "matplotlib"} | {
    "h5py",
    "flax",  # known to `_serialization` and others by `sys.modules`
}
PUBLIC = {
    *("LoraArray", "FullArray", "LoraSpec", "Explanation", "initializers", "attach", "detach"),
    *("arithmetic", "bank", "optim", "forms", "Moments", "capture"),
    *("bind", "merge", "unmerge", "partition", "combine", "labels", "freeze", "lora", "layouts"),
    *("summary", "explain", "tie", "untie", "value_and_grad", "apply_updates", "specs"),
    *("quant", "quantize", "dequantize", "shardings"),
}
SPACES = [jlora, arithmetic, bank, forms, initializers, optim, quant, transform]
SPACES += [bitsandbytes, checkpoint, diffusers, gguf, keras, kohya, mlx, peft, qwix]
# `import jlora` does not import them.
BRIDGES = ("bitsandbytes", "checkpoint", "diffusers", "gguf", "keras", "kohya", "mlx", "peft")
BRIDGES += ("qwix",)
APART = {f"jlora.{name}" for name in BRIDGES}
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file imports, `from package import name` as package.name."""
    found = set()
    for statement in ast.walk(ast.parse(file.read_text())):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            found |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return found


def test_no_test_file_imports_another():
    """What two of them need is in helpers.py or, like cases.py, in a file of its own."""
    files = list(Path(__file__).parent.rglob("test_*.py"))
    assert len(files) > 50
    for file in files:
        found = {name.split(".")[0] for name in imports(file)}
        assert not {name for name in found if name.startswith("test_")}, file


def test_no_script_has_the_name_of_a_standard_module():
    """The folders of tests, benchmarks and examples come before the standard library's."""
    files = [
        f for of in ("benchmarks", "examples", "tests") for f in (ROOT.parent / of).rglob("*.py")
    ]
    assert len(files) > 80 and not {f.stem for f in files} & sys.stdlib_module_names


def test_the_folder_of_pefts_tests_does_not_shadow_peft():
    """Without an __init__.py it gives way to the installed package wherever that is on the path."""
    tests, found = Path(__file__).parent, importlib.util.find_spec("peft")
    assert (tests / "peft").is_dir() and found is not None and found.origin is not None
    assert tests not in Path(found.origin).parents


def room(dotted: str) -> str:
    """The part of `jlora.<part>...` that has a floor."""
    return dotted.split(".")[1]


def floor(name: str) -> int:
    return next(n for n, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_an_arrow_points_down(file):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(file):
        assert "jax._src" not in name, f"{file} imports private JAX: {name}"
        assert name.split(".")[0] not in OPTIONAL or floor(own) == 5, f"{file}: {name}"
        if name.startswith("jlora."):
            below = room(name)
            assert floor(below) <= floor(own), f"{file} imports {name}, from a floor above"


@pytest.mark.parametrize("bridge", BRIDGES)
def test_a_bridge_never_imports_another(bridge):
    files = [f for f in FILES if f.relative_to(ROOT).parts[0].removesuffix(".py") == bridge]
    found = {room(n) for f in files for n in imports(f) if n.startswith("jlora.")}
    assert files and not found & (set(BRIDGES) - {bridge})


def test_no_cycles():
    graph = {f: {n for n in imports(f) if n.startswith("jlora.")} for f in FILES}
    modules = {
        ".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f
        for f in FILES
    }

    def below(name: str) -> set[str]:
        inside = {i.rpartition(".")[0] if i not in modules else i for i in graph[modules[name]]}
        return {i for i in inside if i in modules and i != "jlora"}

    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in below(name):
                visit(other, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())
    assert len(done) == len(modules) and below("jlora._spec"), "the graph was not read"


def test_the_walker_knows_the_registry_not_the_rules():
    files = {f.stem for f in (ROOT / "transform").glob("*.py")}
    rules = {name for name in files if not name.startswith("_")}
    assert {"linear", "structural", "control"} < rules
    for name in files - {"__init__"}:
        seen = {
            i.split(".")[2]
            for i in imports(ROOT / "transform" / f"{name}.py")
            if i.startswith("jlora.transform.")
        }
        assert not seen & rules, f"{name} imports {seen & rules}"


@pytest.fixture(scope="module")
def imported():
    """What a Python without the tests' hooks has after `import jlora`, and in each package."""
    code = """
        import importlib, sys, jlora
        print(sorted(sys.modules))
        for name in %r:
            module = importlib.import_module(name)
            print(sorted(n for n in dir(module) if n[0] != "_"))
            print(sorted(module.__all__))
    """
    code = textwrap.dedent(code % [space.__name__ for space in SPACES])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, *lines = map(ast.literal_eval, done.stdout.splitlines())
    listed = dict(zip(SPACES, zip(lines[::2], lines[1::2], strict=True), strict=True))
    return {name.split(".")[0] for name in modules}, listed


def test_the_export_list():
    exported = {n for n in vars(jlora) if not n.startswith("_")} - {
        *("transform", "cli", *BRIDGES),
        "jaxtyping",  # the import hook of the tests puts it there
    }
    assert exported == PUBLIC and set(jlora.__all__) == PUBLIC | {"transform"}


def test_completion_shows_the_public_names(imported):
    """Those of submodules too, which have a name of their own where they were imported."""
    for space, (shown, listed) in imported[1].items():
        submodules = {n for n in shown if inspect.ismodule(getattr(space, n))} - set(listed)
        assert set(shown) - submodules == set(listed) == set(space.__all__), space
        assert {f"{space.__name__}.{n}" for n in submodules} <= APART
        assert all(getattr(space, name) is not None for name in listed)


def test_help_shows_the_public_names():
    text = pydoc.plain(pydoc.render_doc(jlora))
    for name in PUBLIC:
        value = getattr(jlora, name)
        shown = f"class {name}(" if inspect.isclass(value) else f"{name}("
        assert inspect.ismodule(value) or shown in text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("peft", "needs safetensors, .* Write `from jlora import peft`"),
        ("checkpoint", "needs Orbax, .* Write `from jlora import checkpoint`"),
        ("get_peft_model", r"has no `get_peft_model`: attach an adapter with `jlora\.attach\("),
        ("LoraConfig", r"describe it with `jlora\.LoraSpec\(rank=8"),
        ("inject_adapter", r"`jlora\.attach\(params, rules"),
        ("mark_only_lora_as_trainable", r"`jlora\.freeze\(tx\)`"),
        ("merge_and_unload", r"`jlora\.merge\(params\)`"),
        ("print_trainable_parameters", r"`print\(jlora\.summary\(params\)\)`"),
        ("MergedLinear", r"no layer is replaced, `jlora\.lora\(model\.apply\)`"),
        ("atach", "module 'jlora' has no attribute 'atach'"),
    ],
)
def test_names_of_other_libraries(name, hint):
    with pytest.raises(AttributeError, match=hint):
        jlora.__getattr__(name)  # what a missing name calls; `peft` is imported here
    assert not hasattr(jlora, "get_peft_model") and not hasattr(jlora.peft, "LoraConfig")


def test_every_hint_runs():
    """What stands between backticks in a hint is public."""
    for hint in _foreign._INSTEAD:
        for dotted in re.findall(r"jlora((?:\.\w+)+)", hint):
            functools.reduce(getattr, dotted.split(".")[1:], jlora)


def test_the_version_is_that_of_the_distribution():
    assert jlora.__version__ == metadata.version("jlora")


def test_importing_jlora_imports_no_optional_library(imported):
    assert not (OPTIONAL | {"flax"}) & imported[0] and {"jax", "optax"} <= imported[0]


def documented():
    for space in SPACES:
        for name, x in vars(space).items():
            if name.startswith("_") or not (inspect.isfunction(x) or inspect.isclass(x)):
                continue
            if name in PUBLIC or f"{x.__module__}.".startswith(
                (f"{space.__name__}.", "jlora.forms.")
            ):
                yield f"{space.__name__}.{name}", x


@pytest.mark.parametrize(
    ("name", "x"), sorted(documented()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_public_name_is_documented(name, x):
    text = inspect.getdoc(x) or ""
    assert text, name
    if inspect.isfunction(x):
        assert "Args:" in text and ("Returns:" in text or name.endswith("save")), name
        assert ">>>" in text or "See `save`" in text, f"{name} has no example"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_a_few_screens(file):
    assert len(file.read_text().splitlines()) <= 330
