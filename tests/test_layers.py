"""Folders import only what lies below them: import-linter's contracts in pyproject.toml."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.paths import ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The two rooms and their contracts, to plant imports in."""
    folder = tmp_path_factory.mktemp("copy")
    for room in ("funcprobe", "adapters"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-logo", "--no-cache", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_folder_imports_what_lies_below_it(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 4 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("funcprobe/policy/rows.py", "from ..passes import head", "core"),
        ("funcprobe/tree.py", "from . import probe", "core"),
        ("adapters/machine/memory.py", "from .. import store", "shell"),
        ("adapters/stages/fit.py", "from ..results import schema", "shell"),
        ("funcprobe/types.py", "from adapters import store", "rooms"),
        ("funcprobe/step/adam.py", "import os", "pure"),
        ("funcprobe/statistics/weights.py", "import numpy", "pure"),
    ],
)
def test_a_planted_import_is_seen(copy, file, line, broken):
    path = copy / file
    source = path.read_text(encoding="utf-8")
    path.write_text(f"{source}\n\ndef planted():\n    {line}\n", encoding="utf-8")
    try:
        done = lint(copy, "--contract", broken)
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Contracts: 0 kept, 1 broken." in done.stdout


def test_the_core_is_forbidden_every_library_but_three():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (pure,) = [c for c in settings["tool"]["importlinter"]["contracts"] if c["id"] == "pure"]
    needed = [re.match(r"[\w-]+", line)[0] for line in settings["project"]["dependencies"]]
    imported = {"vl-convert-python": "vl_convert"}
    libraries = {imported.get(name, name.replace("-", "_")) for name in needed}
    libraries -= {"torch", "optree", "jaxtyping"}
    assert len(libraries) > 10
    assert libraries <= set(pure["forbidden_modules"])


def test_every_folder_of_python_files_is_installed():
    """The package list of pyproject.toml is explicit, since adapters/ lies beside funcprobe/."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    there = {
        ".".join(("funcprobe", *([room] if room == "adapters" else []), *path.parent.parts))
        for room in ("funcprobe", "adapters")
        for path in (p.relative_to(ROOT / room) for p in (ROOT / room).rglob("*.py"))
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == there
