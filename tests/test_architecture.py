"""Two rooms, one arrow: the shell imports the core and never the reverse, read from the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

# __main__.py, which starts the shell for `python -m funcprobe`, lies beside the core.
CORE = sorted(p for p in (ROOT / "funcprobe").rglob("*.py") if p.name != "__main__.py")
SHELL = sorted((ROOT / "adapters").rglob("*.py"))

LIBRARIES = {"torch", "optree", "jaxtyping"}
# Files, the environment, the clock, logging, global state: the shell's.
WORLD = {
    "os",
    "pathlib",
    "io",
    "shutil",
    "tempfile",
    "glob",
    "fileinput",
    "logging",
    "warnings",
    "json",
    "csv",
    "pickle",
    "time",
    "datetime",
    "random",
    "secrets",
    "sys",
    "signal",
    "subprocess",
    "multiprocessing",
    "threading",
    "asyncio",
    "socket",
    "urllib",
    "http",
    "importlib",
    "runpy",
    "ctypes",
    "atexit",
    "gc",
    "platform",
    "argparse",
}
BUILTINS = {"open", "print", "input", "exec", "eval", "compile", "__import__", "globals", "setattr"}
MOST_LINES = 300
MOST_LINES_OF_TESTS = 600
TRACKED = {
    "funcprobe",
    "adapters",
    "tests",
    "benchmarks",
    "docs",
    "configs",
    "notebooks",
    "README.md",
    "CHANGELOG.md",
}
BROAD = {
    "adapters/sampling/functions.py": [("users_code", True)],
    "adapters/checkpoint/base.py": [("load_tokenizer", True)],
    "adapters/sampling/dataset_folders.py": [("require_own_files", True)],
    # A trial of modelling code, whose failure is a fallback that is stated, or a refusal.
    "funcprobe/policy/trials.py": [("attempt", False)],
    "funcprobe/losses/custom.py": [("_called", True)],
    "adapters/sinks/registry.py": [("_one_line", True)],
    # One checkpoint of many: the reason is said, and the exit status is not 0.
    "adapters/sweep.py": [("_outcome", False)],
    # A training costs more than its probe: whatever fails beside it is a warning.
    "adapters/trainers/unharmed.py": [("unharmed", False)],
}

files = pytest.mark.parametrize("path", [*CORE, *SHELL], ids=lambda p: str(p.relative_to(ROOT)))
core_files = pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
shell_files = pytest.mark.parametrize("path", SHELL, ids=lambda p: str(p.relative_to(ROOT)))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every imported module or name, also inside functions."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.level, f"{node.module}.{alias.name}" if node.module else alias.name


def core_import_is_allowed(level: int, name: str, depth: int = 1) -> bool:
    """The standard library without the world, three libraries, and the core itself.

    `depth` folders deep, counted from the core's own, so that no relative import leaves it.
    """
    if level > depth:
        return False
    parts = (["funcprobe"] if level else []) + name.split(".")
    if parts[0] == "funcprobe":
        return "adapters" not in parts
    return parts[0] in LIBRARIES or (parts[0] in sys.stdlib_module_names and parts[0] not in WORLD)


def shell_import_is_allowed(level: int, name: str, depth: int = 1) -> bool:
    """Its own files relative, the core absolute; `depth` folders deep, so that no import leaves it."""
    parts = name.split(".")
    own = parts[0] == "adapters" or parts[:2] == ["funcprobe", "adapters"]
    return not own if level == 0 else level <= depth and parts[0] != "funcprobe"


def broad_handlers(module: ast.Module) -> list[tuple[str, bool]]:
    """(the function, whether it raises at the end) of a bare except, or one for (Base)Exception."""

    def names(kind: ast.expr | None) -> set[str]:
        return {"bare"} if kind is None else {n.id for n in ast.walk(kind) if isinstance(n, ast.Name)}

    found = []

    def visit(node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = node.name
        broad = {"bare", "Exception", "BaseException"}
        if isinstance(node, ast.ExceptHandler) and names(node.type) & broad:
            goes_on = any(isinstance(n, ast.Return | ast.Continue | ast.Break) for n in ast.walk(node))
            found.append((inside, isinstance(node.body[-1], ast.Raise) and not goes_on))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(module, "<module>")
    return found


def test_both_rooms_are_read():
    assert {p.name for p in CORE} >= {"__init__.py", "forward.py", "probe.py", "adam.py", "checks.py"}
    assert {p.name for p in SHELL} >= {"__init__.py", "cli.py", "run.py", "rewards.py"}


@core_files
def test_the_core_imports_the_core_and_three_libraries(path):
    depth = len(path.relative_to(ROOT / "funcprobe").parts)
    found = imports(tree_of(path))
    assert not [name for level, name in found if not core_import_is_allowed(level, name, depth)]


@core_files
def test_the_core_touches_nothing_outside(path):
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.Global | ast.Nonlocal), node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in BUILTINS, (node.func.id, node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # torch marks what changes its first argument by a trailing underscore
            name = node.func.attr
            assert not name.endswith("_") or name.startswith("_"), (name, node.lineno)
            assert name not in {"backward", "manual_seed_all", "set_default_dtype"}, node.lineno


@shell_files
def test_the_shell_imports_its_own_files_relatively(path):
    depth = len(path.relative_to(ROOT / "adapters").parts)
    found = imports(tree_of(path))
    assert not [name for level, name in found if not shell_import_is_allowed(level, name, depth)]


@files
def test_no_exception_is_swallowed(path):
    # Where anything may be raised, and all of it is raised again, as InputError or as it was.
    allowed = BROAD.get(str(path.relative_to(ROOT)), [])
    assert broad_handlers(tree_of(path)) == allowed


@shell_files
def test_a_home_is_of_a_user_that_exists(path):
    """Path's own expanduser raises RuntimeError."""
    assert ".expanduser()" not in path.read_text(encoding="utf-8")


