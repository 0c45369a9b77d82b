"""A configuration as choices: keys with a value and a comment each, written as TOML."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit

from .paths import resolve
from .schema import Config


class Choice(NamedTuple):
    """A key of the configuration, its value, and the comment above it.

    A key that is not set is a comment as well: a run takes its value from elsewhere.
    """

    key: str
    value: Any
    why: str
    is_set: bool = True


def configuration(values: Mapping[str, Any]) -> Config:
    """The configuration with these keys set; paths are relative to the current directory."""
    return Config.model_validate(_tables(values))


def as_toml(choices: Sequence[Choice], head: Sequence[str]) -> str:
    """The choices in the order of the schema, under the comments `head`."""
    configuration({choice.key: choice.value for choice in choices if choice.is_set})
    tables = _tables({choice.key: choice.value for choice in choices})
    document = tomlkit.document()
    for line in chain.from_iterable(map(_lines, head)):
        document.add(tomlkit.comment(line))
    for section in (name for name in Config.model_fields if name in tables):
        table = tomlkit.table()
        for choice in choices:
            if choice.key.startswith(f"{section}."):
                name = choice.key.partition(".")[2]
                for line in _lines(choice.why):
                    table.add(tomlkit.comment(line))
                item = _item(tables[section][name])
                if choice.is_set:
                    table.add(name, item)
                else:
                    table.add(tomlkit.comment(f"{name} = {item.as_string()}"))
        document.add(section, table)
    return tomlkit.dumps(document)


def _tables(values: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return resolve(tables, Path.cwd(), written_in="the proposal")


def _lines(comment: str) -> list[str]:
    return textwrap.wrap("".join(c if c.isprintable() else " " for c in comment), 100)


def _item(value: Any) -> Any:
    """As tomlkit takes it; a table stays on its line, without keys that are null."""
    if not isinstance(value, dict):
        return tomlkit.item(value)
    found = tomlkit.inline_table()
    found.update({key: inner for key, inner in value.items() if inner is not None})
    return found
