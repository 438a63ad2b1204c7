"""The suite itself: one line at its end, nothing skipped, and what the README installs for it."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_one_line_at_the_end(tmp_path):
    case = """def test_two(compare):
        compare(1.0, 1.0, "same")
        compare(1.000004, 1.0, "near")
        compare(1.1, 1.0, "a statistic", most=0.2)"""
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_two.py").write_text(case)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest"]
    command += ["-c", ROOT / "pyproject.toml", f"--rootdir={tmp_path}", tmp_path / "test_two.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    said = [line for line in run.stdout.splitlines() if line.startswith("cases compared")]
    assert said == ["cases compared: 2, worst relative error: 4.0e-06"], run.stdout + run.stderr


def test_nothing_is_skipped():
    """No test here is skipped or may fail, whatever is installed."""
    files = sorted(HERE.glob("*.py"))
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert len(files) > 15 and "parametrize" in names
    assert not names & {"skip", "skipif", "xfail", "importorskip", "skipTest"}


def test_the_test_command_installs_what_is_compared_with():
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"<!-- test command -->\n```\n(.*?)\n```", readme, re.DOTALL)
    assert command.startswith("pip install -e '.[test]'") and "python -m pytest" in command
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(x.split("==") for x in extras["optional-dependencies"]["test"] if "==" in x)
    for name in ("torch", "peft", "bitsandbytes", "loralib", "transformers"):
        assert metadata.version(name).partition("+")[0] == pins[name]