@files
def test_files_are_short(path):
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count <= MOST_LINES


def test_tests_are_cut_by_subject():
    counts = {
        p: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "tests").rglob("*.py")
    }
    assert len(counts) > 50
    assert not {path: count for path, count in counts.items() if count > MOST_LINES_OF_TESTS}


def test_reasons_are_given_and_not_numbered():
    """A number in a tracker says nothing to a reader of the source."""
    numbered = re.compile(r"\bissue'?s? #?\d|\(#\d+\)", re.IGNORECASE)
    pages = [path for suffix in ("py", "md", "toml") for path in ROOT.rglob(f"*.{suffix}")]
    tracked = [path for path in pages if path.relative_to(ROOT).parts[0] in TRACKED]
    assert len(tracked) > 200
    found = [
        f"{path}:{number}: {line}"
        for path in tracked
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if numbered.search(line)
    ]
    assert not found
    assert numbered.search(f"as in issue {12}")


def test_importing_the_core_loads_no_shell():
    code = (
        "import sys, funcprobe\n"
        "heavy = {'transformers', 'peft', 'safetensors', 'pydantic', 'typer', 'datasets'}\n"
        "print(sorted(n for n in sys.modules if n in heavy or n.startswith('funcprobe.adapters')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "import os.path as p",
        "from pathlib import Path",
        "import logging, math",
        "from . import adapters",
        "from .adapters import cli",
        "import funcprobe.adapters.cli",
        "from funcprobe import adapters",
        "import numpy",
        "from transformers import AutoModel",
        "def f():\n    import json",
        "from .. import adapters",
        "import sys",
        "from adapters import cli",
    ],
)
def test_the_rule_for_the_core_sees(line):
    assert not all(core_import_is_allowed(*found) for found in imports(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "from funcprobe.adapters import cli",
        "import funcprobe.adapters",
        "from funcprobe import adapters",
        "import adapters.cli",
        "from adapters.cli import app",
        "from .. import tree",
    ],
)
def test_the_rule_for_the_shell_sees(line):
    assert not all(shell_import_is_allowed(*found) for found in imports(ast.parse(line)))


def test_the_rules_allow_what_they_should():
    core = (
        "import math, torch.func\nfrom . import tree\nfrom .types import Params\nimport funcprobe.tree"
    )
    assert all(core_import_is_allowed(*found) for found in imports(ast.parse(core)))
    shell = (
        "import os, numpy\nfrom . import store\nfrom .config import Config\nfrom funcprobe import tree"
    )
    assert all(shell_import_is_allowed(*found) for found in imports(ast.parse(shell)))


@pytest.mark.parametrize("kind", ["", " Exception", " BaseException as e", " (OSError, Exception)"])
def test_the_rule_for_exceptions_sees(kind):
    code = f"def f():\n    try:\n        pass\n    except{kind}:\n        BODY"
    assert broad_handlers(ast.parse(code.replace("BODY", "pass"))) == [("f", False)]
    assert broad_handlers(ast.parse(code.replace("BODY", "raise"))) == [("f", True)]
    conditional = code.replace("BODY", "if x:\n            return\n        raise")
    assert broad_handlers(ast.parse(conditional)) == [("f", False)]
    assert not broad_handlers(ast.parse(code.replace("except" + kind, "except (OSError, ValueError)")))
