"""Paths in a configuration: relative to the place where they are written.

Those in a file are relative to its folder, so that a configuration runs from any directory; those of
`--set`, and the defaults, are relative to the current directory.
"""

import os
import re
from pathlib import Path
from typing import Any

from funcprobe.types import InputError

from ..machine.home import expanded

FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv")  # of prompts

# os.path.exists is used for names that are too long for a file, of which Path.exists raises.
_FILES = (
    "optimizer.state",
    "rollouts.eval",
    "rollouts.update",
    "attribution.gradients",
    "attribution.earlier_checkpoint",
)
_FILES_OR_HUB = ("policy.checkpoint", "policy.base", "prompts.source")
_FUNCTIONS = ("reward.function", "objective.loss", "measure.observables")  # the last is a list of them
_OUTPUT = ("run.folder", "log.folder")
KEYS = (*_FILES, *_FILES_OR_HUB, *_FUNCTIONS, *_OUTPUT)


def looks_local(name: str) -> bool:
    """Whether a name is no hub id: those have at most one slash, and no checkpoint-N."""
    named_so = name.startswith((".", "/", "~")) or re.search(r"checkpoint-\d+/?$", name) is not None
    return named_so or name.count("/") > 1


def resolve(tables: dict[str, Any], folder: Path, *, written_in: str) -> dict[str, Any]:
    """The tables with every relative path joined to `folder`, and ~ replaced; hub ids are unchanged.

    InputError for an input that does not exist there, but in the current directory; `written_in` is
    the file, for the message.
    """
    found = dict(tables)
    for key in KEYS:
        section, _, name = key.partition(".")
        table = found.get(section)
        if not isinstance(table, dict):
            continue
        given = table.get(name)
        if isinstance(given, str):
            value: str | list[Any] = _resolved(key, given, folder, written_in)
        elif isinstance(given, list):
            value = [_resolved(key, x, folder, written_in) if isinstance(x, str) else x for x in given]
        else:
            continue
        found[section] = {**table, name: value}
    return found


def _resolved(key: str, value: str, folder: Path, written_in: str) -> str:
    if key in _FUNCTIONS:
        module, _, function = value.rpartition(":")
        if Path(module).suffix != ".py":
            return value
        return f"{_joined(key, module, folder, written_in)}:{function}"
    if key in _FILES_OR_HUB:
        if value == "toy":  # the built-in policy, its prompts
            return value
        local = looks_local(value) or Path(value).suffix in FILE_TYPES or os.path.exists(folder / value)
        if not (local or os.path.exists(value)):
            return value
    return _joined(key, value, folder, written_in)


def _joined(key: str, value: str, folder: Path, written_in: str) -> str:
    if not value:
        return value  # rejected by the model, with the key
    path = expanded(value)
    there = folder / path
    read = key not in _OUTPUT and not path.is_absolute()
    if read and not os.path.exists(there) and os.path.exists(path):
        raise InputError(
            f"{written_in}: {key} = {value}: a path in a configuration is relative to its folder, and "
            f"{there} does not exist; {value} in the current directory does: set it to "
            f'"{os.path.relpath(path, folder)}"'
        )
    return str(there)
