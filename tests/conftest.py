"""Every test runs with strict dtype promotion and no silent broadcasting."""

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any
from zlib import crc32

# Most of a test's time is LLVM's, over programs that run once; what XLA itself does stays as it is.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # XLA aborts at a flag that it does not have, as jaxlib 0.12 does at this one.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up: every model is on disk or built here

import jax
import pytest

# So that a failed assertion of theirs shows its values.
pytest.register_assert_rewrite("helpers", "holds", "live", "several")

jax.config.update("jax_num_cpu_devices", 8)  # for meshes
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def usual_promotion() -> Iterator[None]:
    """Models written elsewhere mix dtypes and ranks, which the rest of the suite forbids itself."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `sample(n)`, leave all parameters but one in n to the nightly run.

    Which ones is drawn by their names: tests over one table take other cases of it, and a stride
    would keep a single value of a parameter whose number of values divides it.
    """
    tables = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("nightly"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for table in tables.values():
        (n,) = table[0].get_closest_marker("sample").args
        table.sort(key=lambda item: crc32(item.nodeid.encode()))
        for item in table[-(-len(table) // n) :]:
            item.add_marker("nightly")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What earlier files left in caches lives on: the garbage collector need not visit it again."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many numbers were held to PyTorch's, and how far the furthest was off."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    errors = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "parity"
    ]
    if errors:
        terminalreporter.write_line(
            f"cases compared: {len(errors)}, worst relative error: {max(errors):.1e}"
        )
