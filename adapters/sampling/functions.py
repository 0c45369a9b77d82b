"""A function of the user's, "module:function" or "path/to/file.py:function": a reward, a loss."""

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from funcprobe.types import InputError

from ..machine.home import expanded


def load_function(spec: str, what: str, expected: str) -> Callable[..., Any]:
    """The function that `spec` names. `what` it is, and what is `expected`, are for the messages.

    Raises InputError if there is none, if importing it raises anything, and if it is asynchronous.
    """
    module, colon, name = spec.rpartition(":")
    if not (colon and module and name):
        raise InputError(
            f'unknown {what} {spec!r}: expected {expected}, "module:function" or '
            '"path/to/file.py:function"'
        )
    found = _module(module, what)
    function = getattr(found, name, None)
    if not callable(function):
        there = [n for n, f in vars(found).items() if inspect.isfunction(f)]
        raise InputError(
            f"{module} has no function {name!r}, its functions are: "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__):
        raise InputError(f"{what} {spec!r} is asynchronous, expected a function: await inside it")
    return function  # type: ignore[no-any-return]


def users_code(run: Callable[[], Any], what: str, hint: str = "") -> Any:
    """run(), the user's code. Whatever it raises is raised as an InputError of one line."""
    try:
        return run()
    # Broad, as the user's code may raise anything; nothing continues from here: the exception is
    # reported as an input that cannot be used.
    except (Exception, SystemExit) as error:
        raised = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{what} raised {raised}{hint}") from error


def _module(name: str, what: str) -> ModuleType:
    path = expanded(name)
    if path.suffix != ".py":
        hint = f"; give a file by its path, such as ./{path.name}.py:function"
        imported: ModuleType = users_code(
            lambda: importlib.import_module(name), f"importing {name}", hint
        )
        return imported
    if not path.is_file():
        raise InputError(f"file not found: {name} (from {Path.cwd()}): correct the path")
    # A reward and a loss may be in one file, or in two of the same name.
    module = ModuleType(f"funcprobe_{what.replace('.', '_')}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    loader = SourceFileLoader(module.__name__, str(path))
    users_code(lambda: loader.exec_module(module), f"importing {name}")
    return module
